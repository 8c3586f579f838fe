"""Differences between two conditions over the same seeds: interval, paired t-test, exact sign-flip test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pysteer.errors import InputError

_MOST_EXACT = 16  # pairs of which all 2^n sign patterns are tried


@dataclass(frozen=True)
class Paired:
    """A difference b - a over pairs.

    Attributes:
        pairs: their number n.
        first, second: means of a and b.
        difference: mean of b - a.
        low, high: its 95 % interval of Student's t with n - 1 degrees of freedom; NaN for one pair.
        p_t: two-sided p of the paired t-test.
        p_signs: two-sided p of the exact sign-flip test; cannot be below 2 / 2^n.
    """

    pairs: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_t: float
    p_signs: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def student_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t, whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, freedom - 1, 2):
            total += term
            term *= square * (k + 1) / (k + 2)
        inside = sine * total
    return max(0.0, 1 - inside)


def student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - confidence else (low, middle)
    return high


def compare_pairs(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Paired:
    """Compare `second` with `first`, pair by pair.

    Raises:
        InputError: different lengths, or nothing.
    """
    if len(first) != len(second) or not first:
        raise InputError(
            "pairs to compare", value=f"{len(first)} and {len(second)}", allowed="equal counts, at least 1"
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    means = math.fsum(first) / n, math.fsum(second) / n
    if n == 1:
        return Paired(1, *means, mean, math.nan, math.nan, math.nan, math.nan)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = student_quantile(confidence, n - 1) * error
    tail = student_tail(mean / error, n - 1) if error else float(mean == 0)
    return Paired(n, *means, mean, mean - half, mean + half, tail, _sign_flips(differences))


def _sign_flips(differences: Sequence[float]) -> float:
    """Share of sign patterns whose sum is at least as far from 0 as the one seen; NaN where there are too many."""
    if len(differences) > _MOST_EXACT:
        return math.nan
    seen = abs(math.fsum(differences)) * (1 - 1e-12)
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    return sum(value >= seen for value in sums) / len(sums)
