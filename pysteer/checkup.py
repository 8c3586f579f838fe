"""Checks of the environment, each with what to do about it; `pysteer doctor` prints them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["good", "note", "bad"]

# extra -> a module that is missing where the extra is
_EXTRAS = {
    "language": "transformers",
    "diffusion": "diffusers",
    "report": "matplotlib",
    "store": "pyarrow",
    "sweep": "duckdb",
    "ui": "starlette",
}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was looked at.
        state: good; note, where something is slower or missing; bad, where things fail.
        text: what was found.
        fix: what to do, "" where there is nothing to do.
    """

    name: str
    state: State
    text: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_environment() -> list[Check]:
    """All checks, in the order in which they are best fixed. A check that fails by itself is reported as bad."""
    found: list[Check] = []
    for check in (_python, _torch, _numpy, _torchvision, _kernels, _steering, _threads, _extras, _disk):
        try:
            found += check()
        except Exception as error:  # a check must not hide the others
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found.append(Check(check.__name__.strip("_"), "bad", text, "pysteer env shows more"))
    return found


def version_of(name: str) -> str | None:
    """Version of an installed distribution, None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Check]:
    text = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Check("python", "good" if good else "bad", text, "" if good else "use Python 3.11 or 3.12")


def _torch() -> Iterator[Check]:
    found = version_of("torch")
    if found is None:
        yield Check("torch", "bad", "not installed", "pip install 'torch>=2.11,<2.14'")
        return
    major, minor = (int(part) for part in found.split(".")[:2])
    good = (2, 11) <= (major, minor) < (2, 14)
    yield Check("torch", "good" if good else "bad", found, "" if good else "pip install 'torch>=2.11,<2.14'")
    import torch

    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        built = torch.version.cuda or "without CUDA"
        yield Check(
            "gpu", "bad", f"there is an NVIDIA GPU, but torch ({built}) does not see it",
            "install a CUDA build of torch that fits the driver (nvidia-smi shows it)",
        )  # fmt: skip
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        yield Check("gpu", "good", f"{count} in use" if count else "none, the processor serves")


def _numpy() -> Iterator[Check]:
    import numpy as np
    import torch

    torch.from_numpy(np.zeros(2, np.float32))
    yield Check("numpy", "good", f"{np.__version__}, shares memory with torch")


def _torchvision() -> Iterator[Check]:
    found = version_of("torchvision")
    if found is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # an operator that does not exist, a symbol that is missing
        text = f"{found} does not fit torch: {str(error).splitlines()[0][:100]}"
        yield Check("torchvision", "bad", text, "pip uninstall torchvision; it breaks transformers and is not needed")


def _kernels() -> Iterator[Check]:
    from pysteer.environment import backends, extension_info

    extension = extension_info()
    if extension["available"]:
        yield Check("compiled kernels", "good", str(extension.get("compiler", "there")))
    elif hidden := _hidden():
        text = f"the sources in {Path(__file__).parent.parent} hide the installed package in {hidden}, which has them"
        yield Check("compiled kernels", "note", text, "pip install -e . in the clone, or start from another folder")
    else:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        fix = "pip install --force-reinstall --no-deps pysteer-core, and read why the build was left out"
        yield Check(
            "compiled kernels", "note", f"not there ({extension['reason']}); plain torch serves, slower",
            fix if compiler else "install a C++ compiler and Python's headers, then install pysteer-core again",
        )  # fmt: skip
    live = [name for name, status in backends().items() if status["live"]]
    yield Check("backends", "good", ", ".join(live) or "reference")


def _hidden() -> Path | None:
    """The folder of an installed package with compiled kernels, where this one is another: sources in front of it."""
    try:
        place = Path(str(importlib.metadata.distribution("pysteer-core").locate_file("pysteer")))
    except importlib.metadata.PackageNotFoundError:
        return None
    other = place.resolve() != Path(__file__).parent.resolve()
    return place.parent if other and any(place.glob("_C.*")) else None


def _steering() -> Iterator[Check]:
    """Steer a linear layer and compare with the formula: whether what is installed works together."""
    import torch

    from pysteer.ops.affine_shift import affine_shift

    x = torch.randn(2, 3, 8)
    tensors = (torch.ones(2, 8), torch.full((2, 8), 0.5))  # set 0 is the one that leaves rows alone
    slot, strength = torch.ones(1, 2, dtype=torch.int32), torch.tensor([[0.0, 2.0]])
    out = affine_shift(x, *tensors, slot, strength, torch.zeros((), dtype=torch.int64))
    right = torch.equal(out[0], x[0]) and torch.allclose(out[1], x[1] + 1.0)
    fix = "" if right else "run with PYSTEER_BACKEND=reference and report the output of pysteer env"
    yield Check("steering", "good" if right else "bad", "matches the formula" if right else "wrong result", fix)


def _threads() -> Iterator[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    fix = f"export OMP_NUM_THREADS={cores}" if many else ""
    yield Check("threads", "note" if many else "good", f"{threads} of torch on {cores} cores", fix)


def _extras() -> Iterator[Check]:
    missing = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        fix = f"pip install 'pysteer-core[{','.join(missing)}]'"
        yield Check("extras", "note", f"not installed: {', '.join(missing)}", fix)
    else:
        yield Check("extras", "good", "all there")


def _disk() -> Iterator[Check]:
    for name, place in (("results", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free / 2**30
        if not os.access(place, os.W_OK):
            yield Check(name, "note", f"{place} cannot be written", "give --out, or change the folder")
        elif free < 1:
            yield Check(name, "note", f"{free:.1f} GiB left in {place}", "make room")
