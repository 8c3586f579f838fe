"""Figures of the recipe `weightspace`: the map of all adapters and what each layer knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pysteer.errors import InputError
from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, Theme, _new
from pysteer.weightspace.canonical import delta_gram
from pysteer.weightspace.loraset import LoraSet

_MARKERS = "osD^vPX*<>"


def positions(adapters: LoraSet, method: str, seed: int) -> np.ndarray[Any, Any]:
    """Places [N, 2] of adapters: principal coordinates of what their layers write (`output`), or t-SNE or UMAP of
    the first 30 of them.

    Raises:
        InputError: UMAP without the package umap-learn.
    """
    gram = delta_gram(adapters, normalise=True, side="output")
    column = gram.mean(0)
    values, vectors = torch.linalg.eigh(gram - column - column[:, None] + column.mean())
    points = (vectors.flip(1) * values.flip(0).clamp_min(0).sqrt()).numpy()
    if method == "pca" or len(points) < 5:
        return points[:, :2]
    points = points[:, :30]
    if method == "tsne":
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]

        return TSNE(random_state=seed, perplexity=min(30.0, (len(points) - 1) / 3)).fit_transform(points)
    try:
        from umap import UMAP  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError("map", value="umap", allowed="pca, tsne", fix="pip install umap-learn") from error
    return UMAP(random_state=seed).fit_transform(points)


def draw_map(points: np.ndarray[Any, Any], labels: Sequence[str], title: str, theme: Theme) -> bytes:
    """PNG of adapters as points, a colour and a marker per class."""
    colours = _THEMES[theme]
    figure, axes = _new(1, 1, (7.6, 5.0), colours)
    axis = axes[0, 0]
    from matplotlib import colormaps

    shades = colormaps["tab10" if theme == "light" else "Set3"]
    for number, label in enumerate(sorted(set(labels))):
        own = points[[each == label for each in labels]]
        axis.scatter(own[:, 0], own[:, 1], s=24, color=shades(number % 10), marker=_MARKERS[number % len(_MARKERS)],
                     label=label, alpha=0.85, linewidths=0)  # fmt: skip
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, loc="left", fontsize=10, color=colours.ink)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=colours.ink)
    return drawn(figure, [
        {"class": label, "x": float(x), "y": float(y)} for (x, y), label in zip(points, labels, strict=True)
    ])  # fmt: skip


def draw_bars(names: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float]], title: str,
              theme: Theme, chance: float) -> bytes:  # fmt: skip
    """PNG of rates as bars with their intervals, and chance as a line."""
    colours = _THEMES[theme]
    figure, axes = _new(1, 1, (7.6, 0.8 + 0.24 * len(names)), colours)
    axis = axes[0, 0]
    axis.grid(False, axis="y")
    rows = list(range(len(names)))[::-1]
    axis.barh(rows, values, height=0.66, color=colours.target)
    for row, (low, high) in zip(rows, ends, strict=True):
        axis.plot([low, high], [row, row], color=colours.ink, linewidth=1.1)
    axis.axvline(chance, color=colours.soft, linewidth=1.0, linestyle=(0, (4, 3)))
    axis.set_yticks(rows, names, fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_title(title, loc="left", fontsize=9.5, color=colours.ink)
    return drawn(figure, [
        {"name": name, "rate": value, "low": low, "high": high, "chance": chance}
        for name, value, (low, high) in zip(names, values, ends, strict=True)
    ])  # fmt: skip
