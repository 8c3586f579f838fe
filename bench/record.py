"""Where and with what a figure was measured, and the files of stored results."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import pysteer
from pysteer.errors import InputError
from pysteer.files import write_json, write_text

RESULTS = Path(__file__).resolve().parent / "results"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, GPU, versions, commit and date, to be stored with every result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pysteer": pysteer.__version__,
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def stored(name: str) -> list[dict[str, Any]]:
    """All stored results of a name, oldest first."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def append(name: str, result: dict[str, Any]) -> Path:
    """Add one result to `bench/results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, [*stored(name), result])
    return path


def write_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        InputError: a page without the marks.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(start)
    _, last, after = rest.partition(end)
    if not mark or not last:
        raise InputError("page", value=page.name, allowed=f"one with {start} and {end}")
    write_text(page, f"{before}{start}\n{text}\n{end}{after}")
