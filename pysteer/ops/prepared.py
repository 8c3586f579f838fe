"""Steering ops with their parameters given once, for eager code that calls them again and again.

A public op looks at every argument and goes through the operator registry, which takes longer than a kernel on one
token. A `Prepared` op does so once per table, shape, layout and dtype, and from then on calls the compiled kernel.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pysteer.ops import backends
from pysteer.ops.declare import transformed
from pysteer.ops.launch import Call, noted_calls

_MOST_KNOWN = 64  # shapes that are remembered as not repeatable; a loop over ever new ones must not grow without end


def _watched() -> bool:
    """Whether somebody transforms, traces or records what torch does."""
    if transformed() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._get_tracing_state() is not None


def _never(*arguments: Any) -> None:
    """Nothing is kept without the extension, or where torch has no exchange table (before 2.10)."""
    return


def _local_keys() -> tuple[int, int, int]:
    """Address of c10::impl::tls_local_dispatch_key_set, 0 if it is not found, and what it should return now."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    try:
        c10 = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib/libc10.so"))
        found = ctypes.cast(c10["_ZN3c104impl29tls_local_dispatch_key_setEv"], ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system, or another torch
        found = 0
    return found, included.raw_repr(), excluded.raw_repr()


@cache
def kept_calls() -> Any:
    """The extension, told what to ask torch before a call is made again; None where calls cannot be kept."""
    extension = backends.extension()
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if not hasattr(extension, "Repeats") or exchange is None:
        return None
    asked = [
        (torch._C._len_torch_dispatch_stack, None),  # 0
        (torch._C._get_tracing_state, None),
        (torch._C._functorch.peek_interpreter_stack, None),
    ]
    plain = (Tensor, torch.empty_like, torch.is_grad_enabled, torch.get_num_threads)
    level = (vars(forward_ad), "_current_level", -1)
    extension.set_surroundings(exchange, *plain, backends.chosen(), asked, *level, *_local_keys())
    return extension


class Prepared:
    """`function(x, **given, slot=, strength=, clock=, span=)` with the same result bit for bit, errors and all.

    The direct way serves CPU tensors in plain eager code without gradients, where the op is one call of a compiled
    kernel. Whenever anything it relies on has changed (tensors of the table, shape, strides, dtype, number of threads,
    backends, where a tensor lies), and for all else, the function itself is called. All tensors may be written to, but
    not resized in place.

    Args:
        function: a steering op, such as `pysteer.ops.affine_shift`.
        given: its banks and options by name.

    Attributes:
        again: `again(x, slot, strength, clock, span, counts, rows, weight)` goes the direct way or returns None, for
            callers that shall not be compiled. `counts`: int64 `[S]` or None; what is added at the current step is
            `weight` plus the tokens of a row. `rows`: how many rows `x` must have; whoever gives them also vouches that
            no tensor was moved in place (`tensor.data = ...`) since the call before. With None that is looked at.
    """

    def __init__(self, function: Callable[..., Tensor], given: dict[str, Any]) -> None:
        self.function = function
        self.given = given
        self._banks = [value for value in given.values() if isinstance(value, Tensor)]
        self._whole: set[Any] = set()
        self._kept = None
        self.again: Callable[..., Tensor | None] = _never
        if (extension := kept_calls()) is not None:
            self._kept = extension.Repeats(self._banks, given.get("channel_dim", -1))
            self.again = extension.Repeats.function(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy keeps calls of its own."""
        return Prepared, (self.function, self.given)

    def __call__(self, x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None = None) -> Tensor:
        """The activation `x`, steered as the table says; a fresh tensor."""
        if torch.compiler.is_compiling():
            return self.whole(x, slot, strength, clock, span)
        y = self.again(x, slot, strength, clock, span, None, None, 0)
        return self._first(x, slot, strength, clock, span) if y is None else y

    def whole(self, x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None = None) -> Tensor:
        """The same through the op itself, for tables that are new at every call."""
        return self.function(x, **self.given, slot=slot, strength=strength, clock=clock, span=span)

    def _first(self, x: Tensor, *table: Any) -> Tensor:
        """The whole way, which also says what is wrong, noting the call of the kernel at its end."""
        if self._kept is None or type(x) is not Tensor or not x.is_cpu or _watched():
            return self.whole(x, *table)
        key = (x.shape, x.stride(), x.dtype, backends.choices("cpu"), *map(id, table))
        graded = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *self._of(table)))
        if graded or key in self._whole:
            return self.whole(x, *table)
        with noted_calls() as calls:
            y = self.whole(x, *table)
        if len(calls) != 1 or not self._repeatable(calls[0], x, y, table):
            if len(self._whole) >= _MOST_KNOWN:
                self._whole.clear()
            self._whole.add(key)
        return y

    def _of(self, table: tuple[Tensor | None, ...]) -> list[Tensor]:
        return [*self._banks, *(each for each in table if each is not None)]

    def _repeatable(self, call: Call, x: Tensor, y: Tensor, table: tuple[Tensor | None, ...]) -> bool:
        """Keep the call of the kernel from x to y, if it works on the very tensors that were given."""
        source, target, *rest = call.tensors
        known = self._of(table)
        own = all(tensor is None or any(tensor is each for each in known) for tensor in rest)
        if source is None or target is None or not own:
            return False
        packed = getattr(backends.extension(), f"{call.kernel.__name__}_packed", None)
        same = source.data_ptr() == x.data_ptr() and target.data_ptr() == y.data_ptr()
        if not same or packed is None or self._kept is None:
            return False
        return self._kept.keep(x, *table, packed, call.arguments)


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
