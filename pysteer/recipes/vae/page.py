"""The report of the recipe `vae-dynamics`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.dynamics import History
from pysteer.files import write_bytes
from pysteer.recipes.config import config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.page import versions
from pysteer.recipes.vae.cells import Cell
from pysteer.recipes.vae.config import STRATEGIES, InterventionPart, VaeDynamicsConfig
from pysteer.recipes.vae.evaluate import BETTER, METRICS
from pysteer.recipes.vae.figures import channel_map, curves, pairs, themed
from pysteer.recipes.vae.paired import Paired
from pysteer.report import (
    Details,
    Facts,
    Figure,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
    labelled_rows,
    png,
    render,
)
from pysteer.report.report import Block

NAMES = {"mse": "MSE", "kl": "KL", "psnr": "PSNR, dB", "ssim": "SSIM", "feature_distance": "feature distance"}
_SHOWN = 40  # dead channels in the table
_SHEET = 10  # pictures in the sheet
_ENLARGED = 128  # height in pixels to which small pictures are brought


def number(value: float | None) -> str:
    """A figure in a table."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:#.4g}".removesuffix(".")


def sentence(cells: Sequence[Cell], compared: dict[str, Paired]) -> str:
    """What came out, in one or two sentences."""
    planted = [cell.result["planted"] for cell in cells]
    total, found = sum(p["total"] for p in planted), sum(p["found"] for p in planted)
    text = f"{len(cells)} training{'s' * (len(cells) > 1)}."
    if total:
        text += f" Planted dead channels: {found} of {total} were found."
        for condition in dict.fromkeys(cell.condition for cell in cells):
            own = [cell.result["planted"] for cell in cells if cell.condition == condition]
            alive, count = sum(p["revived"] for p in own), sum(p["total"] for p in own)
            text += f" Alive at the end with {condition}: {alive} of {count}."
    if "mse" in compared:
        mse = compared["mse"]
        text += f" MSE: {_verdict('mse', mse)}."
    return text


def _verdict(metric: str, paired: Paired) -> str:
    part = 100 * paired.difference / paired.first if paired.first else math.nan
    span = f"{part:+.1f} % with the nudge"
    if math.isnan(paired.low):
        return f"{span}, one seed, which says nothing about chance"
    ends = [100 * end / paired.first for end in (paired.low, paired.high)]
    sure = paired.low > 0 or paired.high < 0
    good = (paired.difference < 0) == (BETTER[metric] == "lower")
    word = ("better" if good else "worse") if sure else "no difference that can be told from chance"
    return f"{span} [{ends[0]:+.1f}, {ends[1]:+.1f}] over {paired.pairs} seeds: {word}"


def _comparison(cells: Sequence[Cell], compared: dict[str, Paired]) -> Section:
    rows: list[list[str]] = []
    strong = []
    for name, paired in compared.items():
        if paired.low > 0 or paired.high < 0:
            strong.append(len(rows))
        ends = f"[{number(paired.low)}, {number(paired.high)}]"
        cells_of = [number(paired.first), number(paired.second), number(paired.difference), ends]
        rows.append(
            [f"{NAMES[name]} ({BETTER[name]} is better)", *cells_of, number(paired.p_t), number(paired.p_signs)]
        )
    n = next(iter(compared.values())).pairs
    caption = (
        f"{n} seeds; both conditions of a seed have the same weights at the start, order and noise. Brackets: 95 % "
        "intervals of the mean difference (Student's t). Bold: the interval leaves out 0. The sign-flip test is exact "
        f"and cannot give a p below {2 / 2**n:.3g} with {n} pairs. Five measures are tested, none is corrected for it."
    )
    columns = ["measure", "baseline", "nudge", "difference", "95 % interval", "p, paired t", "p, sign flips"]
    values = {c: {m: [x.result["evaluation"][m] for x in cells if x.condition == c] for m in METRICS}
              for c in ("baseline", "nudge")}  # fmt: skip
    panels = [(NAMES[m], values["baseline"][m], values["nudge"][m]) for m in compared]
    figure = themed(pairs(panels), "Every measure for both conditions, seed by seed", "A line joins the two of a seed.")
    return Section("comparison", "Baseline against nudge", [Table(caption, columns, rows, strong), figure])


