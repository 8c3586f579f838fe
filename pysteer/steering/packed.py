"""The tensors of a table in one piece of memory, and what a compiled graph has to know of them.

Before every run a compiled graph checks each object that it went through and each tensor that it takes, at every site.
So a site gives it one tensor with everything in it, and the name of what lies where in that. What has a name is held
apart, where it is checked once, however many sites have it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 16  # elements, 64 bytes: what the widest loads ask for


@dataclass(frozen=True)
class Piece:
    """One tensor in the whole: elements `[begin, end)`, which are fp32 or int32."""

    name: str
    begin: int
    end: int
    shape: tuple[int, ...]
    integers: bool


@dataclass(frozen=True)
class Pack:
    """How banks lie behind each other, and behind them `slot` and `strength` `[S, R]`, for any R.

    Attributes:
        pieces: the banks.
        size: elements of all banks.
    """

    pieces: tuple[Piece, ...]
    size: int

    @classmethod
    def of(cls, banks: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> "Pack":
        """For banks of these shapes and dtypes, fp32 or int32."""
        pieces, begin = [], 0
        for name, (shape, dtype) in banks.items():
            end = begin + prod(shape)
            pieces.append(Piece(name, begin, end, tuple(shape), dtype is torch.int32))
            begin = -(-end // _ALIGNED) * _ALIGNED
        return cls(tuple(pieces), begin)

    def empty(self, steps: int, rows: int, device: torch.device) -> Tensor:
        """The whole for S steps and R rows, with zeros in it."""
        return torch.zeros(self.size + 2 * steps * rows, device=device)

    def banks(self, whole: Tensor) -> dict[str, Tensor]:
        """The banks by name, as views of the fp32 `whole`."""
        found = {}
        for piece in self.pieces:
            view = whole[piece.begin : piece.end].view(piece.shape)
            found[piece.name] = view.view(torch.int32) if piece.integers else view
        return found

    def table(self, whole: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """`slot` int32 and `strength` fp32, both `[S, R]`, as views of the fp32 `whole`."""
        slot, strength = whole[self.size :].view(2, steps, -1).unbind(0)
        return slot.view(torch.int32), strength


@dataclass(frozen=True)
class Kind:
    """What a compiled graph has to know of a table, beside its tensors.

    Attributes:
        function: the steering op.
        pack: its tensors.
        options: what else it takes, by name.
        layout: of the site.
        alone: whether nothing goes around the op.
        common: whether there are tensors besides, which all sets share.
    """

    function: Callable[..., Tensor]
    pack: Pack
    options: Mapping[str, Any]
    layout: str
    alone: bool
    common: bool

    def run(
        self,
        x: Tensor,
        whole: Tensor,
        clock: Tensor,
        span: Tensor | None,
        steps: int,
        common: Mapping[str, Tensor],
    ) -> Tensor:
        """Steer `x` with S steps in the table; `common` are further tensors of the op, which are not in the whole."""
        slot, strength = self.pack.table(whole, steps)
        table = {"slot": slot, "strength": strength, "clock": clock, "span": span}
        return self.function(x, **self.pack.banks(whole), **common, **self.options, **table)


# By name and not by number: a number that differs from site to site is one that compiled graphs try to be general in.
KINDS: dict[str, Kind] = {}


def known_as(kind: Kind) -> str:
    """The name under which `KINDS` has a kind, the same for all that are equal."""
    pieces = ", ".join(f"{piece.name} {list(piece.shape)}" for piece in kind.pack.pieces)
    options = ", ".join(f"{name} {value!r}" for name, value in sorted(kind.options.items()))
    name = f"{kind.function.__name__} of {kind.layout}: {pieces}; {options}"
    name += (" alone" if kind.alone else " with something around it") + (" with common tensors" if kind.common else "")
    while KINDS.setdefault(name, kind) != kind:  # such as another function of the same name
        name += "'"
    return name
