"""Figures, image sheets and the report page of the recipe."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import pysteer
from pysteer.files import write_bytes
from pysteer.metrics import Rate
from pysteer.recipes.config import config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.experiment import ImageSet, PairImages
from pysteer.recipes.prototype.results import Measured, PairResults
from pysteer.report import (
    Bar,
    Details,
    DoseCurve,
    DosePoint,
    Facts,
    Figure,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
    comparison_grid,
    control_bars,
    dose_response,
    labelled_rows,
    png,
    render,
)
from pysteer.report.report import Block

_COLUMNS = 10  # prompts shown in the sheets that compare settings


@dataclass(frozen=True)
class Checked:
    """Facts about the whole run: seconds it took, images it made, how the generator is called, versions."""

    seconds: float
    images: int
    generator: str
    versions: str


def versions() -> str:
    """Versions, machine and threads, for the report."""
    threads = torch.get_num_threads()
    return f"pysteer {pysteer.__version__}, torch {torch.__version__}, {platform.machine()}, {threads} threads"


def percent(value: float, digits: int = 1) -> str:
    """A share as text: `91.4 %`."""
    return "not measured" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def interval(measured: Rate, digits: int = 1) -> str:
    """A rate with its interval: `91.4 % [87.9, 94.1]`."""
    if measured.total == 0 or math.isnan(measured.value):
        return "not measured"
    return f"{percent(measured.value, digits)} [{100 * measured.low:.{digits}f}, {100 * measured.high:.{digits}f}]"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def primary(results: PairResults) -> str:
    """The other attribute shown in the figures: the colour for shapes, the shape for colours."""
    return "colour" if results.pair.attribute == "shape" else "shape"


def _kept(measured: Measured, name: str) -> Rate:
    return measured.kept.get(name, Rate(math.nan, math.nan, math.nan, 0))


def figures(results: PairResults) -> dict[str, Callable[[str], bytes]]:
    """Figure name -> drawing function of the theme."""
    if not results.headline["baseline"].target.total:
        return {}
    name = primary(results)
    names: dict[str, Any] = {"target_name": f"shows {results.pair.target}", "kept_name": f"{name} kept"}
    curves = []
    for kind, sets in results.doses.items():
        points = [DosePoint(m.strength, m.target, _kept(m, name), m.distance) for m in sets]
        curves.append(DoseCurve(f"{kind} steering", points, results.headline[kind].strength))
    bars = [
        Bar(m.label, m.target, _kept(m, name), m.group)
        for m in sorted(results.headline.values(), key=lambda m: ("reference", "steered", "control").index(m.group))
    ]
    ceiling = results.headline["swap"].target
    return {
        "dose-response": lambda theme: dose_response(curves, ceiling=ceiling, theme=theme, **names),
        "settings": lambda theme: control_bars(bars, theme=theme, **names),
    }


def sheets(made: PairImages, results: PairResults, config: PrototypeConfig) -> dict[str, bytes]:
    """Sheet name -> PNG: side-by-side grids, all settings for the same prompts, and strips of rising strength."""
    base = made.headline["baseline"]
    found: dict[str, Image.Image] = {}
    for kind in made.doses:
        count = min(config.sheet_images, len(base.prompts))
        steered = made.headline[kind]
        titles = ("unsteered", f"steered ({kind})")
        found[f"grid-{kind}"] = comparison_grid(
            base.images[:count], steered.images[:count], base.prompts.source[:count], titles=titles, columns=6, tile=96
        )
    shown = min(_COLUMNS, len(base.prompts))
    rows = [_row(made.headline[key], results.headline[key], shown) for key in made.headline]
    found["settings"] = labelled_rows(rows, base.prompts.source[:shown], tile=88)
    for kind, sets in made.doses.items():
        columns = min(_COLUMNS, len(sets[0].prompts))
        strip = [Row(f"strength {s.setting.level:g}", s.images[:columns]) for s in sets]
        found[f"strengths-{kind}"] = labelled_rows(strip, sets[0].prompts.source[:columns], tile=88)
    if made.beside:
        columns = min(_COLUMNS, len(made.beside["baseline"].prompts))
        step = max(1, len(made.beside["baseline"].prompts) // columns)  # spread over the classes
        prompts = made.beside["baseline"].prompts.source[::step][:columns]
        rows = [Row(s.setting.label, s.images[::step][:columns]) for s in made.beside.values()]
        found["others"] = labelled_rows(rows, prompts, tile=88)
    return {name: png(sheet) for name, sheet in found.items()}


def _row(images: ImageSet, measured: Measured, count: int) -> Row:
    note = "" if not measured.target.total else f"target class in {percent(measured.target.value, 0)}"
    return Row(measured.label, images.images[:count], note)


def settings_table(results: PairResults) -> Table:
    """All settings of a pair."""
    pair = results.pair
    others = sorted({name for m in results.headline.values() for name in m.relative})
    columns = ["setting", f"shows {pair.target}", f"still {pair.source}"]
    columns += [f"{name} kept" for name in others] + ["all others kept", "change outside"]
    far = not all(math.isnan(m.distance) for m in results.headline.values())
    columns += ["distance", "to swap"] if far else []
    rows, strong = [], []
    for i, m in enumerate(results.headline.values()):
        if m.group == "steered":
            strong.append(i)
        row = [m.label, interval(m.target), percent(m.source.value)]
        row += [percent(m.relative[name].value) if name in m.relative else "" for name in others]
        row += [interval(m.all_relative), percent(m.outside)]
        row += [_number(m.distance), _number(m.to_swap)] if far else []
        rows.append(row)
    caption = (
        f"{pair.name}: {results.headline['baseline'].count} prompts, the same noise in every row. Brackets are 95 % "
        "intervals (Wilson; for ratios Bonett and Price). Kept: the share of prompts whose stated attribute is shown, "
        "divided by the unsteered share. Change outside: mean absolute pixel change outside the object's box."
    )
    if far:
        caption += " Distance: squared Frechet distance of classifier features to the unsteered images, or to the swap."
    return Table(caption, columns, rows, strong)


def rates_table(results: PairResults) -> Table:
    """The absolute rates behind the relative ones."""
    others = sorted({name for m in results.headline.values() for name in m.kept})
    rows = [
        [m.label, *(interval(m.kept[name]) if name in m.kept else "" for name in others)]
        for m in results.headline.values()
    ]
    caption = f"{results.pair.name}: share of images that show what the prompt states, among prompts that state it."
    return Table(caption, ["setting", *others], rows)


def _figure(draw: Callable[[str], bytes], alt: str, caption: str) -> Figure:
    return Figure(draw("light"), alt, caption, draw("dark"))


def sentence(results: PairResults) -> str:
    """The pair in one sentence, for alt texts and the lead."""
    parts = []
    for kind in results.doses:
        m = results.headline[kind]
        if m.target.total:
            name, lowest = m.lowest
            kept = f" ({name} kept at {percent(lowest.value)} of unsteered)" if name else ""
            parts.append(f"{kind} steering {percent(m.target.value)} {results.pair.target}{kept}")
    return (
        f"{results.pair.name.capitalize()}: {', '.join(parts)}."
        if parts
        else f"{results.pair.name}: images only, no classifier."
    )


def pair_section(
    run: Run,
    results: PairResults,
    made: PairImages,
    made_sheets: Mapping[str, bytes],
    config: PrototypeConfig,
) -> Section:
    """The section of a pair; its figures and sheets are written to the run folder as well."""
    slug, pair = results.pair.slug, results.pair
    blocks: list[Block] = [settings_table(results)]
    captions = {
        "dose-response": "Rates against strength, with 95 % Wilson bands; dashed: the prompt swap of all prompts. "
        f"Below, where it was measured: squared Frechet distance of classifier features to the unsteered images "
        f"({len_of(results)} prompts).",
        "settings": "All settings on the same prompts and noise.",
    }
    for name, draw in figures(results).items():
        block = _figure(draw, f"{name} of {sentence(results)}", captions[name])
        write_bytes(run.path(f"figures/{slug}-{name}.png"), block.light)
        blocks.append(block)
    for name, sheet in made_sheets.items():
        write_bytes(run.path(f"images/{slug}/sheet-{name}.png"), sheet)
    for kind in made.doses:
        alt = f"Pairs of images, unsteered and {kind} steered, {pair.name}, with their prompts"
        count = min(config.sheet_images, len(made.data.test))
        caption = f"The first {count} evaluation prompts, not selected: unsteered left, {kind} steering right."
        blocks.append(Figure(made_sheets[f"grid-{kind}"], alt, caption))
    more: list[Paragraph | Facts | Table | Figure] = [
        Figure(made_sheets["settings"], f"Every setting for the same prompts, {pair.name}", "Every setting.")
    ]
    more += [
        Figure(made_sheets[f"strengths-{kind}"], f"{kind} steering with rising strength, {pair.name}", kind)
        for kind in made.doses
    ]
    if any(m.kept for m in results.headline.values()):
        more.append(rates_table(results))
    blocks.append(Details("More: every setting, rising strength, absolute rates", more))
    return Section(slug, pair.name, blocks)


def len_of(results: PairResults) -> int:
    """How many prompts the dose-response figure uses."""
    return next((sets[0].count for sets in results.doses.values()), 0)


def headline_facts(every: Sequence[PairResults]) -> Facts:
    """The target rates of all pairs."""
    items = []
    for results in every:
        for kind in results.doses:
            m = results.headline[kind]
            name, lowest = m.lowest
            kept = f"; {name} kept at {percent(lowest.value)} of unsteered" if name else ""
            spread = f"[{100 * m.target.low:.1f}, {100 * m.target.high:.1f}]" if m.target.total else ""
            items.append((f"{results.pair.name}, {kind}", percent(m.target.value), f"{spread}{kept}"))
    return Facts(items)


def others_section(
    every: Sequence[PairResults], made_sheets: Sequence[Mapping[str, bytes]], config: PrototypeConfig
) -> Section | None:
    """Prompts of other classes, which the gate should leave alone."""
    rows = [
        [
            f"{results.pair.name}, {b.kind}",
            interval(b.unsteered),
            interval(b.steered),
            interval(b.relative),
            percent(b.passed.value),
            percent(b.sources_passed.value),
        ]
        for results in every
        for b in results.beside
    ]
    if not rows:
        return None
    columns = ["steering", "unsteered", "steered", "relative", "gate open for others", "gate open for the source class"]
    gate = "with the row gate (linear discriminant on the pooled text)" if config.gate else "without a gate"
    table = Table(f"Share of prompts of other classes that show their own class, {gate}.", columns, rows)
    images: list[Paragraph | Facts | Table | Figure] = [
        Figure(own["others"], f"Prompts of other classes, unsteered and steered, {results.pair.name}")
        for results, own in zip(every, made_sheets, strict=True)
        if "others" in own
    ]
    return Section("other-classes", "Prompts of other classes", [table, Details("Images", images)])


def checks_section(every: Sequence[PairResults], config: PrototypeConfig) -> Section:
    """Strength 0, and what the controls say."""
    rows = [
        [f"{results.pair.name}, {kind}", "bit for bit the unsteered images" if same else "DIFFERENT from unsteered"]
        for results in every
        for kind, same in results.identical.items()
    ]
    text = (
        "The prompt swap does the same to the class and is the ceiling. What steering inside the model adds is that it "
        "acts where and as strongly as asked, and that the visual edit at a late stage leaves the rest of the picture "
        "as it was: compare the change outside the object. The mean shift at the FFN is the usual way; the random "
        "direction moves every token as far as the fitted shift does; shuffled labels fit the same method on the same "
        "prompts with the classes mixed up."
    )
    count = min(config.batch_size, config.prompts)
    table = Table(f"Strength 0 on {count} prompts.", ["steering", "images"], rows, numeric=False)
    return Section("checks", "Checks", [Paragraph(text), table])


def method_section(config: PrototypeConfig, checked: Checked) -> Section:
    """How it was made."""
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    text = (
        f"Generator {checked.generator}; {checked.images} images in {checked.seconds:.0f} s; {checked.versions}. "
        f"Shifts are fitted on {config.fit_pairs} prompt pairs that differ in the class word and share their noise; no "
        "evaluation prompt was fitted on. Classes are what the classifier sees; it has a class for none of them."
    )
    table = Table("The configuration.", ["key", "value"], values, numeric=False)
    return Section("how", "How this was made", [Paragraph(text), Details("Configuration", [table])])


def lead(every: Sequence[PairResults]) -> str:
    """The answer of the page."""
    return " ".join(sentence(results) for results in every)


def write_report(
    run: Run, config: PrototypeConfig, every: Sequence[PairResults], made: Sequence[PairImages], checked: Checked
) -> None:
    """Write figures, sheets and `report.html` of all pairs."""
    drawn = [sheets(images, results, config) for results, images in zip(every, made, strict=True)]
    sections = [Section("summary", "Summary", [headline_facts(every)])]
    sections += [pair_section(run, *parts, config) for parts in zip(every, made, drawn, strict=True)]
    others = others_section(every, drawn, config)
    sections += [others] if others else []
    sections += [checks_section(every, config), method_section(config, checked)]
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet and summary.json."
    page = Report("Prototype steering of an Infinity generator", lead(every), sections, footer)
    run.write_text("report.html", render(page))
