"""Figures, image sheets and the report page of the recipe `methods`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pysteer.files import write_bytes
from pysteer.metrics import Rate
from pysteer.recipes.comparison.config import MethodsConfig
from pysteer.recipes.comparison.trial import SWAP, UNSTEERED, Outcome, PairOutcome, kept
from pysteer.recipes.config import config_values
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.experiment import ImageSet
from pysteer.recipes.prototype.page import Checked, interval, percent
from pysteer.recipes.prototype.results import Measured
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
    control_bars,
    dose_response,
    labelled_rows,
    png,
    render,
)
from pysteer.report.report import Block

_ABREAST = 3  # dose-response curves in one figure
_WORST = "worst other attribute kept"


def reaches(measured: Measured, config: MethodsConfig) -> bool:
    """Whether a method reaches the target rate with enough of every other attribute kept."""
    return measured.target.value >= config.reach and kept(measured) >= config.keep


def of_method(made: PairOutcome, outcome: Outcome) -> Measured:
    """What a method did on the fresh prompts."""
    return made.results.headline[outcome.contender.key]


def sorted_outcomes(made: PairOutcome, config: MethodsConfig) -> list[Outcome]:
    """The methods, those that reach the bar first, then by target rate on the fresh prompts."""
    return sorted(
        made.outcomes,
        key=lambda o: (not reaches(of_method(made, o), config), -of_method(made, o).target.value),
    )


def _worst(measured: Measured) -> Rate:
    """The other attribute that suffered most, relative to its unsteered rate, cut at 1 for the figures."""
    name, lowest = measured.lowest
    if not name:
        return Rate(math.nan, math.nan, math.nan, 0)
    value, low, high = (min(1.0, end) for end in (lowest.value, lowest.low, lowest.high))
    return Rate(value, low, high, lowest.total)


def sentence(made: PairOutcome, config: MethodsConfig) -> str:
    """The pair in one sentence."""
    pair, order = made.data.pair, sorted_outcomes(made, config)
    good = [outcome for outcome in order if reaches(of_method(made, outcome), config)]
    names = ", ".join(f"{o.contender.label} {percent(of_method(made, o).target.value)}" for o in (good or order)[:3])
    bar = f"{percent(config.reach, 0)} with all other attributes at {percent(config.keep, 0)} of unsteered or more"
    return f"{pair.name.capitalize()}: {len(good)} of {len(order)} methods reach {bar}; best: {names}."


def methods_table(made: PairOutcome, config: MethodsConfig) -> Table:
    """Every method at its best strength, then the references and the controls."""
    columns = ["method", "fitted at", "strength", f"shows {made.data.pair.target}", _WORST, "all others kept"]
    columns += ["change outside", "distance", "to swap"]
    rows: list[list[str]] = []
    strong = []
    for outcome in sorted_outcomes(made, config):
        m = of_method(made, outcome)
        if reaches(m, config):
            strong.append(len(rows))
        rows.append([m.label, outcome.contender.place.label, f"{m.strength:g}", *_cells(m)])
    others = [m for m in made.results.headline.values() if m.group != "steered"]
    rows += [[m.label, "", f"{m.strength:g}" if m.group == "control" else "", *_cells(m)] for m in others]
    caption = (
        f"{made.data.pair.name}: {len(made.data.test)} fresh prompts, the same noise in every row; bold: reaches "
        f"{percent(config.reach, 0)} with every other attribute kept at {percent(config.keep, 0)} or more. Brackets: "
        "95 % intervals (Wilson; for ratios Bonett and Price). Kept: share of prompts whose stated attribute is shown, "
        "divided by the unsteered share. Change outside: mean absolute pixel change outside the object's box. "
        "Distance: squared Frechet distance of classifier features to the unsteered images, or to the prompt swap."
    )
    return Table(caption, columns, rows, strong)


def _cells(m: Measured) -> list[str]:
    name, lowest = m.lowest
    worst = f"{percent(lowest.value)} ({name})" if name else "not measured"
    return [interval(m.target), worst, interval(m.all_relative), percent(m.outside), _number(m.distance),
            _number(m.to_swap)]  # fmt: skip


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


Draw = Callable[[Any], bytes]


def _figures(made: PairOutcome, config: MethodsConfig) -> tuple[Draw, list[tuple[str, Draw]]]:
    """The bars of all settings, and the dose-response curves, some methods abreast."""
    pair, order = made.data.pair, sorted_outcomes(made, config)
    names: dict[str, Any] = {"target_name": f"shows {pair.target}", "kept_name": _WORST}
    shown = [of_method(made, outcome) for outcome in order]
    rest = [m for m in made.results.headline.values() if m.group != "steered"]
    bars = [Bar(m.label, m.target, _worst(m), m.group) for m in [*shown, *rest]]
    zero = made.search.headline[UNSTEERED.key]
    ceiling = made.search.headline[SWAP.key].target

    def curve(outcome: Outcome) -> DoseCurve:
        points = [DosePoint(m.strength, m.target, _worst(m), m.distance) for m in [zero, *outcome.doses]]
        return DoseCurve(outcome.contender.label, points, outcome.chosen.strength)

    def doses(part: Sequence[Outcome]) -> Draw:
        return lambda theme: dose_response([curve(o) for o in part], ceiling=ceiling, theme=theme, **names)

    groups = [order[i : i + _ABREAST] for i in range(0, len(order), _ABREAST)]
    return lambda theme: control_bars(bars, theme=theme, **names), [
        (", ".join(o.contender.label for o in part), doses(part)) for part in groups
    ]


def _sheets(made: PairOutcome, config: MethodsConfig) -> tuple[bytes, dict[str, bytes]]:
    """The same prompts under every setting, and of every method the unsteered pictures above its own."""
    count = min(config.sheet_images, len(made.data.test))
    prompts = made.data.test.source[:count]

    def row(images: ImageSet, label: str = "") -> Row:
        measured = made.results.headline[images.setting.key]
        note = f"target class in {percent(measured.target.value, 0)}"
        return Row(label or measured.label, images.images[:count], note)

    order = sorted_outcomes(made, config)
    first = [made.images[key] for key in (UNSTEERED.key, SWAP.key)]
    controls = [images for images in made.images.values() if images.setting.group == "control"]
    rows = [row(images) for images in [*first, *(o.images["main"] for o in order), *controls]]
    every = png(labelled_rows(rows, prompts, tile=72))
    own = {}
    for outcome in order:
        parts = [row(first[0]), *(row(images) for images in outcome.images.values())]
        own[outcome.contender.key] = png(labelled_rows(parts, prompts, tile=96))
    return every, own


def _figure(draw: Draw, alt: str, caption: str) -> Figure:
    return Figure(draw("light"), alt, caption, draw("dark"))


def _pair_section(run: Run, made: PairOutcome, config: MethodsConfig) -> Section:
    """Table, figures and sheets of a pair, which are written to the run folder as well."""
    pair, slug = made.data.pair, made.data.pair.slug
    draw_bars, doses = _figures(made, config)
    bars = _figure(draw_bars, f"Rates of every method. {sentence(made, config)}", "Every setting on the fresh prompts.")
    write_bytes(run.path(f"figures/{slug}-methods.png"), bars.light)
    curves: list[Figure] = []
    caption = (
        f"{config.search_prompts} search prompts, with 95 % intervals; the line marks the strength that was chosen."
    )
    for number, (labels, draw) in enumerate(doses, start=1):
        figure = _figure(draw, f"Rates against strength, {pair.name}: {labels}", caption)
        write_bytes(run.path(f"figures/{slug}-strengths-{number}.png"), figure.light)
        curves.append(figure)
    every, own = _sheets(made, config)
    write_bytes(run.path(f"images/{slug}/sheet-methods.png"), every)
    sheets: list[Paragraph | Facts | Table | Figure] = []
    for outcome in sorted_outcomes(made, config):
        sheet, label = own[outcome.contender.key], outcome.contender.label
        write_bytes(run.path(f"images/{slug}/sheet-{outcome.contender.key}.png"), sheet)
        sheets.append(Figure(sheet, f"{label}: pictures of the same prompts, unsteered and steered", label))
    blocks: list[Block] = [methods_table(made, config), bars, curves[0]]
    blocks.append(Figure(every, f"Every setting for the same prompts, {pair.name}", "The first fresh prompts."))
    if curves[1:]:
        blocks.append(Details("Rates against strength, the other methods", curves[1:]))
    blocks.append(Details("Images, method by method", sheets))
    return Section(slug, pair.name, blocks)


def _refining(times: int) -> str:
    if times == 0:
        return ""
    often = "once" if times == 1 else f"{times} times"
    return f"The search then goes on {often} halfway to the neighbours of the best strength, for every method alike. "


def _rule_section(config: MethodsConfig) -> Section:
    text = (
        f"Every method is fitted on the same {config.fit_pairs} prompt pairs, which differ in the class word and share "
        f"their noise. Its strength is chosen on {config.search_prompts} other prompts: of the strengths that keep at "
        f"least {percent(config.keep, 0)} of the unsteered rate of every other attribute, the one with the highest "
        "target rate; of equal ones that with the lowest feature distance; where none keeps that much, the one that "
        f"keeps most. {_refining(config.refine)}The tables are measured on {config.prompts} further prompts with other "
        "noise."
    )
    controls = (
        "The random direction moves every token as far as the fitted shift does; it exists where the length of the "
        "shift does not depend on the token. Shuffled labels fit the same method on the same prompts with the classes "
        "mixed up. The prompt swap gives the generator the target prompt itself."
    )
    return Section("rule", "How the strengths were chosen", [Paragraph(text), Paragraph(controls)])


def _how_section(config: MethodsConfig, checked: Checked) -> Section:
    values = [[key, "" if value is None else str(value)] for key, value in config_values(config).items()]
    text = (
        f"Generator {checked.generator}; {checked.images} images in {checked.seconds:.0f} s; {checked.versions}. "
        "Classes are what the classifier sees; it has a class for none of them."
    )
    table = Table("The configuration.", ["key", "value"], values, numeric=False)
    return Section("how", "How this was made", [Paragraph(text), Details("Configuration", [table])])


def write_report(run: Run, config: MethodsConfig, made: Sequence[PairOutcome], checked: Checked) -> None:
    """Write figures, sheets and `report.html`."""
    facts = []
    for each in made:
        best = sorted_outcomes(each, config)[0]
        m = of_method(each, best)
        note = f"{m.label}; {m.lowest[0]} kept at {percent(m.lowest[1].value)}" if m.lowest[0] else m.label
        facts.append((each.data.pair.name, percent(m.target.value), note))
    sections = [Section("summary", "Summary", [Facts(facts)])]
    sections += [_pair_section(run, each, config) for each in made]
    sections += [_rule_section(config), _how_section(config, checked)]
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet and summary.json."
    lead = " ".join(sentence(each, config) for each in made)
    run.write_text("report.html", render(Report("Steering methods compared", lead, sections, footer)))
