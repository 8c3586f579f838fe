"""Which kernels run: what is available here and why not, and how to insist on one.

    reference   plain torch, always there
    cpu         compiled C++ (csrc/<op>.cpp), for CPU tensors
    triton      Triton (kernels/<op>.py), for CUDA tensors; for CPU tensors only in the interpreter and when asked for
    cuda        hand-written CUDA (csrc/<op>.cu), for CUDA tensors

Left alone, an op takes the first live backend that serves the call. `backend(name)` or the environment variable
PYSTEER_BACKEND insist on one; calls that it does not serve (see `OpSpec.backends`) then fall to the reference.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from pysteer.errors import InputError

NAMES = ("reference", "cpu", "triton", "cuda")
VARIABLE = "PYSTEER_BACKEND"

_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_forced: str | None = None
_choices: dict[str, tuple[str, ...]] = {}


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and if not, why."""

    live: bool
    reason: str


@cache
def _load_extension() -> tuple[Any, str]:
    try:
        return import_module("pysteer._C"), ""
    except ImportError as error:
        return None, f"the compiled extension does not load: {' '.join(str(error).split())}"


def extension() -> Any:
    """Return the compiled extension `pysteer._C`, or None."""
    return _load_extension()[0]


@cache
def load_kernels(op: str) -> Any:
    """Return the module with the Triton kernels of an op."""
    return import_module(f"pysteer.kernels.{op}")


@cache
def provides(name: str, op: str) -> bool:
    """Whether a backend that is live has the kernel of this op; an extension built from older sources may not."""
    if name == "triton":
        return find_spec(f"pysteer.kernels.{op}") is not None
    return hasattr(extension(), op if name == "cpu" else f"{op}_{name}")


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cuda_missing() -> str:
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device is available"


def _why_not(name: str) -> str:
    module, problem = _load_extension()
    if name == "cpu":
        return problem
    if name == "cuda":
        if module is not None and not module.has_cuda:
            problem = "the extension was built without CUDA (no nvcc was found, or PYSTEER_CUDA=OFF)"
        return problem or _cuda_missing()
    if name == "triton":
        if find_spec("triton") is None:
            return "triton is not installed"
        return "" if interpreted() else _cuda_missing()
    return ""


def backend_status() -> dict[str, BackendStatus]:
    """Return for every backend whether it is live, and the reason where it is not."""
    reasons = {name: _why_not(name) for name in NAMES}
    return {name: BackendStatus(not reason, reason) for name, reason in reasons.items()}


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise InputError(source, value=name, allowed=", ".join(NAMES))
    if reason := _why_not(name):
        live = ", ".join(each for each in NAMES if not _why_not(each))
        raise InputError(f"{source}: {name} is not available here, {reason}", value=name, allowed=live)
    return name


def insisted() -> str | None:
    """Return the backend that somebody insists on, or None where the ops choose."""
    return _forced or os.environ.get(VARIABLE) or None


def _find_choice(device: str) -> tuple[str, ...]:
    asked = insisted()
    if asked is None:
        return tuple(name for name in _AUTOMATIC.get(device, ()) if not _why_not(name))
    name = _checked(asked, "backend" if _forced else VARIABLE)
    serves = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if interpreted() else ("cuda",)}
    return (name,) if device in serves.get(name, ()) else ()


def chosen() -> dict[str, tuple[str, ...]]:
    """The dictionary in which `choices` keeps its answers; emptied, never replaced, whenever they may change."""
    return _choices


def choices(device: str) -> tuple[str, ...]:
    """Return the backends to try for tensors of a device type, best first, before the reference."""
    found = _choices.get(device)
    if found is None:
        found = _choices[device] = _find_choice(device)
    return found


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _choices.clear()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Insist on a backend within a `with` block; None gives the choice back to the ops.

    The choice holds for all threads of the process. Graphs compiled before keep what they were compiled with.

    Raises:
        InputError: the name is not one of `NAMES`, or the backend is not available here.
    """
    before = _forced
    _force(None if name is None else _checked(name, "backend"))
    try:
        yield
    finally:
        _force(before)
