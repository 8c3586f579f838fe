"""What was unlearned, and the report page of the recipe `unlearn`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pysteer.files import write_bytes
from pysteer.metrics.rates import Rate
from pysteer.recipes.config import config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.page import interval, percent, versions
from pysteer.report import Details, Facts, Figure, Paragraph, Report, Row, Section, Table, labelled_rows, png, render
from pysteer.zoo.shapes.captions import Scene

_SHOWN = 10


@dataclass(frozen=True)
class Outcome:
    """Rates with or without the edit.

    Attributes:
        name: unsteered or unlearned.
        concept_name: what is unlearned.
        concept: share of its prompts that show it.
        others: share of the prompts of other values of the attribute that show theirs.
        concept_else: share of the concept's prompts that show the other attribute as asked.
        others_else: the same for the prompts of other values.
        classes: by value of both attributes; those of the other attribute over the prompts of other values.
        attribute, other: shape and colour, or the other way round.
    """

    name: str
    concept_name: str
    concept: Rate
    others: Rate
    concept_else: Rate
    others_else: Rate
    classes: Mapping[str, Rate]
    attribute: str
    other: str

    def worst_kept(self) -> Rate:
        """The lowest rate of the groups that should be kept: other values, and the other attribute there."""
        return min((self.others, self.others_else), key=lambda each: each.value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        names = ("concept", "others", "concept_else", "others_else")
        return {name: getattr(self, name).as_dict() for name in names}

    def rows(self) -> list[dict[str, Any]]:
        """A row per class."""
        return [{"setting": self.name, "class": name, **each.as_dict()} for name, each in self.classes.items()]


def write_report(
    run: Run,
    config: Any,
    outcomes: Sequence[Outcome],
    images: Sequence[Tensor],
    scenes: Sequence[Scene],
    best: Mapping[str, float],
) -> None:
    """Write `report.html` with a table of all classes and the same prompts before and after."""
    before, after = outcomes
    name = config.concept
    lead = (
        f"With {name} unlearned, {percent(after.concept.value)} of its prompts still show it (before: "
        f"{percent(before.concept.value)}); other {before.attribute}s {percent(after.others.value)} (before "
        f"{percent(before.others.value)}), {before.other}s there {percent(after.others_else.value)} (before "
        f"{percent(before.others_else.value)})."
    )
    facts = [
        (f"{name} still shown", percent(after.concept.value), interval(after.concept)),
        (f"other {before.attribute}s kept", percent(after.others.value), interval(after.others)),
        (f"{before.other}s kept", percent(after.others_else.value), interval(after.others_else)),
    ]
    rows = [[key, interval(before.classes[key]), interval(after.classes[key])] for key in before.classes]
    strong = [i for i, row in enumerate(rows) if row[0] == name]
    caption = (
        f"Share of the prompts that ask for a class and show it, Wilson 95 % intervals; {before.other}s over "
        f"the prompts of other {before.attribute}s. The same noise in both columns."
    )
    half = len(scenes) // 2
    sheets = []
    for title, first in ((name, 0), ("others", half)):
        part = slice(first, first + min(_SHOWN, half))
        captions = [scene.caption for scene in scenes[part]]
        sheet = png(labelled_rows([Row("before", images[0][part]), Row("after", images[1][part])], captions, tile=96))
        write_bytes(run.path(f"figures/{title}.png"), sheet)
        sheets.append(Figure(sheet, f"The same prompts of {title} before and after", f"Prompts of {title}"))
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    how = Paragraph(
        f"Percentile {best['percentile']:g}, factor {best['factor']:g}, floor {best['floor']:g} times the mean, "
        f"chosen on other prompts. {versions()}."
    )
    details = Details("Configuration", [Table("The configuration.", ["key", "value"], values, numeric=False)])
    sections = [
        Section("summary", "Summary", [Facts(facts)]),
        Section("classes", "All classes", [Table(caption, ["class", "before", "after"], rows, strong)]),
        Section("images", "Images", sheets),
        Section("how", "How this was made", [how, details]),
    ]
    footer = f"pysteer run {run.recipe}; configuration {run.hash}."
    run.write_text("report.html", render(Report(f"Unlearning {name}", lead, sections, footer)))
