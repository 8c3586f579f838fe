"""The tables and plots of a training, under the names that published scripts give them."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysteer import files
from pysteer.report.drawn import drawn

if TYPE_CHECKING:
    from pysteer.recipes.vae.trainer import Trainer

ACTIVITY = "tracked_activation_stats.csv"
INTERVENTIONS = "intervention_history.csv"
WEIGHTS = "dead_neuron_percentage_history"
_MOST_LAYERS, _MOST_CURVES = 15, 10


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Path:
    """Write rows with these columns, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return files.write_text(path, text.getvalue())


def write_tables(trainer: Trainer) -> None:
    """Write everything that a training leaves beside its model."""
    folder, seen = trainer.folder, trainer.observers
    columns = list(dict.fromkeys(key for row in trainer.log_rows for key in row)) or ["step"]
    write_csv(folder / "training_log.csv", trainer.log_rows, columns)
    write_csv(folder / "validation_log.csv", trainer.validations, ["step", "mse", "kl", "loss"])
    if seen.monitor is not None:
        columns = ["global_step", "layer_identifier", "original_metric_name", "metric_type", "metric_value"]
        write_csv(folder / ACTIVITY, seen.activity, columns)
        _plot_activity(seen.activity, folder / "activity_plots/activation_evo_mean_mean.png")
    if seen.classifier is not None:
        write_csv(folder / INTERVENTIONS, seen.interventions, ["step", "inactive", "nudged"])
        _plot_nudges(seen.interventions, folder / "dead_vs_nudge.png")
        names = ["step", "layer", "channel", "metric", "value", "threshold", "since"]
        write_csv(folder / "dead_channels.csv", seen.dead, names)
    if seen.nudger is not None:
        rows = seen.nudger.rows()
        write_csv(folder / "nudges.csv", rows, ["step", "parameter", "channel", "before", "after"])
    if seen.health is not None:
        write_csv(folder / f"{WEIGHTS}.csv", seen.weights, ["layer", "step", "percentage"])
        _plot_weights(seen.weights, folder / f"{WEIGHTS}.png", seen.health.threshold)
        _plot_raw(trainer)


def plot(path: Path, draw: Callable[[Any], None], *, table: bool = True) -> None:
    """Draw on the axes of a new figure and write it as PNG and SVG, and as CSV unless its table lies there already."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    files.write_bytes(path, drawn(figure, None if table else ()))


def _plot_activity(rows: Sequence[dict[str, Any]], path: Path) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["metric_type"] == "per_channel_overall_mean":
            curves.setdefault(row["layer_identifier"], []).append((row["global_step"], row["metric_value"]))

    def draw(axes: Any) -> None:
        for name, points in list(curves.items())[:_MOST_LAYERS]:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(xlabel="global step", ylabel="mean over channels", title="activity of the channels of each layer")
        if curves:
            axes.legend(fontsize=6)

    plot(path, draw)


def _plot_nudges(rows: Sequence[dict[str, Any]], path: Path) -> None:
    def draw(axes: Any) -> None:
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["inactive"] for row in rows], label="inactive channels", linewidth=2)
        width = 0.8 * min((b - a for a, b in itertools.pairwise(steps)), default=1)
        bars = [0.5 * row["nudged"] for row in rows]
        axes.bar(steps, bars, width=width, alpha=0.4, color="tab:orange", label="scales nudged, x 0.5")
        axes.set(xlabel="step", ylabel="count", title="dead channels and nudges")
        axes.legend()

    plot(path, draw)


def _plot_weights(rows: Sequence[dict[str, Any]], path: Path, threshold: float) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        curves.setdefault(row["layer"], []).append((row["step"], row["percentage"]))
    largest = sorted(curves, key=lambda name: -max(value for _, value in curves[name]))[:_MOST_CURVES]

    def draw(axes: Any) -> None:
        for name in largest:
            axes.plot(*zip(*curves[name], strict=True), marker=".", label=name)
        axes.set(xlabel="global step", ylabel=f"% of weights < {threshold:.1e}", title="dead weights")
        if largest:
            axes.legend(fontsize=6)

    plot(path, draw, table=False)


def _plot_raw(trainer: Trainer) -> None:
    """Filter magnitudes of convolutions and heatmaps of linear layers that were asked for."""
    parameters = dict(trainer.plain.named_parameters())
    for asked in trainer.config.dead_neuron_tracking.target_layer_names_for_raw_weights:
        name = asked.removeprefix("vae.")
        if name not in parameters:
            trainer.say("dead_neuron_tracking: the model has no parameter %s, nothing is drawn for it", asked)
            continue
        weight = parameters[name].detach().float().cpu().abs()
        stem = name.replace(".", "_")
        if weight.dim() == 2:

            def heat(axes: Any, weight: Any = weight, name: str = name) -> None:
                image = axes.imshow(weight, aspect="auto", cmap="viridis")
                axes.figure.colorbar(image, label="|weight|")
                axes.set(xlabel="input", ylabel="output", title=name)

            plot(trainer.folder / f"heatmap_{stem}.png", heat)
            continue
        sizes = weight.flatten(1).mean(1) if weight.dim() > 1 else weight

        def bars(axes: Any, sizes: Any = sizes, name: str = name) -> None:
            axes.bar(range(len(sizes)), sizes.tolist())
            axes.set(xlabel="output channel", ylabel="mean |weight|", title=name)

        plot(trainer.folder / f"filter_magnitudes_{stem}.png", bars)
