"""Any method behind a gate: only rows or tokens are changed that look like those that it was fitted to change."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit, TokenSets, check_choice, register, tokens_of
from pysteer.methods.row_gate import RowGate
from pysteer.methods.statistics import BayesPrecision
from pysteer.methods.wrapped import Wrapped
from pysteer.ops.linear_gate import KINDS

_SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "gda": {"weight": ("C", "D"), "bias": ("C",)},
    "ood": {"weight": ("1", "D"), "bias": ("1",), "factor": ("q", "D"), "scale": ("1",)},
    "min_max": {"weight": ("bounds", "D")},
}
_SLACK = 1e-5  # of a bound: a mean is not summed up in the same order when it is fitted and when it is gated


@register
@dataclass(frozen=True)
class Gated(Wrapped):
    """`y = x + g(x) (T(x) - x)` with T the method inside and g a gate on the site's own activation (op `linear_gate`).

    The gate is evaluated where the site runs, at every step, before the change; it never leaves the device.

    - "gda": the linear discriminant of `RowGate` between the source, the target and the negatives; open where
      P(source) >= threshold, or by that probability where the threshold is None.
    - "ood": open where the squared Mahalanobis distance to the source mean (Bayes precision) is at most its `quantile`
      over the source.
    - "min_max": open where every channel lies within the `1 - quantile` and the `quantile` of the source.

    Args:
        method, options: the method inside, see `Wrapped`.
        gate: "gda", "ood" or "min_max".
        per_token: a gate for every token, fitted on tokens; else one for every row from the mean over its tokens
            (those that count; new tokens of a running generation are a row of their own).
        threshold: of "gda", in (0, 1), or None.
        quantile: of "ood" and "min_max", above 0.5 up to 1; None for 0.95 and 1.
        negatives: "gate", negatives make the gate alone, or "both", they are given to the method as well.
    """

    name: ClassVar[str] = "gated"

    gate: str = "gda"
    per_token: bool = False
    threshold: float | None = 0.5
    quantile: float | None = None
    negatives: str = "gate"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("gate", self.gate, KINDS)
        check_choice("negatives of method gated", self.negatives, ("gate", "both"))
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise InputError("threshold of the gate", value=self.threshold, allowed="above 0 and below 1, or None")
        if self.quantile is not None and not 0.5 < self.quantile <= 1:
            raise InputError("quantile of the gate", value=self.quantile, allowed="above 0.5, up to 1")
        if any(name.startswith("gate.") for name in self.inner.shapes):
            raise InputError("method inside a gate", value=str(self.method), allowed="one that has no gate yet")

    @property
    def pooled(self) -> bool:
        return self.inner.pooled and not self.per_token

    @property
    def needs_rows(self) -> bool:
        return self.inner.needs_rows or self.inner.pooled == self.per_token

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return {**self.inner.shapes, **{f"gate.{name}": dims for name, dims in _SHAPES[self.gate].items()}}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
        rows: TokenSets | None = None,
    ) -> SiteFit:
        """See `Method.fit_site`; `rows` are the means of the rows, where they cannot be told from the tokens."""
        own = negatives if self.negatives == "both" else None
        fit = self.fit_inner(source, target, own, paired, seed, rows)
        sets = (source, target, negatives) if self.per_token or rows is None else rows
        given = [tokens_of(each, "gated", pooled=not self.per_token) for each in sets if each is not None]
        gate = {f"gate.{name}": tensor for name, tensor in self._fit_gate(given).items()}
        options: dict[str, Any] = {"gate.kind": self.gate, "gate.per_token": self.per_token}
        if self.gate == "gda":
            options["gate.threshold"] = self.threshold
        return SiteFit({**fit.tensors, **gate}, {**fit.options, **options}, fit.shared)

    def _fit_gate(self, classes: list[Tensor]) -> dict[str, Tensor]:
        """Tensors of `linear_gate`, from the source and what is to be told from it."""
        source = classes[0].double()
        if self.gate == "gda":
            gate = RowGate.fit(classes[0], classes[1:])
            return {"weight": gate.weight, "bias": gate.bias}
        if self.gate == "min_max":
            return {"weight": _bounds(source, 1.0 if self.quantile is None else self.quantile)}
        mean = source.mean(0)
        precision = BayesPrecision.fit(source - mean)
        distance = precision.squared_distance(source, mean)
        bound = distance.quantile(0.95 if self.quantile is None else self.quantile) * (1 + _SLACK)
        tensors = {"weight": mean[None], "bias": bound[None], "factor": precision.low_rank()}
        tensors["scale"] = source.new_tensor([precision.scale])
        return {name: tensor.float() for name, tensor in tensors.items()}


def _bounds(source: Tensor, quantile: float) -> Tensor:
    """Bounds `[2, D]` fp32 of every channel of `source` `[n, D]`, a little widened."""
    low, high = (torch.stack([column.quantile(q) for column in source.T]) for q in (1 - quantile, quantile))
    slack = _SLACK * (high - low + torch.maximum(low.abs(), high.abs()))
    return torch.stack((low - slack, high + slack)).float()
