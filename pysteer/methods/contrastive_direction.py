"""One direction that tells two sets of activations apart, and what to do along it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.along import APPLY, change_along, op_along, shapes_along
from pysteer.methods.base import Method, SiteFit, check_choice, check_pair, register, tokens_of
from pysteer.methods.statistics import BayesPrecision

DIRECTIONS = ("mean", "pca_diff", "pca_center", "lda")
UNITS = ("gap", "sigma", "one")


@register
@dataclass(frozen=True)
class ContrastiveDirection(Method):
    """Adds to, erases, keeps alone or replaces the component along one direction `u` of length 1.

    Directions, all pointing from source to target:
    - `mean`: the difference of the class means.
    - `pca_diff`: first principal component of the paired differences, which PCA centres: how the differences vary.
    - `pca_center`: first principal component of all samples, each pair around its own middle (of unpaired data around
      the middle of the class means). Both as in repeng.
    - `lda`: a linear probe in closed form, `P (mean(target) - mean(source))` with the Bayes precision P of the samples
      around their class means.

    Changes, see `pysteer.methods.along.change_along`: `add`, `erase`, `project`, and `replace`, which sets the
    component to that of the target mean.

    Args:
        direction: "mean", "pca_diff", "pca_center" or "lda".
        apply: "add", "erase", "project" or "replace".
        unit: what strength 1 of "add" is: "gap" moves the source mean to the target mean along u, "sigma" moves by one
            standard deviation within the classes along u, "one" by 1.
        pooled: fit on the mean over the tokens of each row.
    """

    name: ClassVar[str] = "contrastive_direction"

    direction: str = "mean"
    apply: str = "add"
    unit: str = "gap"
    pooled: bool = True

    def __post_init__(self) -> None:
        check_choice("direction of contrastive_direction", self.direction, DIRECTIONS)
        check_choice("change along a direction", self.apply, APPLY)
        check_choice("unit of contrastive_direction", self.unit, UNITS)

    @property
    def op(self) -> str:
        return op_along(self.apply)

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return shapes_along(self.apply)

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; the result does not depend on `seed`."""
        if negatives is not None:
            raise InputError("negatives with contrastive_direction", allowed="none", fix="use a gate")
        x = tokens_of(source, "source", pooled=self.pooled)
        y = tokens_of(target, "target", pooled=self.pooled)
        check_pair(x, y, None, paired)
        x, y = x.double(), y.double()
        unit = self._unit(x, y, paired)
        if self.apply == "replace":
            return change_along(unit, self.apply, float(y.mean(0) @ unit))
        length = 1.0
        if self.apply == "add" and self.unit != "one":
            length = float((y.mean(0) - x.mean(0)) @ unit) if self.unit == "gap" else _sigma(x, y, unit)
        return change_along(length * unit, self.apply)

    def _unit(self, x: Tensor, y: Tensor, paired: bool) -> Tensor:
        """The direction, of length 1 and from source to target."""
        gap = y.mean(0) - x.mean(0)
        if self.direction == "mean":
            found = gap
        elif self.direction == "lda":
            found = BayesPrecision.fit(torch.cat((x - x.mean(0), y - y.mean(0)))).apply(gap)
        elif self.direction == "pca_center":
            middle = (x + y) / 2 if paired else (x.mean(0) + y.mean(0)) / 2
            found = first_component(torch.cat((x - middle, y - middle)))
        elif paired:
            found = first_component(y - x)
        else:
            raise InputError("samples of direction pca_diff", value="unpaired", allowed="pairs", fix="use pca_center")
        if not bool(found.any()):
            raise InputError(
                f"direction {self.direction}", value="samples that do not differ", allowed="samples that do"
            )
        found = found / found.norm()
        along = found @ gap
        turned = along < 0 if along != 0 else found[found.abs().argmax()] < 0
        return -found if bool(turned) else found


def _sigma(x: Tensor, y: Tensor, unit: Tensor) -> float:
    """Standard deviation within the classes along `unit`."""
    away = torch.cat(((x - x.mean(0)) @ unit, (y - y.mean(0)) @ unit))
    return float((away.square().sum() / max(len(away) - 2, 1)).sqrt())


def first_component(samples: Tensor) -> Tensor:
    """First principal component `[D]` of `samples` `[n, D]` fp64, of length 1; zeros where nothing varies."""
    away = samples - samples.mean(0)
    few = len(away) < away.shape[1]
    values, vectors = torch.linalg.eigh(away @ away.T if few else away.T @ away)
    if not bool(values[-1] > 0):
        return torch.zeros_like(away[0])
    found = away.T @ vectors[:, -1] if few else vectors[:, -1]
    return found / found.norm()
