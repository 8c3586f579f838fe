"""AurA: dampen the units that tell the source from the target."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.methods.base import register
from pysteer.methods.unit_map import UnitMap


@register
@dataclass(frozen=True)
class AurA(UnitMap):
    """`y = x + s (alpha - 1) x` per unit with `alpha = 1 - 2 (AUROC - 0.5)` where the AUROC is above 0.5, else 1.

    Suau et al. 2024 ("Whispering experts"). The AUROC is that of the unit as a detector of the source: a unit that
    separates source from target perfectly is switched off at strength 1.

    Args:
        pooled: rate each row by the mean over its tokens.
    """

    name: ClassVar[str] = "aura"

    pooled: bool = True

    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnitMap.fit_units`."""
        gain = (1 - 2 * (auroc(source, target) - 0.5).clamp_min(0)).float()
        return gain, torch.zeros_like(gain)


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """Area under the ROC curve of every unit, fp64 `[D]`: the probability that a positive sample `[n, D]` lies above a
    negative one `[m, D]`, ties counting half."""
    ordered = negative.T.contiguous().sort(dim=1).values
    values = positive.T.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double().mean(1) / (2 * negative.shape[0])
