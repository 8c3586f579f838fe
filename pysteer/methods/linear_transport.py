"""Linear transport: one gain for the whole activation and a bias per unit."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit, register
from pysteer.methods.unit_map import UnitMap


@register
@dataclass(frozen=True)
class LinearTransport(UnitMap):
    """`y = x + s ((a - 1) x + b)` with one number `a`, the least-squares slope of paired samples, and `b` per unit.

    `a = sum(xc yc) / sum(xc xc)` over all samples and units, `xc` and `yc` centred per unit, and `b = mean(y) - a
    mean(x)`. A source that does not vary gets a = 1. The published code divides by `sum(yc yc)`, which inverts the
    slope (y = 2 x + 1 gives 0.5).

    Args:
        pooled: fit on the mean over the tokens of each row, as published.
        published_slope: divide as the published code does.
    """

    name: ClassVar[str] = "linear_transport"

    pooled: bool = True
    published_slope: bool = False

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; only pairs have a slope."""
        if not paired:
            raise InputError("samples of linear_transport", value="unpaired", allowed="pairs", fix="use linear_act")
        return super().fit_site(source, target, negatives=negatives, paired=paired, seed=seed)

    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnitMap.fit_units`."""
        x, y = source.double(), target.double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        over = (y if self.published_slope else x).square().sum()
        gain = torch.where(over > 0, (x * y).sum() / torch.where(over > 0, over, 1.0), 1.0)
        return gain.expand_as(mean_x).float().contiguous(), (mean_y - gain * mean_x).float()
