"""From the tokens of a row to what is kept of it."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Pool = Literal["tokens", "mean", "max", "min", "last"]
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda tokens: tokens,
    "mean": lambda tokens: tokens.float().mean(0, keepdim=True),
    "max": lambda tokens: tokens.amax(0, keepdim=True),
    "min": lambda tokens: tokens.amin(0, keepdim=True),
    "last": lambda tokens: tokens[-1:],
}


def padded_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows `[R_i, L_i, D]` of several batches in one tensor `[R, L, D]`; rows of fewer tokens are padded with zeros."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def valid_rows(x: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """The tokens that count of every row of `x` `[R, L, D]`, those first in a row that `lengths` `[R]` says."""
    if lengths is None:
        return list(x)
    return [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]


def pooled_rows(x: Tensor, lengths: Tensor | None, pool: str) -> list[Tensor]:
    """What is kept of every row, `[n, D]` each; a row without tokens keeps none."""
    keep = POOLS[pool]
    return [keep(row) if len(row) else row.new_zeros(0, x.shape[-1]) for row in valid_rows(x, lengths)]


def stacked_rows(x: Tensor, lengths: Tensor | None, pool: str) -> Tensor:
    """The same in one tensor `[n, D]`."""
    if pool == "tokens" and lengths is None:
        return x.flatten(0, 1)
    return torch.cat(pooled_rows(x, lengths, pool))
