"""A static key-value cache whose rows have positions of their own, so that a finished row can be given other work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pysteer.errors import PysteerError


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, `[R, heads, C, width]`, written at each row's own position."""

    is_compileable = False
    is_sliding = False

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        room = (rows, heads, self.owner.room)
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, not empty: what is masked out is multiplied by zero, and NaN times zero is NaN.
        self.keys = torch.zeros(*room, width, dtype=self.dtype, device=self.device)
        self.values = torch.zeros(*room, value_states.shape[-1], dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if key_states.shape[2] != 1:
            raise PysteerError(f"the row cache takes one token per row at a time, not {key_states.shape[2]}")
        rows, positions, used = self.owner.rows, self.owner.positions, self.owner.used
        self.keys[rows, :, positions] = key_states[:, :, 0]
        self.values[rows, :, positions] = value_states[:, :, 0]
        return self.keys[:, :, :used], self.values[:, :, :used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.used, 0

    def get_seq_length(self) -> int:
        return self.owner.used - 1

    def get_max_length(self) -> int:
        return self.owner.room

    get_max_cache_shape = get_max_length  # its name before transformers 5


class RowCache(Cache):
    """Room for `room` tokens in each of `rows` rows.

    Before every run of the model over one token per row, `at(positions)` says where each row is. What lies behind the
    position of a row is of its earlier work and must be masked: `mask()`.

    Args:
        layers: number of layers of the model.
        rows: R.
        room: C, tokens per row.
        device: of the model.
    """

    def __init__(self, layers: int, rows: int, room: int, device: torch.device) -> None:
        self.room = room
        self.rows = torch.arange(rows, device=device)
        self.places = torch.arange(room, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.used = 1
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])

    def at(self, positions: Tensor, longest: int) -> None:
        """Take the place of the coming token of each row, int64 `[R]`; `longest` is the largest of them."""
        self.positions, self.used = positions, longest + 1

    def mask(self, added: torch.dtype | None = None) -> Tensor:
        """Which tokens each row attends to, its coming one included: bool `[R, 1, 1, used]`.

        With a dtype `added`, numbers that are added to the scores: 0, and the smallest one for what is masked.
        """
        seen = (self.places[: self.used] <= self.positions[:, None])[:, None, None]
        if added is None:
            return seen
        return torch.zeros(seen.shape, dtype=added, device=seen.device).masked_fill_(~seen, torch.finfo(added).min)
