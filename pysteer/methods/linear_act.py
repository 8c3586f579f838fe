"""Linear-AcT: an affine map per unit that carries the source distribution to the target distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pysteer.methods.base import register
from pysteer.methods.unit_map import UnitMap, check_std_eps, check_support


@register
@dataclass(frozen=True)
class LinearAcT(UnitMap):
    """`y = x + s ((w - 1) x + b)` per unit, where `w x + b` is the least-squares line through the sorted samples.

    Linear-AcT of Rodriguez et al. 2024 ("Controlling language and diffusion models by transporting activations"): in
    one dimension the optimal transport map pairs equal quantiles, so sorted source and target samples are regressed on
    each other. Source and target need not be pairs, nor as many: quantiles are then interpolated. A unit whose source
    does not vary gets w = 1, the shift of its mean.

    Args:
        support: range of source values that is moved, "all" or percentages of the source such as "0-100" (the
            published default); values outside are left alone. With `pooled` the range is that of the pooled samples, as
            published, which is narrower than that of the tokens it is applied to.
        pooled: fit on the mean over the tokens of each row, as published.
        std_eps: units whose source has a standard deviation below this are taken as constant.
        of_mean: shift all tokens or pixels by what their mean is moved by; None for maps `[R, D, H, W]` alone, as
            published for convolutions.
    """

    name: ClassVar[str] = "linear_act"

    support: str = "0-100"
    pooled: bool = True
    std_eps: float = 1e-4
    of_mean: bool | None = None

    def __post_init__(self) -> None:
        check_support(self.support)
        check_std_eps(self.std_eps)

    def options(self) -> dict[str, bool]:
        """See `UnitMap.options`."""
        return {"of_mean": True} if self.of_mean else {}

    def options_of_layout(self, layout: str) -> dict[str, Any]:
        """See `Method.options_of_layout`."""
        return {"of_mean": True} if self.of_mean is None and layout == "channels" else {}

    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnitMap.fit_units`."""
        return line_through_quantiles(source, target, self.std_eps)


def line_through_quantiles(source: Tensor, target: Tensor, std_eps: float) -> tuple[Tensor, Tensor]:
    """Gain and bias `[D]` fp32 of the least-squares line from sorted `source` `[n, D]` to sorted `target` `[m, D]`."""
    count = max(len(source), len(target))
    x, y = _quantiles(source, count), _quantiles(target, count)
    mean_x, mean_y = x.mean(0), y.mean(0)
    variance = (x - mean_x).square().mean(0)
    alive = variance > std_eps**2
    covariance = ((x - mean_x) * (y - mean_y)).mean(0)
    gain = torch.where(alive, covariance / torch.where(alive, variance, 1.0), 1.0)
    return gain.float(), (mean_y - gain * mean_x).float()


def _quantiles(samples: Tensor, count: int) -> Tensor:
    """`count` evenly spaced quantiles per unit, fp64 `[count, D]`: the sorted samples when there are as many."""
    ordered = samples.double().sort(dim=0).values
    if len(ordered) == count:
        return ordered
    place = torch.linspace(0, len(ordered) - 1, count, dtype=torch.float64, device=samples.device)
    below = place.floor().long().clamp_max(max(len(ordered) - 2, 0))
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (place - below)[:, None])
