"""The report of `act-image`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pysteer.files import write_bytes
from pysteer.recipes.frame import Run
from pysteer.recipes.transport.image_trial import ImageOutcome, ImageScore, ImageTrial
from pysteer.recipes.transport.text_page import label, percent
from pysteer.report import (
    DoseCurve,
    DosePoint,
    Facts,
    Figure,
    Report,
    Row,
    Section,
    Table,
    dose_response,
    labelled_rows,
    png,
    render,
)

_SHOWN = 8


def image_sentence(best: ImageOutcome, trial: ImageTrial) -> str:
    """The answer in one sentence."""
    score, where = best.best, f"{label(best.method)} at {best.place}, strength {best.best.strength:g}"
    if not score.target.total:
        return f"{trial.task.name}: {where} changes pixels by {100 * score.change:.1f} % on average."
    return (
        f"{trial.task.name}: {100 * score.target.value:.0f} % of {score.target.total} images show the target and "
        f"{100 * score.kept.value:.0f} % keep their other attributes: {where}."
    )


def ranked_images(outcomes: Sequence[ImageOutcome]) -> list[ImageOutcome]:
    """Methods by target rate times kept rate."""
    return sorted(outcomes, key=lambda o: -(o.best.target.value * o.best.kept.value if o.best.target.total else 0))


def _number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _table(outcomes: Sequence[ImageOutcome]) -> Table:
    clips = sorted({name for outcome in outcomes for score in outcome.scores for name in score.clip})
    head = ("method", "guidance", "strength", "target, %", "kept, %", "feature distance", "pixel change", *clips)
    rows: list[list[str]] = []
    strong: list[int] = []
    for outcome in outcomes:
        for score in outcome.scores:
            if score is outcome.best:
                strong.append(len(rows))
            rates = (percent(score.target), percent(score.kept), _number(score.distance), _number(score.change))
            cells = [_number(score.clip.get(name, math.nan)) for name in clips]
            rows.append([label(outcome.method), f"{score.guidance:g}", f"{score.strength:g}", *rates, *cells])
    return Table("All settings; kept: the attribute kept worst", head, rows, strong=strong)


def _sheet(outcome: ImageOutcome, prompts: Sequence[str]) -> bytes:
    count = min(_SHOWN, len(prompts))
    rows = [Row(f"strength {s:g}", images[:count]) for s, images in sorted(outcome.images.items())]
    return png(labelled_rows(rows, prompts[:count]))


def _curves(outcomes: Sequence[ImageOutcome], guidance: float) -> list[DoseCurve]:
    def points(scores: Sequence[ImageScore]) -> list[DosePoint]:
        return [DosePoint(s.strength, s.target, s.kept, s.distance) for s in scores if s.guidance == guidance]

    return [DoseCurve(label(o.method), points(o.scores), o.best.strength) for o in outcomes]


def write_image_report(run: Run, trial: ImageTrial, outcomes: Sequence[ImageOutcome], footer: str) -> None:
    """Write report.html and the figures of a run.

    Args:
        run: the run.
        trial: what was run.
        outcomes: of all methods, best first.
        footer: how the page was made.
    """
    best = outcomes[0]
    facts = Facts(
        [
            ("target", percent(best.best.target), "% of images"),
            ("kept", percent(best.best.kept), "% of images, the attribute kept worst"),
            ("setting", label(best.method), f"{best.place}, strength {best.best.strength:g}"),
        ]
    )
    sections = [Section("result", "Result", [facts, _table(outcomes)])]
    if best.best.target.total:
        curves, name = _curves(outcomes, trial.guidance[0]), trial.task.name
        light, dark = (
            dose_response(curves, target_name="target", kept_name="kept", theme=theme) for theme in ("light", "dark")
        )
        write_bytes(run.path("figures/strengths.png"), light)
        figure = Figure(light, f"Target rate and kept rate of {name} against strength, per method", "", dark)
        sections.append(Section("strengths", "Over the strengths", [figure]))
    for outcome in outcomes:
        sheet = _sheet(outcome, trial.prompts)
        write_bytes(run.path(f"figures/{outcome.method}.png"), sheet)
        caption = "A row per strength, the same noise in a column; the first prompts, not selected."
        figure = Figure(sheet, f"Images of {label(outcome.method)} over the strengths", caption)
        anchor = outcome.method.replace("_", "-")
        sections.append(Section(f"images-{anchor}", f"Images: {label(outcome.method)}", [figure]))
    title = f"Transporting activations: {trial.task.name}"
    run.write_text("report.html", render(Report(title, image_sentence(best, trial), sections, footer)))
