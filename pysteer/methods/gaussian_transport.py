"""Optimal transport between two Gaussians per unit, and its shift alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pysteer.methods.base import SiteFit, register
from pysteer.methods.unit_map import ALL, UnitMap, check_moments, check_std_eps, check_support, range_of
from pysteer.ops.channel_moments import ChannelMoments


@register
@dataclass(frozen=True)
class GaussianTransport(UnitMap):
    """`y = x + s (T(x) - x)` with `T(x) = (sigma_t / sigma_s) (x - mu_s) + mu_t` per unit.

    The optimal transport map between the Gaussians that have the means and unbiased standard deviations of source and
    target. Units of which either does not vary are left alone.

    Args:
        only_mean: shift by `mu_t - mu_s` and leave the scale ("mean transport").
        support: range of source values that is moved, "all" (as published) or percentages such as "0-100". On maps the
            range is that of the spatial mean, and decides about all pixels of the unit, as published.
        pooled: fit on the mean over the tokens of each row, as published.
        std_eps: units whose source or target has a standard deviation of at most this are left alone.
    """

    name: ClassVar[str] = "gaussian_transport"

    only_mean: bool = False
    support: str = ALL
    pooled: bool = True
    std_eps: float = 1e-4

    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_support(self.support)
        check_std_eps(self.std_eps)

    def options_of_layout(self, layout: str) -> dict[str, Any]:
        """See `Method.options_of_layout`."""
        return {"bounds_of_mean": True} if layout == "channels" and self.support != ALL else {}

    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnitMap.fit_units`."""
        x, y = source.double(), target.double()
        return self._map(x.mean(0), x.std(0), y.mean(0), y.std(0))

    def fit_moments(self, source: ChannelMoments, target: ChannelMoments) -> SiteFit:
        """See `Method.fit_moments`; the support can be "all" or "0-100", which is the range."""
        check_moments(self, source, target)
        gain, bias = self._map(source.mean, source.std(), target.mean, target.std())
        return SiteFit({"gain": gain, "bias": bias, **range_of(source, self.support)}, dict(self.options()))

    def _map(self, mean_x: Tensor, std_x: Tensor, mean_y: Tensor, std_y: Tensor) -> tuple[Tensor, Tensor]:
        alive = (std_x > self.std_eps) & (std_y > self.std_eps)
        one = torch.ones_like(mean_x)
        gain = one if self.only_mean else torch.where(alive, std_y / torch.where(alive, std_x, one), one)
        bias = torch.where(alive, mean_y - gain * mean_x, 0.0)
        return gain.float(), bias.float()
