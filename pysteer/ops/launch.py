"""From tensors to kernel calls: which backend, in which memory order, and what the compiled kernels report back."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.layouts import DTYPE_CODES, Frame, frame_of, overlapping


class Launch(NamedTuple):
    """The backend chosen for a call and the frames of its activation and result (None for the reference)."""

    backend: str
    source: Frame | None = None
    target: Frame | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """R, L, D, then the strides of the source and those of the target."""
        assert self.source is not None
        assert self.target is not None
        return (*self.source, *self.target[3:])


_REFERENCE = Launch("reference")


def choose(op: str, x: Tensor, out: Tensor, channel_dim: int, serves: Callable[[str], bool] | None = None) -> Launch:
    """Return the first live backend that serves the call, or the reference.

    Kernels want fp32, bf16 or fp16, and channels or tokens next to each other in both tensors.

    Args:
        op: name of the op.
        x, out: activation and result.
        channel_dim: where the channels are.
        serves: what the op itself says about a backend.
    """
    names = backends.choices(x.device.type)
    if not names or x.dtype not in DTYPE_CODES:
        return _REFERENCE
    for name in names:
        if backends.provides(name, op) and (serves is None or serves(name)):
            break
    else:
        return _REFERENCE
    a = frame_of(x, channel_dim)
    b = a if out is x else frame_of(out, channel_dim)
    if a is None or b is None or 0 in a[:3] or (0 in b[3:] and overlapping(b)):
        return _REFERENCE
    by_token = a.width == 1 or (a.channel_stride == 1 and b.channel_stride == 1)
    by_channel = a.tokens == 1 or (a.token_stride == 1 and b.token_stride == 1)
    return Launch(name, a, b) if by_token or by_channel else _REFERENCE


def packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, with contiguous copies in place of those that are not contiguous."""
    return [each if each is None or each.is_contiguous() else each.contiguous() for each in tensors]


def addresses(*tensors: Tensor | None) -> list[int]:
    """Return where the tensors lie, 0 for None; the caller keeps them alive."""
    return [0 if each is None else each.data_ptr() for each in tensors]


class Call(NamedTuple):
    """A call of a compiled kernel on the CPU: the tensors whose addresses come first in its arguments."""

    kernel: Callable[..., int]
    tensors: tuple[Tensor | None, ...]
    arguments: tuple[Any, ...]


_notes = threading.local()


@contextmanager
def noted_calls() -> Iterator[list[Call]]:
    """Note the calls that `run_compiled` makes in this thread, so that they can be made again."""
    before, _notes.calls = getattr(_notes, "calls", None), []
    try:
        yield _notes.calls
    finally:
        _notes.calls = before


def run_compiled(op: str, tensors: Sequence[Tensor | None], *options: Any) -> int:
    """Call the compiled kernel of a steering op on the CPU and return its status, see `raise_for`.

    Args:
        op: its name.
        tensors: activation, result, and all others whose contents it reads.
        options: what follows the addresses: sizes, strides, codes.
    """
    kernel = getattr(backends.extension(), op)
    arguments = (*addresses(*tensors), *options)
    status = kernel(*arguments)
    calls = getattr(_notes, "calls", None)
    if calls is not None:
        calls.append(Call(kernel, tuple(tensors), arguments))
    return status


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` the current one, as kernel launches need."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def stream_of(x: Tensor) -> int:
    """Return the current CUDA stream of the device of `x` as an address."""
    return torch.cuda.current_stream(x.device).cuda_stream


def raise_for(status: int, slot: Tensor, clock: Tensor, sets: int) -> None:
    """Turn the status of a CPU kernel into an error; on a GPU such rows come out as NaN instead.

    Raises:
        InputError: the clock or a slot is outside the table or the bank.
    """
    if status == 1:
        raise InputError("clock", value=int(clock), allowed=f"0 to {slot.shape[0] - 1}", fix="plan more steps")
    if status == 2:
        found = slot[int(clock)]
        wrong = found[(found < 0) | (found >= sets)]
        raise InputError("slot", value=wrong[0].item(), allowed=f"0 to {sets - 1}", fix="use a set that the bank has")
