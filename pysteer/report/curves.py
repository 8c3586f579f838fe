"""Curves of a text experiment: how often a concept appears, and what that costs in perplexity, against the strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pysteer.errors import InputError
from pysteer.metrics.rates import Rate
from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, Theme, _line, _new, _rate


@dataclass(frozen=True)
class CostPoint:
    """One strength: the rate with its interval, and the cost with its own (low, value, high)."""

    strength: float
    rate: Rate
    cost: tuple[float, float, float]


@dataclass(frozen=True)
class CostCurve:
    """The points of one method, ascending in strength; `chosen` is the strength that was taken."""

    label: str
    points: Sequence[CostPoint]
    chosen: float | None = None


def rate_and_cost(
    curves: Sequence[CostCurve], *, rate_name: str, cost_name: str, limit: float, theme: Theme = "light"
) -> bytes:
    """PNG with a column per curve: the rate above, the cost below with a dashed line at `limit`, bands of 95 %.

    Raises `InputError` without points.
    """
    if not curves or any(not curve.points for curve in curves):
        raise InputError("curves", value=len(curves), allowed="at least one with points", fix="add some")
    colours = _THEMES[theme]
    figure, axes = _new(2, len(curves), (1.6 + 2.3 * len(curves), 4.4), colours)
    top_cost = 2.0 * limit
    for column, curve in enumerate(curves):
        top, bottom = axes[0, column], axes[1, column]
        points = sorted(curve.points, key=lambda point: point.strength)
        xs = [point.strength for point in points]
        _line(top, xs, [point.rate for point in points], colours.target, "o", rate_name)
        low, middle, high = zip(*(tuple(min(c, 10 * top_cost) for c in point.cost) for point in points), strict=True)
        bottom.fill_between(xs, low, high, color=colours.distance, alpha=0.16, linewidth=0)
        bottom.plot(xs, middle, color=colours.distance, marker="D", markersize=3.8, linewidth=1.7, label=cost_name)
        bottom.axhline(limit, color=colours.soft, linewidth=1.1, linestyle=(0, (4, 3)))
        for axis in (top, bottom):
            if curve.chosen is not None and math.isfinite(curve.chosen):
                axis.axvline(curve.chosen, color=colours.soft, linewidth=0.9, alpha=0.7)
        top.set_title(curve.label, loc="left", fontsize=9.5, color=colours.ink, fontweight="bold")
        top.set_ylim(-0.03, 1.05)
        bottom.set_ylim(0.0, top_cost)
        bottom.set_xlabel("strength", fontsize=8.5, color=colours.soft)
    axes[0, 0].set_ylabel(rate_name, fontsize=9, color=colours.soft)
    # The lower row is short: a name of several parts takes a line for each.
    axes[1, 0].set_ylabel(cost_name.replace(", ", ",\n"), fontsize=9, color=colours.soft)
    return drawn(figure, [
        {"curve": curve.label, "strength": point.strength, **_rate("rate", point.rate), "cost": point.cost[1],
         "cost_low": point.cost[0], "cost_high": point.cost[2], "used": point.strength == curve.chosen}
        for curve in curves for point in sorted(curve.points, key=lambda point: point.strength)
    ])  # fmt: skip
