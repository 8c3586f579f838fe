"""Figures of the report of `vae-dynamics`, in a light and a dark version each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pysteer.report import Figure
from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, Theme, _new, _style

Curves = Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]


def themed(draw: Callable[[Theme], bytes], alt: str, caption: str) -> Figure:
    """A figure in both colour schemes."""
    return Figure(draw("light"), alt, caption, draw("dark"))


def _colours(theme: Theme) -> dict[str, str]:
    colours = _THEMES[theme]
    return {"baseline": colours.soft, "nudge": colours.target}


def _panels(count: int, size: tuple[float, float], theme: Theme) -> tuple[Any, Any]:
    """A figure with panels beside each other, each with a scale of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=size, dpi=160, facecolor=_THEMES[theme].surface, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        _style(axis, _THEMES[theme])
    return figure, axes


def curves(panels: Sequence[tuple[str, Curves, bool]]) -> Callable[[Theme], bytes]:
    """Curves over steps, a panel each: title, condition -> (steps, values per seed), logarithmic or not.

    The line is the mean over the seeds, the band goes from the lowest to the highest.
    """

    def draw(theme: Theme) -> bytes:
        colours = _THEMES[theme]
        figure, axes = _panels(len(panels), (4.2 * len(panels) + 0.4, 3.2), theme)
        for axis, (title, found, logarithmic) in zip(axes, panels, strict=True):
            for condition, (steps, values) in found.items():
                colour = _colours(theme).get(condition, colours.kept)
                mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
                low, high = ([f(column) for column in zip(*values, strict=True)] for f in (min, max))
                axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
                axis.plot(steps, mean, color=colour, linewidth=1.9, marker=".", markersize=3, label=condition)
            axis.set_title(title, loc="left", fontsize=10, color=colours.ink)
            axis.set_xlabel("step", fontsize=9, color=colours.soft)
            every = [value for _, own in found.values() for line in own for value in line]
            # Ticks of a logarithmic axis within less than a decade are no help.
            if logarithmic and every and max(every) > 5 * min(every) > 0:
                axis.set_yscale("log")
            axis.tick_params(which="minor", colors=colours.soft, labelsize=8)
        axes[0].legend(frameon=False, fontsize=9, labelcolor=colours.ink)
        return drawn(figure, [
            {"panel": title, "condition": condition, "step": step, "mean": sum(own) / len(own), "low": min(own),
             "high": max(own), "seeds": len(own)}
            for title, found, _ in panels for condition, (steps, values) in found.items()
            for step, own in zip(steps, zip(*values, strict=True), strict=True)
        ])  # fmt: skip

    return draw


def pairs(metrics: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Callable[[Theme], bytes]:
    """Both conditions of every seed joined by a line, a panel a metric."""

    def draw(theme: Theme) -> bytes:
        colours = _THEMES[theme]
        figure, axes = _panels(len(metrics), (2.3 * len(metrics) + 0.3, 2.8), theme)
        for axis, (name, first, second) in zip(axes, metrics, strict=True):
            for a, b in zip(first, second, strict=True):
                axis.plot([0, 1], [a, b], color=colours.grid, linewidth=1.2, zorder=1)
            axis.scatter([0] * len(first), first, s=26, color=_colours(theme)["baseline"], zorder=3)
            axis.scatter([1] * len(second), second, s=26, color=_colours(theme)["nudge"], zorder=3)
            axis.set_xticks([0, 1], ["baseline", "nudge"])
            axis.set_xlim(-0.4, 1.4)
            axis.set_title(name, loc="left", fontsize=9.5, color=colours.ink)
        return drawn(figure, [
            {"metric": name, "seed": i, "baseline": a, "nudge": b}
            for name, first, second in metrics for i, (a, b) in enumerate(zip(first, second, strict=True))
        ])  # fmt: skip

    return draw


def channel_map(steps: Sequence[int], values: Any, title: str) -> Callable[[Theme], bytes]:
    """A value of every channel (rows of the picture) over the windows (columns), `[T, C]`."""

    def draw(theme: Theme) -> bytes:
        colours = _THEMES[theme]
        figure, axes = _new(1, 1, (7.6, 3.4), colours)
        axis = axes[0, 0]
        axis.grid(False)
        edges = (steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
        image = axis.imshow(values.T, aspect="auto", cmap="viridis", extent=(*edges, len(values.T) - 0.5, -0.5),
                            interpolation="nearest")  # fmt: skip
        bar = figure.colorbar(image)
        bar.ax.tick_params(colors=colours.soft, labelsize=8)
        axis.set_title(title, loc="left", fontsize=10, color=colours.ink)
        axis.set_xlabel("step", fontsize=9, color=colours.soft)
        axis.set_ylabel("channel", fontsize=9, color=colours.soft)
        columns = [f"channel {i}" for i in range(len(values.T))]
        return drawn(figure, [
            {"step": step, **dict(zip(columns, own.tolist(), strict=True))}
            for step, own in zip(steps, values, strict=True)
        ])  # fmt: skip

    return draw
