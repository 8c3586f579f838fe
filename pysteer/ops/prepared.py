"""Steering ops with their parameters given once, for eager code that calls them again and again.

A public op looks at every argument and goes through the operator registry, which takes longer than a kernel on one
token. A `Prepared` op does so once per table, shape, layout and dtype, and from then on calls the compiled kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysteer.ops import backends
from pysteer.ops.declare import transformed
from pysteer.ops.launch import Call, noted_calls

_MOST_KNOWN = 64  # shapes that are kept; a loop over ever new ones must not grow without end
_UNKNOWN: Any = object()


def _watched() -> bool:
    """Whether somebody transforms, traces or records what torch does."""
    if transformed() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._get_tracing_state() is not None


class Prepared:
    """`function(x, **given, slot=, strength=, clock=, span=)` with the same result bit for bit, errors and all.

    The direct way serves CPU tensors in plain eager code without gradients, where the op is one call of a compiled
    kernel. Whenever anything it relies on has changed (tensors of the table, shape, strides, dtype, number of threads,
    backends, where a tensor lies), and for all else, the function itself is called. All tensors may be written to, but
    not resized in place.

    Args:
        function: a steering op, such as `pysteer.ops.affine_shift`.
        given: its banks and options by name.
    """

    def __init__(self, function: Callable[..., Tensor], given: dict[str, Any]) -> None:
        self.function = function
        self.given = given
        self._banks = [value for value in given.values() if isinstance(value, Tensor)]
        self._table: tuple[Tensor | None, ...] = (None,) * 4
        self._tensors: list[Tensor] = []
        self._places: list[int] = []
        self._known: dict[Any, tuple[Callable[..., int], tuple[Any, ...]] | None] = {}

    def _forget(self) -> None:
        self._tensors = [*self._banks, *(each for each in self._table if each is not None)]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._known = {}

    def __call__(self, x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None = None) -> Tensor:
        """The activation `x`, steered as the table says; a fresh tensor."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or _watched():
            return self.whole(x, slot, strength, clock, span)
        known = self._table
        if slot is not known[0] or strength is not known[1] or clock is not known[2] or span is not known[3]:
            self._table = (slot, strength, clock, span)
            self._forget()
        elif [tensor.data_ptr() for tensor in self._tensors] != self._places:
            self._forget()
        if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in self._tensors)):
            return self.whole(x, slot, strength, clock, span)
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads(), backends.choices("cpu"))
        found = self._known.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            return self._first(key, x, slot, strength, clock, span)
        if found is not None:
            y = torch.empty_like(x)
            if not found[0](x.data_ptr(), y.data_ptr(), *found[1]):
                return y
        return self.whole(x, slot, strength, clock, span)  # which also says what is wrong

    def whole(self, x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None = None) -> Tensor:
        """The same through the op itself, for tables that are new at every call."""
        return self.function(x, **self.given, slot=slot, strength=strength, clock=clock, span=span)

    def _first(self, key: Any, x: Tensor, *table: Any) -> Tensor:
        """The whole way, noting the call of the kernel at its end."""
        with noted_calls() as calls:
            y = self.whole(x, *table)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = self._repeatable(calls[0], x, y) if len(calls) == 1 else None
        return y

    def _repeatable(self, call: Call, x: Tensor, y: Tensor) -> tuple[Callable[..., int], tuple[Any, ...]] | None:
        """The kernel and its arguments behind x and y, if it works on the very tensors that were given."""
        source, target, *rest = call.tensors
        own = all(tensor is None or any(tensor is each for each in self._tensors) for tensor in rest)
        if source is None or target is None or not own:
            return None
        same = source.data_ptr() == x.data_ptr() and target.data_ptr() == y.data_ptr()
        return (call.kernel, call.arguments[2:]) if same else None


def prepare(function: Callable[..., Tensor], **given: Any) -> Prepared:
    """Return a steering op with banks and options given: `y = prepared(x, slot, strength, clock, span)`.

    `prepare(affine_shift, gain=gain, bias=bias)` costs a few microseconds a call on a CPU, see `Prepared`.
    """
    return Prepared(function, given)


def count_at(counts: Tensor, clock: Tensor, one: Tensor, amount: int) -> None:
    """Add to the count of the current step, without waiting for the device; in eager code.

    Args:
        counts: [S] int64, contiguous.
        clock: [] int64, the step.
        one: [1] int64 with a 1 in it, on the same device.
        amount: what to add.
    """
    add = getattr(backends.extension(), "count_at", None)
    plain = type(counts) is Tensor and counts.is_cpu and not torch._C._len_torch_dispatch_stack()
    if add is None or not plain:
        counts.index_add_(0, clock, one, alpha=amount)
    else:
        add(counts.data_ptr(), clock.data_ptr(), counts.shape[0], amount)