def _training(cells: Sequence[Cell]) -> Section:
    def found(key: str, source: str = "log") -> dict[str, Any]:
        curves_of: dict[str, Any] = {}
        for condition in dict.fromkeys(cell.condition for cell in cells):
            own = [cell.result[source] for cell in cells if cell.condition == condition and cell.result[source]]
            if own:
                steps = [row["step"] for row in own[0]]
                curves_of[condition] = (steps, [[row[key] for row in rows] for rows in own])
        return curves_of

    panels = [("mean squared error, training", found("mse"), True)]
    if found("mse", "validations"):
        panels.append(("mean squared error, validation", found("mse", "validations"), True))
    if found("inactive", "interventions"):
        panels.append(("dead channels", found("inactive", "interventions"), False))
    panels = [panel for panel in panels if panel[1]]
    figure = themed(
        curves(panels), "Errors and dead channels over the steps", "Mean over seeds; the band is their range."
    )
    rows = []
    for cell in cells:
        result = cell.result
        values = [number(result["evaluation"][name]) for name in METRICS]
        seconds = f"{result['train_seconds']:.0f} s"
        rows.append(
            [f"{cell.condition}, seed {cell.seed}", *values, str(result["inactive"]), str(result["nudges"]), seconds]
        )
    columns = ["training", *NAMES.values(), "dead at the end", "channel nudges", "time"]
    caption = (
        "Held-out images, reconstructed through the mode of the posterior. MSE of pixels in [-1, 1]; KL summed over a "
        "sample; PSNR and SSIM in [0, 1]; feature distance: squared Frechet distance to the originals in features of "
        "the bundled shapes classifier, not comparable to FID."
    )
    return Section("training", "Training", [figure, Table(caption, columns, rows)])


def _channels(cells: Sequence[Cell]) -> Section:
    blocks: list[Block] = []
    planted = _planted_table(cells)
    if planted is not None:
        blocks.append(planted)
    for condition in dict.fromkeys(cell.condition for cell in cells):
        cell = next(cell for cell in cells if cell.condition == condition)
        figure = _activity(cell)
        if figure is not None:
            blocks.append(figure)
    cell = cells[-1]
    rows = [
        [
            f"{row['layer']}[{row['channel']}]",
            row["metric"],
            number(row["value"]),
            number(row["threshold"]),
            str(row["since"]),
        ]
        for row in cell.result["dead"][:_SHOWN]
    ]
    if rows:
        more = f", the first {_SHOWN} of {len(cell.result['dead'])}" if len(cell.result["dead"]) > _SHOWN else ""
        caption = f"Dead in the last window of {cell.condition}, seed {cell.seed}{more}."
        table = Table(caption, ["channel", "measure", "value", "threshold", "dead since step"], rows)
        blocks.append(Details("Dead channels at the end", [table]))
    else:
        blocks.append(Paragraph(f"No channel is dead in the last window of {cell.condition}, seed {cell.seed}."))
    return Section("channels", "Channels", blocks)


def _planted_table(cells: Sequence[Cell]) -> Table | None:
    rows = []
    for condition in dict.fromkeys(cell.condition for cell in cells):
        channels = [row for c in cells if c.condition == condition for row in c.result["planted"]["channels"]]
        for kind in dict.fromkeys(row["kind"] for row in channels):
            own = [row for row in channels if row["kind"] == kind]
            found, alive = [row for row in own if row["found"] is not None], [row for row in own if row["alive"]]
            steps = sorted(row["dead_until"] for row in alive if row["dead_until"] is not None)
            back = f"{steps[len(steps) // 2]} (latest {steps[-1]})" if steps else "none came back"
            recall = f"{len(found)} of {len(own)}"
            rows.append([f"{condition}: {kind}", recall, f"{len(alive)} of {len(own)}", back])
    if not rows:
        return None
    columns = ["planted", "found", "alive at the end", "last step at which dead, median"]
    return Table("Channels of group norms that were killed before training, all seeds.", columns, rows)


def _activity(cell: Cell) -> Figure | None:
    """The spread of every channel of the layer with most dead channels, over the windows."""
    history = History(cell.folder / "channel_history")
    if not len(history):
        return None
    windows = list(history.windows("train"))
    planted = [row["channel"].rpartition("[")[0] for row in cell.result["planted"]["channels"]]
    dead = [row["layer"] for row in cell.result["dead"]] or planted or [windows[-1].names[-1]]
    layer = max(dict.fromkeys(dead), key=dead.count)
    values = torch.stack([window.stat("std")[layer] for window in windows])
    steps = [window.step for window in windows]
    title = f"standard deviation of every channel of {layer}"
    caption = f"{cell.condition}, seed {cell.seed}; every row is a channel, dark rows carry nothing."
    return themed(channel_map(steps, values.numpy(), title), f"{title}, {caption}", caption)


def _read(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())


def _pictures(cells: Sequence[Cell], split: str) -> Section:
    blocks: list[Block] = []
    rows: list[Row] = []
    for condition in dict.fromkeys(cell.condition for cell in cells):
        cell = next(cell for cell in cells if cell.condition == condition)
        folder = cell.folder / f"final_model/eval_results_{split}"
        count = len(list(folder.glob("sample_*_recon.png")))
        made = [_read(folder / f"sample_{i}_recon.png") for i in range(min(_SHEET, count))]
        if not made:
            continue
        if not rows:
            rows.append(
                Row("original", torch.stack([_read(folder / f"sample_{i}_orig.png") for i in range(len(made))]))
            )
        note = f"PSNR {cell.result['evaluation']['psnr']:.2f} dB"
        rows.append(Row(f"{condition}, seed {cell.seed}", torch.stack(made), note))
    if rows:
        sheet = png(labelled_rows(rows, tile=72))
        blocks.append(Figure(sheet, "Held-out images and their reconstructions", "Held-out images."))
    blocks += _lens(cells[-1])
    return Section("pictures", "Pictures", blocks or [Paragraph("No pictures were asked for.")])


