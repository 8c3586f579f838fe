"""What is installed, which devices there are, and which kernels serve on them."""

import ctypes
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import pysteer

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "diffusers",
    "matplotlib",
    "pyarrow",
    "omegaconf",
)


def package_versions() -> dict[str, str | None]:
    """Version of each package pysteer works with, None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def extension_info() -> dict[str, Any]:
    """How the compiled extension was built and what processor it runs on, or why it is not there."""
    try:
        extension = importlib.import_module("pysteer._C")
    except ImportError as error:
        return {"available": False, "reason": _first_line(error)}
    return {"available": True, **extension.build_info(), "cpu_features": extension.cpu_features()}


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device torch sees."""
    import torch

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def backends() -> dict[str, dict[str, Any]]:
    """Every kernel backend with `live` and, where it is not, the reason."""
    try:
        status: Callable[[], dict[str, tuple[bool, str]]] = importlib.import_module(
            "pysteer.ops.backends"
        ).backend_status
    except ImportError as error:
        return {"reference": {"live": False, "reason": _first_line(error)}}
    return {name: {"live": live, "reason": reason} for name, (live, reason) in status().items()}


def describe() -> dict[str, Any]:
    """Everything `pysteer env` shows, as plain types."""
    return {
        "pysteer": pysteer.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "extension": extension_info(),
        "devices": devices(),
        "backends": backends(),
    }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that were freed, for a process that is all ours.

    glibc gives every freed block above 32 MB back to the system, and eager torch on a CPU then spends a fifth of a
    generation on mapping fresh pages for its activations.

    Returns:
        Whether the C library took the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))
