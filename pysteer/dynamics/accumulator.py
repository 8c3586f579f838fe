"""Running moments of one point on its device; in eager code on a CPU a call is one call of the compiled kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysteer.ops import backends
from pysteer.ops.channel_moments import channel_moments, empty_moments
from pysteer.ops.declare import transformed
from pysteer.ops.launch import choose
from pysteer.ops.layouts import DTYPE_CODES


class Accumulator:
    """Moments `[8, D]` fp64 of all values given so far.

    Args:
        width: D.
        eps: what counts as near zero.
        channel_dim: where the channels are; None: 1 from four dimensions on, else the last.
        device: where the values will be.

    Attributes:
        moments: the sums.
        touched: whether anything was added since the start.
    """

    __slots__ = ("_address", "_empty", "_kernel", "_key", "_rest", "channel_dim", "eps", "moments", "touched")

    def __init__(self, width: int, eps: float, channel_dim: int | None, device: torch.device) -> None:
        self.eps, self.channel_dim = eps, channel_dim
        self._key: Any = None
        self._kernel: Any = None
        self._rest: tuple[Any, ...] = ()
        self._empty: Tensor | None = None
        self.reset(empty_moments(width, device))
        self.touched = False

    def reset(self, moments: Tensor) -> None:
        """Go on from these moments, `[8, D]` fp64 contiguous."""
        self.moments, self.touched = moments, True
        self._address = moments.data_ptr()
        self._key = None

    def clear(self) -> None:
        """Start again from nothing."""
        if self._empty is None or self._empty.device != self.moments.device:
            self._empty = empty_moments(self.moments.shape[1], self.moments.device)
        self.moments.copy_(self._empty)
        self.touched = False

    def add(self, x: Tensor) -> None:
        """Add the values of an activation, without waiting for its device.

        The compiled kernel is called directly while shape, strides, dtype, threads and backends stay as they were when
        the whole way was last taken; a lookup through the operator registry takes longer than a small activation.
        """
        self.touched = True
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or transformed():
            self._add(x)
            return
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads(), backends.choices("cpu"))
        if key != self._key:
            self._add(x)
            self._remember(key, x)
        elif self._kernel is None:
            self._add(x)
        else:
            self._kernel(x.data_ptr(), self._address, *self._rest)

    def _dim(self, x: Tensor) -> int:
        return self.channel_dim if self.channel_dim is not None else 1 if x.dim() >= 4 else -1

    def _add(self, x: Tensor) -> None:
        x = x.detach()
        if x.device != self.moments.device:
            self.reset(self.moments.to(x.device))
        if x.dim() == 1:
            x = x.unsqueeze(0)
        channel_moments(x, eps=self.eps, channel_dim=self._dim(x), into=self.moments)

    def _remember(self, key: Any, x: Tensor) -> None:
        self._key, self._kernel, self._rest = key, None, ()
        if x.dim() < 2 or x.numel() == 0 or not self.moments.is_cpu:
            return
        launch = choose("channel_moments", x, x, self._dim(x))
        if launch.backend == "cpu" and launch.source is not None:
            self._kernel = backends.extension().channel_moments
            self._rest = (*launch.source, self.eps, 1, DTYPE_CODES[x.dtype], key[3])