def _enlarged(path: Path) -> bytes:
    """A small picture as PNG with every pixel drawn as a square, so that it can be looked at on a page."""
    from PIL import Image

    with Image.open(path) as picture:
        times = max(1, _ENLARGED // picture.height)
        size = (picture.width * times, picture.height * times)
        return png(picture.convert("RGB").resize(size, Image.Resampling.NEAREST))


def _lens(cell: Cell) -> list[Block]:
    """The newest pictures of the lens, and the channels that matter most and least."""
    import csv

    steps = sorted(cell.folder.glob("logit_lens_visualizations/step_*"), key=lambda p: int(p.name.split("_")[1]))
    if not steps:
        return []
    blocks: list[Block] = []
    newest = steps[-1]
    where = f"{cell.condition}, seed {cell.seed}, {newest.name.replace('_', ' ')}"
    watched = (name for window in History(cell.folder / "channel_history").windows("train") for name in window.names)
    names = {name.replace(".", "_"): name for name in watched}
    for layer in sorted(path for path in newest.iterdir() if path.is_dir()):
        for pattern, text in (
            ("activation_grids/sample_0.png", "maps of all channels, each scaled to its own range"),
            ("logit_lens_projections/lens_sample_0_full_map.png", "the picture that the trained decoder sees in them"),
        ):
            path = layer / pattern
            if path.is_file():
                name = names.get(layer.name, layer.name)
                blocks.append(Figure(_enlarged(path), f"{name}: {text}", f"{name}: {text}."))
    found: list[Block] = [Details(f"Lens ({where})", blocks)] if blocks else []  # type: ignore[arg-type]
    if (newest / "ablation.csv").is_file():
        with (newest / "ablation.csv").open(newline="", encoding="utf-8") as stream:
            rows = sorted(csv.DictReader(stream), key=lambda row: -float(row["rise_of_mse"]))
        shown = [[f"{r['layer']}[{r['channel']}]", number(float(r["rise_of_mse"]))] for r in [*rows[:8], *rows[-8:]]]
        caption = f"What silencing one channel adds to the MSE of a few images: the 8 largest and smallest ({where})."
        found.append(Details("What channels are worth", [Table(caption, ["channel", "rise of MSE"], shown)]))
    return found


def _nudge(part: InterventionPart) -> str:
    """What the nudge does to the scale of a dead channel."""
    up_to = f", up to {part.max_scale_value:g}"
    return {
        "scale": f"multiplies the scale of a dead channel by {part.nudge_factor:g}{up_to}",
        "add": f"adds {part.nudge_value_add:g} to the size of the scale of a dead channel{up_to}",
        "reset": "sets the scale of a dead channel to 1",
        "reinitialise": "draws the weights of a dead channel anew",
    }[STRATEGIES[part.strategy]]


def _how(config: VaeDynamicsConfig, cells: Sequence[Cell], seconds: float) -> Section:
    part, first = config.intervention, cells[0].result
    rule = f"Dead is {config.classification.method} below {config.classification.threshold} in a window of " \
        f"{config.tracking.track_interval} steps."  # fmt: skip
    act = f"The nudge {_nudge(part)}, every {part.intervention_interval} steps."
    text = f"{first['images']}; {first['parameters']} parameters, {first['steps']} steps each. {rule} {act} "
    text += f"{seconds:.0f} s in all; {versions()}."
    values = [
        [f"{key}.{inner}" if inner else key, "" if value is None else str(value)]
        for key, own in config_values(config).items()
        for inner, value in (own.items() if isinstance(own, dict) else [("", own)])
    ]
    table = Table("The configuration.", ["key", "value"], values, numeric=False)
    return Section("how", "How this was made", [Paragraph(text), Details("Configuration", [table])])


def write_report(
    run: Run, config: VaeDynamicsConfig, cells: Sequence[Cell], compared: dict[str, Paired], seconds: float
) -> None:
    """Write `report.html` and its figures."""
    facts = []
    for condition in dict.fromkeys(cell.condition for cell in cells):
        own = [cell.result for cell in cells if cell.condition == condition]
        psnr = sum(result["evaluation"]["psnr"] for result in own) / len(own)
        dead = sum(result["inactive"] for result in own) / len(own)
        facts.append((condition, f"{psnr:.2f} dB", f"PSNR, mean of {len(own)}; {dead:.1f} dead channels at the end"))
    split = config.eval_split or config.data.validation_split_name
    sections = [Section("summary", "Summary", [Facts(facts)])]
    sections += [_comparison(cells, compared)] if compared else []
    sections += [_training(cells), _channels(cells), _pictures(cells, split), _how(config, cells, seconds)]
    for section in sections:
        figures = [block for block in section.blocks if isinstance(block, Figure)]
        for i, block in enumerate(figures, start=1):
            write_bytes(run.path(f"figures/{section.anchor}-{i}.png"), block.light)
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet and summary.json."
    lead = sentence(cells, compared)
    run.write_text("report.html", render(Report("Channels of an autoencoder while it trains", lead, sections, footer)))
