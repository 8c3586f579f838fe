"""Line charts as SVG, drawn on the server: every point is a link, works by keyboard, and has its figures as title."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from pysteer.app.tables import Point

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 64, 16, 26, 46
SERIES = 8  # classes s0..s7 of the style sheet


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: its name.
        points: in drawing order.
        band: whether intervals are drawn as a band (of y).
        joined: whether a line joins the points.
        labels: text beside the points, where there is any.
    """

    label: str
    points: Sequence[Point]
    band: bool = True
    joined: bool = True
    labels: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values across the range."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale over finite values; a little room where all are equal."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-12 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, start, end)


def line_chart(
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    title: str,
    link: Callable[[Line, Point], str] | None = None,
    marks: Mapping[float, str] | None = None,
    here: float | tuple[float, float] | None = None,
) -> str:
    """SVG text of lines with bands.

    Args:
        lines: what to draw.
        x_name, y_name: names of the axes.
        title: what it shows, for readers who do not see it.
        link: address behind a point.
        marks: x -> word, drawn as vertical lines.
        here: x of the current place, a stronger vertical line; x and y of it, a ring.
    """
    points = [point for line in lines for point in line.points]
    across = scale([p.x for p in points] + list(marks or {}), LEFT, WIDTH - RIGHT)
    up = scale([v for p in points for v in (p.value, p.low, p.high)], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label={quoteattr(title)}>',
        f"<title>{escape(title)}</title>",
    ]
    parts += _axes(across, up, x_name, y_name)
    for x, word in (marks or {}).items():
        parts.append(f'<line class="mark" x1="{across(x)}" x2="{across(x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        edge, shift = (" end", -4) if across(x) > WIDTH - 80 else ("", 4)
        parts.append(f'<text class="tick{edge}" x="{across(x) + shift}" y="{TOP + 10}">{escape(word)}</text>')
    if isinstance(here, tuple):
        parts.append(f'<circle class="here" cx="{across(here[0])}" cy="{up(here[1])}" r="10"/>')
    elif here is not None:
        parts.append(f'<line class="here" x1="{across(here)}" x2="{across(here)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for number, line in enumerate(lines):
        parts += _line(line, number % SERIES, across, up, x_name, y_name, link)
    return "".join([*parts, "</svg>", _legend(lines)])


def _axes(across: Scale, up: Scale, x_name: str, y_name: str) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4}">{value:.4g}</text>')
    below = HEIGHT - BOTTOM + 18
    parts += [f'<text class="tick middle" x="{across(v)}" y="{below}">{v:.4g}</text>' for v in across.ticks(8)]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name middle" x="{middle}" y="{HEIGHT - 6}">{escape(x_name)}</text>')
    parts.append(f'<text class="name" x="4" y="{TOP - 12}">{escape(y_name)}</text>')
    return parts


def _line(
    line: Line, colour: int, across: Scale, up: Scale, x_name: str, y_name: str,
    link: Callable[[Line, Point], str] | None,
) -> list[str]:  # fmt: skip
    points = [p for p in line.points if math.isfinite(p.x) and math.isfinite(p.value)]
    parts = []
    if line.band and len(points) > 1:
        there = " ".join(f"{across(p.x)},{up(p.high)}" for p in points)
        back = " ".join(f"{across(p.x)},{up(p.low)}" for p in reversed(points))
        parts.append(f'<polygon class="band s{colour}" points="{there} {back}"/>')
    elif line.band:
        parts += [f'<line class="stroke s{colour}" x1="{across(p.x)}" x2="{across(p.x)}" y1="{up(p.low)}" '
                  f'y2="{up(p.high)}"/>' for p in points]  # fmt: skip
    if line.joined and len(points) > 1:
        path = " ".join(f"{across(p.x)},{up(p.value)}" for p in points)
        parts.append(f'<polyline class="stroke s{colour}" points="{path}"/>')
    for i, point in enumerate(points):
        words = f"{line.label + ': ' if line.label else ''}{y_name} {point.value:.4g}"
        if line.band:
            words += f" [{point.low:.4g}, {point.high:.4g}]"
        extra = line.labels[i] if i < len(line.labels) else f"{x_name} {point.x:.4g}"
        words += f" at {extra}, {point.count} rows" if point.count > 1 else f" at {extra}"
        dot = f'<circle class="dot s{colour}" cx="{across(point.x)}" cy="{up(point.value)}" r="5"><title>' + (
            f"{escape(words)}</title></circle>"
        )
        address = link(line, point) if link else ""
        parts.append(f"<a href={quoteattr(address)} aria-label={quoteattr(words)}>{dot}</a>" if address else dot)
    return parts


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 12 12" aria-hidden="true"><circle class="dot s{i % SERIES}" cx="6" cy="6" '
        f'r="5"/></svg>{escape(line.label or "all")}</li>'
        for i, line in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points that no other one beats: more of the second value for no more of the first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, kept = -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept
