"""Running moments of one point on its device; in eager code on a CPU a call is one call of the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysteer.ops import backends
from pysteer.ops.channel_moments import channel_moments, empty_moments
from pysteer.ops.declare import transformed
from pysteer.ops.launch import choose
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.prepared import kept_calls


def _never(x: Tensor) -> bool:
    return False


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

    __slots__ = ("_again", "_empty", "_kept", "channel_dim", "eps", "moments", "touched")

    def __init__(self, width: int, eps: float, channel_dim: int | None, device: torch.device) -> None:
        self.eps, self.channel_dim = eps, channel_dim
        self._empty: Tensor | None = None
        self._kept: Any = None
        self._again: Callable[[Tensor], bool] = _never
        if (extension := kept_calls()) is not None:
            self._kept = extension.Additions()
            self._again = extension.Additions.function(self._kept)
        self.reset(empty_moments(width, device))
        self.touched = False

    def reset(self, moments: Tensor) -> None:
        """Go on from these moments, `[8, D]` fp64 contiguous."""
        self.moments, self.touched = moments, True
        if self._kept is not None:
            self._kept.forget()

    def clear(self) -> None:
        """Start again from nothing."""
        if self._empty is None or self._empty.device != self.moments.device:
            self._empty = empty_moments(self.moments.shape[1], self.moments.device)
        self.moments.copy_(self._empty)
        self.touched = False

    def add(self, x: Tensor) -> None:
        """Add the values of an activation, without waiting for its device.

        A call of the compiled kernel is made again as it was while shape, strides, dtype, threads and backends stay the
        same; a lookup through the operator registry takes longer than a small activation.
        """
        self.touched = True
        if torch.compiler.is_compiling() or not self._again(x):
            self._add(x)

    def _dim(self, x: Tensor) -> int:
        return self.channel_dim if self.channel_dim is not None else 1 if x.dim() >= 4 else -1

    def _add(self, x: Tensor) -> None:
        x = x.detach()
        if x.device != self.moments.device:
            self.reset(self.moments.to(x.device))
        if x.dim() == 1:
            x = x.unsqueeze(0)
        channel_moments(x, eps=self.eps, channel_dim=self._dim(x), into=self.moments)
        if not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu and not transformed():
            self._keep(x)

    def _keep(self, x: Tensor) -> None:
        if self._kept is None or x.dim() < 2 or x.numel() == 0 or not self.moments.is_cpu:
            return
        launch = choose("channel_moments", x, x, self._dim(x))
        if launch.backend == "cpu" and launch.source is not None:
            places = (x.data_ptr(), self.moments.data_ptr())
            how = (self.eps, 1, DTYPE_CODES[x.dtype], torch.get_num_threads())
            self._kept.keep(x, backends.extension().channel_moments_packed, (*places, *launch.source, *how))
