"""Report page of the recipe `lora-farm`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pysteer.files import write_bytes
from pysteer.recipes.config import config_values
from pysteer.recipes.farm.check import Effect
from pysteer.recipes.farm.config import FarmConfig
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.page import interval, percent, versions
from pysteer.report import Details, Facts, Figure, Paragraph, Report, Row, Section, Table, labelled_rows, png, render
from pysteer.report.report import Block


def write_report(
    run: Run,
    config: FarmConfig,
    records: Sequence[dict[str, Any]],
    effects: Sequence[Effect],
    seconds: dict[str, float],
) -> None:
    """Write `report.html` and the sheet of pictures."""
    counts = Counter(record["label"] for record in records)
    per = seconds["seconds"] / max(1, seconds["adapters"])
    facts = Facts([
        ("adapters", str(len(records)), f"{len(counts)} classes"),
        ("time per adapter", f"{per:.2f} s", f"{seconds['adapters']:.0f} adapters in {seconds['seconds']:.0f} s"),
    ])  # fmt: skip
    sections = [Section("summary", "Summary", [facts])]
    if effects:
        sections.append(_effects(run, effects))
    losses = {label: [r for r in records if r["label"] == label] for label in counts}
    rows = [
        [label, str(len(some)), f"{_mean(some, 'first_loss'):.4f}", f"{_mean(some, 'last_loss'):.4f}"]
        for label, some in losses.items()
    ]
    classes = Table("Adapters by class; losses are means of the first and the last tenth of the steps.",
                    ["class", "adapters", "loss at first", "loss at last"], rows)  # fmt: skip
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    settings = Table("The configuration.", ["key", "value"], values, numeric=False)
    text = f"Generator {config.generator}; {versions()}. Every adapter has pictures, noise and factors of its own."
    sections.append(Section("classes", "Classes", [classes]))
    sections.append(Section("how", "How this was made", [Paragraph(text), Details("Configuration", [settings])]))
    lead = f"{len(records)} LoRA adapters of {len(counts)} classes, {per:.2f} s each."
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; the records of all adapters are in metrics.parquet."
    run.write_text("report.html", render(Report("A collection of LoRA adapters", lead, sections, footer)))


def _mean(records: Sequence[dict[str, Any]], name: str) -> float:
    return sum(record[name] for record in records) / len(records)


def _effects(run: Run, effects: Sequence[Effect]) -> Section:
    rows = [[e.label, interval(e.without), interval(e.with_adapters)] for e in effects]
    total = effects[0].with_adapters.total
    caption = (
        f"Share of pictures of the training prompt that show the class, as the classifier sees it: {total} pictures "
        "per class with adapters of it, and those of the generator alone; Wilson 95 % intervals."
    )
    sheet = png(
        labelled_rows([Row(e.label, e.images[:12], percent(e.with_adapters.value, 0)) for e in effects], tile=64)
    )
    write_bytes(run.path("images/effects.png"), sheet)
    blocks: list[Block] = [
        Table(caption, ["class", "without", "with adapters"], rows),
        Figure(sheet, "Pictures with adapters of every class, a row a class", "Not selected."),
    ]
    return Section("effects", "What the adapters do", blocks)
