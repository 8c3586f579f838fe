"""A heatmap of rates, with the numbers in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, Theme, _new


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    title: str,
    theme: Theme = "light",
) -> bytes:
    """PNG of rates in [0, 1], one line per row; the numbers in the cells are per cent.

    Args:
        values: `[rows][columns]`; NaN leaves a cell empty.
        rows, columns: names.
        x: what the columns are.
        title: over the map.
        theme: "light" or "dark".
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = _THEMES[theme]
    figure, axes = _new(1, 1, (1.6 + 0.62 * len(columns), 1.1 + 0.42 * len(rows)), colours)
    axis = axes[0, 0]
    axis.grid(visible=False)
    shades = LinearSegmentedColormap.from_list("rate", [colours.grid, colours.target])
    axis.imshow(values, cmap=shades, vmin=0.0, vmax=1.0, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value != value:  # there is no such place
                continue
            ink = colours.surface if value > 0.5 else colours.ink
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    crowded = max(map(len, columns), default=0) > 8  # names that would run into each other stand at an angle
    angle: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axis.set_xticks(range(len(columns)), columns, **angle)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel(x, color=colours.soft, fontsize=9)
    axis.set_title(title, color=colours.ink, fontsize=10, loc="left")
    return drawn(figure, [
        {"row": row, x: column, "rate": value}
        for row, line in zip(rows, values, strict=True)
        for column, value in zip(columns, line, strict=True)
        if value == value
    ])  # fmt: skip
