"""One constant vector per site and step: the difference of the class means."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.methods.base import SiteFit, register
from pysteer.methods.unit_map import UnitMap, check_moments
from pysteer.ops.channel_moments import ChannelMoments


@register
@dataclass(frozen=True)
class MeanDifference(UnitMap):
    """`y = x + s v` with `v = mean(target) - mean(source)`, the same for every token (op `affine_shift`, gain 1).

    Args:
        pooled: average each row over its tokens before the class mean. It matters only where rows have different
            numbers of tokens: pooled rows count equally, unpooled tokens do.
    """

    name: ClassVar[str] = "mean_difference"

    pooled: bool = False

    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnitMap.fit_units`."""
        bias = (target.double().mean(0) - source.double().mean(0)).float()
        return torch.ones_like(bias), bias

    def fit_moments(self, source: ChannelMoments, target: ChannelMoments) -> SiteFit:
        """See `Method.fit_moments`."""
        check_moments(self, source, target)
        bias = (target.mean - source.mean).float()
        return SiteFit({"gain": torch.ones_like(bias), "bias": bias}, {})
