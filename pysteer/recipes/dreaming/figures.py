"""Pictures of the dream recipes: the profile of a feature with its peaks and examples, and curves of a training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.dream.analysis import Analysis
from pysteer.recipes.dreaming.config import AnalysisSettings, PlotSettings
from pysteer.recipes.dreaming.making import decode_png
from pysteer.recipes.dreaming.studio import Studio
from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, Theme, _style

_INK, _LINE, _AREA, _SECOND = "#1c2126", "#1f6fcf", "#1f6fcf", "#0b8569"
_SHOWN = 5  # examples beside a profile


@dataclass
class Painted:
    """Captured images by row, read block by block when they are asked for; the last blocks are kept."""

    paths: Mapping[int, Path]
    held: dict[Path, dict[int, bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, studio: Studio, kind: str, analysis_run: str) -> Painted:
        """The images of the capture that the analysis was made of; none where it is not there."""
        import pyarrow.parquet as pq

        run_name = studio.config.timestep_analysis.capture_run or analysis_run
        parts = studio.parts(run_name, "capture")
        paths = {}
        for part in parts:
            for row in pq.read_table(part.files["parquet"], columns=["row"]).to_pydict()["row"]:
                paths[row] = part.files["parquet"]
        return cls(paths)

    def get(self, row: int) -> Tensor | None:
        """The image of a row, uint8 `[H, W, 3]`."""
        import pyarrow.parquet as pq

        path = self.paths.get(row)
        if path is None:
            return None
        if path not in self.held:
            while len(self.held) >= 8:
                self.held.pop(next(iter(self.held)))
            table = pq.read_table(path, columns=["row", "png"]).to_pydict()
            self.held[path] = dict(zip(table["row"], table["png"], strict=True))
        png = self.held[path][row]
        return decode_png(png) if png else None


def draw_profile(
    path: Path, found: Analysis, feature: int, pictures: Painted, analysis: AnalysisSettings, plots: PlotSettings
) -> None:
    """Frequency and largest activation of a feature by timestep, its peaks, and what activates it most there.

    A png shows all peaks and the examples of the highest; a gif has a frame per peak.
    """
    peaks = found.peaks(
        feature, threshold=analysis.peak_threshold, separation=analysis.peak_separation,
        most=analysis.top_peak_count, total=analysis.total_timesteps,
    )  # fmt: skip
    if plots.format == "png" or not peaks:
        data = _profile_png(found, feature, peaks, peaks[0][0] if peaks else None, pictures)
        files.write_bytes(path, data)
        return
    from PIL import Image

    frames = [_profile_png(found, feature, peaks, peak, pictures) for peak, _ in peaks]
    images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    with files.atomic_path(path) as temporary:
        images[0].save(
            temporary, save_all=True, append_images=images[1:], duration=int(1000 * plots.frame_duration), loop=0
        )


def _profile_png(
    found: Analysis, feature: int, peaks: Sequence[tuple[int, float]], current: int | None, pictures: Painted
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, _SHOWN, height_ratios=[2.2, 1])
    axis = figure.add_subplot(grid[0, :])
    times, frequency = found.timesteps.numpy(), found.frequency[feature].numpy()
    axis.fill_between(times, frequency, color=_AREA, alpha=0.25, linewidth=0)
    axis.plot(times, frequency, color=_LINE, label="share of rows that have it among their largest")
    axis.set_ylim(0, max(float(frequency.max()) * 1.2, 1e-3))
    axis.set_xlabel("timestep")
    other = axis.twinx()
    other.plot(times, found.most[feature].numpy(), color=_SECOND, linestyle="--", label="largest activation")
    other.spines["top"].set_visible(False)
    axis.spines["top"].set_visible(False)
    for peak, height in peaks:
        axis.plot([peak], [height], marker="v", color=_INK)
        axis.annotate(str(peak), (peak, height), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    if current is not None:
        axis.axvline(current, color=_INK, linewidth=0.8, alpha=0.6)
    axis.set_title(f"{found.kind} feature {feature}", loc="left", fontsize=10)
    lines = [*axis.get_lines()[:1], *other.get_lines()[:1]]
    axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=7, frameon=False, loc="upper right")
    place = found.step_of(current) if current is not None else int(torch.as_tensor(frequency).argmax())
    rows = [int(row) for row in found.example_rows[feature, place] if int(row) >= 0][:_SHOWN]
    for column, row in enumerate(rows):
        image = pictures.get(row)
        if image is not None:
            spot = figure.add_subplot(grid[1, column])
            spot.imshow(image.numpy())
            spot.set_axis_off()
            spot.set_title(f"{float(found.example_values[feature, place, column]):.3g}", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "pysteer"})
    return buffer.getvalue()


def training_curves(history: Sequence[Mapping[str, Any]], theme: Theme = "light") -> bytes:
    """FVU, L0 and dead latents over the steps of a training, as PNG that can be had as SVG and CSV."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = _THEMES[theme]
    figure = Figure(figsize=(8.4, 2.6), dpi=130, facecolor=colours.surface, layout="constrained")
    FigureCanvasAgg(figure)
    names = {"fvu": "variance unexplained", "l0": "latents per token", "dead": "share dead"}
    for axis, (name, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        _style(axis, colours)
        axis.plot([row["step"] for row in history], [row[name] for row in history], color=colours.target)
        axis.set_title(title, fontsize=10, loc="left", color=colours.ink)
        axis.set_xlabel("step", fontsize=8, color=colours.soft)
        axis.set_ylim(bottom=0)
    return drawn(figure, [{"step": row["step"], **{name: row[name] for name in names}} for row in history])
