"""Which tokens of a text are steered or read."""

from typing import Literal

import torch
from torch import Tensor

from pysteer.errors import InputError

Positions = Literal["all", "last"] | slice | Tensor


def narrowed(lengths: Tensor, positions: Positions) -> Tensor:
    """Spans `[R, 2]` of the tokens at `positions` among the first `lengths[r]` tokens or those of given spans."""
    start, end = lengths.unbind(1) if lengths.dim() == 2 else (torch.zeros_like(lengths), lengths)
    if isinstance(positions, Tensor) or positions == "all":  # a mask is looked at apart
        return torch.stack((start, end), dim=1)
    chosen = slice(-1, None) if isinstance(positions, str) else positions
    first, last = chosen.start or 0, chosen.stop
    begin = start + first if first >= 0 else end + first
    stop = end if last is None else (start + last if last >= 0 else end + last)
    begin = torch.minimum(torch.maximum(begin, start), end)
    return torch.stack((begin, torch.maximum(torch.minimum(stop, end), begin)), dim=1)


def check_positions(positions: Positions) -> Positions:
    """Return `positions` if they are a choice of tokens.

    Raises:
        InputError: they are not.
    """
    allowed = '"all", "last", a slice of whole numbers with step 1, or a bool mask [B, L]'
    if isinstance(positions, Tensor):
        if positions.dtype == torch.bool and positions.dim() == 2 and positions.numel():
            return positions
        positions = f"{positions.dtype} {list(positions.shape)}"  # type: ignore[assignment]
    elif isinstance(positions, slice):
        edges = (positions.start, positions.stop)
        if positions.step in (None, 1) and all(edge is None or type(edge) is int for edge in edges):
            return positions
    elif positions in ("all", "last"):
        return positions
    raise InputError("positions", value=positions, allowed=allowed)
