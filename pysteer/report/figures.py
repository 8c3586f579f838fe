"""Figures of a steering run, drawn with matplotlib (Agg) and returned as PNG bytes.

Every figure exists in a light and a dark version, so that the report follows the reader's colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pysteer.errors import InputError
from pysteer.metrics.rates import Rate
from pysteer.report.drawn import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MplFigure

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, Theme] = ("light", "dark")


@dataclass(frozen=True)
class _Colours:
    surface: str
    ink: str
    soft: str
    grid: str
    target: str
    kept: str
    distance: str
    control: str


# Checked for contrast against their surface (>= 3:1 for marks, >= 4.5:1 for text) and told apart by position and
# marker as well as by hue.
_THEMES = {
    "light": _Colours("#ffffff", "#1c2126", "#5a636d", "#e3e6ea", "#1f6fcf", "#0b8569", "#7a4fc0", "#a7b0ba"),
    "dark": _Colours("#16191d", "#eceff2", "#a3adb8", "#2d333a", "#62a6f5", "#36c29c", "#b393f0", "#626c77"),
}


@dataclass(frozen=True)
class DosePoint:
    """One strength: rates of the target class and of the kept attribute, and the feature distance to the baseline."""

    strength: float
    target: Rate
    kept: Rate
    distance: float


@dataclass(frozen=True)
class DoseCurve:
    """The points of one kind of steering, and the strength chosen for the headline figures."""

    label: str
    points: Sequence[DosePoint]
    chosen: float | None = None


@dataclass(frozen=True)
class Bar:
    """One row of the comparison of settings; `kind` sets its colour."""

    label: str
    target: Rate
    kept: Rate
    kind: Literal["steered", "reference", "control"] = "steered"


def _new(rows: int, columns: int, size: tuple[float, float], colours: _Colours) -> tuple[MplFigure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, facecolor=colours.surface, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.4, 1.0][:rows]
    axes = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for axis in axes.flat:
        _style(axis, colours)
    return figure, axes


def _style(axis: Axes, colours: _Colours) -> None:
    axis.set_facecolor(colours.surface)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours.grid)
    axis.tick_params(colors=colours.soft, labelsize=8.5, length=0)
    axis.grid(axis="y", color=colours.grid, linewidth=0.7)
    axis.set_axisbelow(True)


def _rate(name: str, rate: Rate) -> dict[str, float]:
    """Columns of a rate in the table of a figure."""
    return {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}


def _line(axis: Axes, xs: list[float], rates: list[Rate], colour: str, marker: str, label: str) -> None:
    axis.fill_between(xs, [r.low for r in rates], [r.high for r in rates], color=colour, alpha=0.16, linewidth=0)
    axis.plot(xs, [r.value for r in rates], color=colour, marker=marker, markersize=4.5, linewidth=1.9, label=label)


def dose_response(
    curves: Sequence[DoseCurve],
    *,
    target_name: str,
    kept_name: str,
    ceiling: Rate | None = None,
    distance_name: str = "feature distance\nto baseline",
    theme: Theme = "light",
) -> bytes:
    """PNG of target rate, kept rate (both with Wilson bands) and feature distance against strength, a column a curve.

    `target_name` and `kept_name` name the two rates ("square", "colour kept"); `ceiling` draws the rate of the prompt
    swap as a dashed line; distances that are all NaN get no panel, `distance_name` says what they are. Raises
    `InputError` without points.
    """
    if not curves or any(not curve.points for curve in curves):
        raise InputError("dose-response curves", value=len(curves), allowed="at least one with points", fix="add some")
    colours = _THEMES[theme]
    far = [p.distance for c in curves for p in c.points if math.isfinite(p.distance)]
    rows = 2 if far else 1  # no panel for distances that were not measured
    figure, axes = _new(rows, len(curves), (3.1 + 3.3 * len(curves), 4.6 if far else 3.4), colours)
    for column, curve in enumerate(curves):
        top = axes[0, column]
        points = sorted(curve.points, key=lambda point: point.strength)
        xs = [point.strength for point in points]
        _line(top, xs, [point.kept for point in points], colours.kept, "s", kept_name)
        _line(top, xs, [point.target for point in points], colours.target, "o", target_name)
        if ceiling is not None:
            top.axhline(ceiling.value, color=colours.soft, linewidth=1.1, linestyle=(0, (4, 3)), label="prompt swap")
        if far:
            distances = [p.distance for p in points]
            axes[1, column].plot(xs, distances, color=colours.distance, marker="D", markersize=3.8, linewidth=1.7)
        if curve.chosen is not None:
            for axis in axes[:, column]:
                axis.axvline(curve.chosen, color=colours.soft, linewidth=0.9, alpha=0.7)
            top.annotate(
                "used", (curve.chosen, 1.045), xytext=(3, 0), textcoords="offset points", fontsize=8, color=colours.soft
            )
        top.set_title(curve.label, loc="left", fontsize=10.5, color=colours.ink, fontweight="bold")
        top.set_ylim(-0.03, 1.09)
        axes[-1, column].set_xlabel("strength", fontsize=9, color=colours.soft)
    axes[0, 0].set_ylabel("share of images", fontsize=9, color=colours.soft)
    if far:
        axes[1, 0].set_ylim(0, 1.12 * max(far) or 1.0)
        axes[1, 0].set_ylabel(distance_name, fontsize=9, color=colours.soft)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    order = [1, 0, *range(2, len(labels))]
    named = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(*named, loc="outside right upper", frameon=False, fontsize=9, labelcolor=colours.ink)
    return drawn(figure, [
        {"curve": curve.label, "strength": point.strength, **_rate("target", point.target), **_rate("kept", point.kept),
         "feature_distance": point.distance, "used": point.strength == curve.chosen}
        for curve in curves for point in sorted(curve.points, key=lambda point: point.strength)
    ])  # fmt: skip


def control_bars(bars: Sequence[Bar], *, target_name: str, kept_name: str, theme: Theme = "light") -> bytes:
    """PNG with one bar a setting: target rate with its Wilson interval, and the kept rate as a diamond."""
    if not bars:
        raise InputError("bars", value=0, allowed="at least one setting", fix="add some")
    colours = _THEMES[theme]
    fill = {"steered": colours.target, "reference": colours.soft, "control": colours.control}
    figure, axes = _new(1, 1, (7.6, 0.9 + 0.36 * len(bars)), colours)
    axis = axes[0, 0]
    axis.grid(False, axis="y")
    axis.grid(axis="x", color=colours.grid, linewidth=0.7)
    rows = list(range(len(bars)))[::-1]
    for row, bar in zip(rows, bars, strict=True):
        value = 0.0 if math.isnan(bar.target.value) else bar.target.value
        axis.barh(row, value, height=0.58, color=fill[bar.kind], zorder=2)
        if bar.target.total:
            axis.plot([bar.target.low, bar.target.high], [row, row], color=colours.ink, linewidth=1.3, zorder=4)
        axis.plot(bar.kept.value, row, marker="D", markersize=5.5, color=colours.kept, zorder=5, clip_on=False,
                  markeredgecolor=colours.surface, markeredgewidth=1.0)  # fmt: skip
        axis.text(1.05, row, f"{100 * value:.1f} %", va="center", ha="left", fontsize=8.5, color=colours.ink)
    axis.set_yticks(rows, [bar.label for bar in bars], fontsize=9)
    for tick, bar in zip(axis.get_yticklabels(), bars, strict=True):
        tick.set_color(colours.ink)
        tick.set_fontweight("bold" if bar.kind == "steered" else "normal")
    axis.set_xlim(0, 1.0)
    axis.set_ylim(-0.6, len(bars) - 0.4)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_title(
        f"bar: {target_name} (line: 95 % interval)   \N{BLACK DIAMOND}: {kept_name}",
        loc="left",
        fontsize=9,
        color=colours.soft,
    )
    return drawn(figure, [
        {"setting": bar.label, "kind": bar.kind, **_rate("target", bar.target), **_rate("kept", bar.kept)}
        for bar in bars
    ])  # fmt: skip
