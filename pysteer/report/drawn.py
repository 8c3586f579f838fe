"""A drawn figure in the three forms that are kept: PNG, SVG, and what it shows as CSV.

Every figure of a recipe ends in `drawn`; `files.write_bytes` puts all three beside each other.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MplFigure


class Drawn(bytes):
    """PNG bytes of a figure that can be had as SVG and as a table besides.

    Attributes:
        figure: the figure.
        rows: what it shows, a dict per point; empty where the data lies in a file of its own.
    """

    figure: MplFigure
    rows: Sequence[Mapping[str, Any]]

    def svg(self) -> bytes:
        """The figure as SVG, drawn when it is asked for; words stay words."""
        from matplotlib import rc_context

        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "pysteer", "svg.fonttype": "none"}):
            colour = self.figure.get_facecolor()
            self.figure.savefig(buffer, format="svg", facecolor=colour, metadata={"Date": None, "Creator": "pysteer"})
        return buffer.getvalue()

    def csv(self) -> bytes:
        """The rows as CSV with a heading; empty without rows."""
        from pysteer.recipes.flat import csv_text

        return csv_text([dict(row) for row in self.rows]).encode("utf-8") if self.rows else b""


def drawn(
    figure: MplFigure, rows: Sequence[Mapping[str, Any]] | None = None, dpi: float | None = None, tight: bool = False
) -> Drawn:
    """Draw a figure.

    Args:
        figure: of matplotlib.
        rows: what it shows; None reads lines, points and bars off the figure.
        dpi: dots per inch, the figure's own when None.
        tight: cut the margins off.
    """
    buffer = io.BytesIO()
    # A fixed Software tag: the bytes must not change with the matplotlib version string.
    figure.savefig(
        buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": "pysteer"},
        dpi="figure" if dpi is None else dpi, bbox_inches="tight" if tight else None,
    )  # fmt: skip
    made = Drawn(buffer.getvalue())
    made.figure = figure
    made.rows = list(shown_rows(figure)) if rows is None else rows
    return made


def shown_rows(figure: MplFigure) -> Iterator[dict[str, Any]]:
    """What lines, points and bars of a figure show: panel, series, x, y. Pictures and colour bars are left out."""
    for number, axis in enumerate(figure.axes, start=1):
        panel = axis.get_title(loc="left") or axis.get_title() or axis.get_ylabel() or f"panel {number}"
        if axis.get_label() != "<colorbar>":
            for series, points in _series(axis):
                for x, y in points:
                    yield {"panel": panel, "series": series, axis.get_xlabel() or "x": x, axis.get_ylabel() or "y": y}


def _series(axis: Axes) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    for line in axis.get_lines():
        if line.get_transform() == axis.transData:  # a line across the axes is no data
            yield _name(line), list(zip(_plain(line.get_xdata()), _plain(line.get_ydata()), strict=True))
    for points in axis.collections:
        if type(points).__name__ == "PathCollection":
            yield _name(points), [(float(x), float(y)) for x, y in _plain(points.get_offsets())]
    for bars in axis.containers:
        patches = [patch for patch in bars if hasattr(patch, "get_width")]
        if patches and getattr(bars, "orientation", "vertical") == "vertical":
            yield _name(bars), [(patch.get_x() + patch.get_width() / 2, patch.get_height()) for patch in patches]
        elif patches:
            yield _name(bars), [(patch.get_width(), patch.get_y() + patch.get_height() / 2) for patch in patches]


def _name(artist: Any) -> str:
    label = str(artist.get_label())
    return "" if label.startswith("_") else label


def _plain(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
