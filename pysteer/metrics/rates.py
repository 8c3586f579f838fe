"""Rates of yes/no outcomes with intervals.

Every rate of a report carries a Wilson interval; a rate relative to the unsteered one, measured on the same prompts,
carries the interval of Bonett and Price for a ratio of paired proportions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pysteer.errors import InputError

Mask = NDArray[Any] | torch.Tensor | list[bool]


@dataclass(frozen=True)
class Rate:
    """A share of yes outcomes. `value`, `low` and `high` are fractions; `total` is the number of outcomes."""

    value: float
    low: float
    high: float
    total: int

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.total}

    def __str__(self) -> str:
        if self.total == 0:
            return "not measured"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _critical(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise InputError("confidence", value=confidence, allowed="between 0 and 1", fix="use 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _wilson(successes: float, total: float, z: float) -> tuple[float, float]:
    p = successes / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # The exact ends are 0 and 1 there; rounding would leave 1e-17 or 1 - 1e-16.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == total else min(1.0, (centre + half) / scale)
    return low, high


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): low and high end, as fractions.

    Raises `InputError` if `total` < 1 or `successes` is not in 0..total.
    """
    if total < 1 or not 0 <= successes <= total:
        raise InputError(
            "successes of total",
            value=f"{successes} of {total}",
            allowed="0 <= successes <= total, total >= 1",
            fix="count the outcomes before asking for an interval",
        )
    return _wilson(successes, total, _critical(confidence))


def _mask(values: Mask, name: str) -> NDArray[np.bool_]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype != np.bool_ and array.size):
        raise InputError(
            name, value=f"{array.dtype}{list(array.shape)}", allowed="a 1-d boolean array", fix="compare labels first"
        )
    return array.astype(np.bool_)


def rate(hits: Mask, confidence: float = 0.95) -> Rate:
    """Share of true values in `hits` [N] bool with its Wilson interval. An empty `hits` gives NaN with total 0."""
    array = _mask(hits, "hits")
    if array.size == 0:
        return Rate(math.nan, math.nan, math.nan, 0)
    successes = int(array.sum())
    low, high = wilson(successes, array.size, confidence)
    return Rate(successes / array.size, low, high, array.size)


def relative_rate(steered: Mask, baseline: Mask, confidence: float = 0.95) -> Rate:
    """Rate of `steered` [N] bool divided by the rate of `baseline` [N] bool, row i being the same prompt in both.

    Interval: hybrid Wilson score interval for a ratio of paired proportions (Bonett and Price, "Confidence intervals
    for a ratio of binomial proportions based on paired data", Statistics in Medicine 2006). NaN when the baseline has
    no true value. Raises `InputError` when the two differ in length.
    """
    one, zero = _mask(steered, "steered"), _mask(baseline, "baseline")
    if one.size != zero.size:
        raise InputError(
            "rows of steered and baseline",
            value=f"{one.size} and {zero.size}",
            allowed="the same prompts in both",
            fix="pass the outcomes of the same prompts in the same order",
        )
    x1, x0, both = int(one.sum()), int(zero.sum()), int((one & zero).sum())
    if x0 == 0:
        return Rate(math.nan, math.nan, math.nan, one.size)
    only1, only0 = x1 - both, x0 - both
    n = both + only1 + only0
    p1, p0 = (x1 + 1) / (n + 2), (x0 + 1) / (n + 2)
    joint = math.sqrt((only1 + only0 + 2) / ((x1 + 1) * (x0 + 1)))
    single = math.sqrt((1 - p1) / (x1 + 1)) + math.sqrt((1 - p0) / (x0 + 1))
    z = _critical(confidence) * joint / single
    low1, high1 = _wilson(x1, n, z)
    low0, high0 = _wilson(x0, n, z)
    return Rate(x1 / x0, low1 / high0, high1 / low0 if low0 > 0 else math.inf, one.size)
