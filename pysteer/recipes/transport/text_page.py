"""The report of `act-text`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pysteer.files import write_bytes
from pysteer.metrics.rates import Rate
from pysteer.recipes.frame import Run
from pysteer.recipes.transport.settings import ActTextConfig
from pysteer.recipes.transport.text_trial import Outcome
from pysteer.recipes.transport.texts import Score, Texts
from pysteer.report import Details, Facts, Figure, Paragraph, Report, Section, Table, render
from pysteer.report.curves import CostCurve, CostPoint, rate_and_cost

_EXAMPLES = 6


def label(method: str) -> str:
    """A method's name for people."""
    return method.replace("_", " ")


def percent(rate: Rate) -> str:
    """A rate as `47.5 [40.7, 54.4]`, in percent."""
    if not rate.total:
        return "not measured"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def factor(score: Score) -> str:
    """A ratio of perplexities with its interval."""
    return f"{score.ratio:.2f} [{score.low:.2f}, {score.high:.2f}]"


def sentence(best: Outcome, unsteered: Rate, config: ActTextConfig, name: str) -> str:
    """The answer in one sentence."""
    where = f"{label(best.method)} at {best.chosen.label}, strength {best.best.strength:g}"
    if not best.best.concept.total:
        return f"{where}: perplexity {best.best.ratio:.2f} times that of the unsteered model."
    return (
        f"{name} in {100 * best.best.concept.value:.0f} % of {best.best.concept.total} texts, unsteered in "
        f"{100 * unsteered.value:.0f} %, at {best.best.ratio:.2f} times the unsteered perplexity: {where}."
    )


def ranked(outcomes: Sequence[Outcome], bar: float) -> list[Outcome]:
    """Methods by concept rate: first those measured for the report, of these those below the bar first."""

    def order(outcome: Outcome) -> tuple[bool, bool, float]:
        rate = outcome.best.concept
        return outcome.texts is None, outcome.best.ratio > bar, -(rate.value if rate.total else 0.0)

    return sorted(outcomes, key=order)


def _curve(outcome: Outcome, baseline: Score, searching: bool) -> CostCurve:
    found = outcome.scores
    if searching:
        found = next(each.scores for each in outcome.searched if each.place == outcome.chosen)
    points = [CostPoint(s.strength, s.concept, (s.low, s.ratio, s.high)) for s in [baseline, *found]]
    return CostCurve(label(outcome.method), points, outcome.best.strength)


def _table(outcomes: Sequence[Outcome], unsteered: Score, texts: int, config: ActTextConfig) -> Table:
    bar = config.evaluation.perplexity_bar
    head = ("method", "place", "strength", "concept, % of texts", "perplexity, x unsteered", "texts")
    rows = [["unsteered", "", "0", percent(unsteered.concept), "1", str(texts)]]
    rows += [
        [label(o.method), o.chosen.label, f"{s.strength:g}", percent(s.concept), factor(s), _count(o, texts)]
        for o in outcomes
        for s in ([o.best] if len(o.scores) == 1 else o.scores)
    ]
    return Table(f"Texts of the report; bar of perplexity {bar:g}", head, rows, strong=(1,))


def _count(outcome: Outcome, texts: int) -> str:
    return str(texts) if outcome.texts is not None else f"{outcome.best.concept.total} of the search"


def _search_table(outcomes: Sequence[Outcome]) -> Table:
    head = ("method", "place", "strength", "concept, % of texts", "perplexity, x unsteered")
    rows = [
        [label(setting.method), setting.place.label, f"{s.strength:g}", percent(s.concept), factor(s)]
        for outcome in outcomes
        for setting in outcome.searched
        for s in setting.scores
    ]
    return Table("All settings of the search, on prompts of its own", head, rows)


def _examples(best: Outcome, baseline: Texts) -> Table:
    assert best.texts is not None
    steered = best.texts.at(best.best.strength)
    count = min(_EXAMPLES, len(steered.texts))
    rows = [
        [steered.prompts[i], " ".join(baseline.texts[i].split()), " ".join(steered.texts[i].split())]
        for i in range(count)
    ]
    caption = f"The first {count} texts, not selected; the same random numbers in both columns"
    return Table(caption, ("prompt", "unsteered", f"strength {best.best.strength:g}"), rows, numeric=False)


def write_text_report(
    run: Run,
    config: ActTextConfig,
    outcomes: Sequence[Outcome],
    unsteered: Score,
    search_baseline: Score | None,
    baseline: Texts,
    name: str,
    further: Sequence[dict[str, Any]],
    footer: str,
) -> None:
    """Write report.html and the figures of a run.

    Args:
        run, config: of the run.
        outcomes: of all methods, best first.
        unsteered: score of the model's own texts for the prompts of the report.
        search_baseline: the same for the prompts of the search; None without one.
        baseline: the model's own texts.
        name: of the concept.
        further: rows of further evaluations: name, strength, value.
        footer: how the page was made.
    """
    best, bar = outcomes[0], config.evaluation.perplexity_bar
    curves = [_curve(outcome, search_baseline or unsteered, search_baseline is not None) for outcome in outcomes]
    light, dark = (
        rate_and_cost(curves, rate_name="share of texts", cost_name="perplexity, x unsteered", limit=bar, theme=theme)
        for theme in ("light", "dark")
    )
    where = "prompts of the search, at the place that was chosen" if search_baseline else "prompts of the report"
    alt = f"Share of texts about {name} and perplexity against strength, for {', '.join(o.method for o in outcomes)}"
    figure = Figure(light, alt, f"On the {where}; bands: 95 % intervals; dashed: {bar:g} times the perplexity.", dark)
    write_bytes(run.path("figures/strengths.png"), light)
    facts = Facts(
        [
            (f"texts about {name}", percent(best.best.concept) + " %", f"unsteered {percent(unsteered.concept)} %"),
            ("perplexity", factor(best.best), f"times {unsteered.perplexity:.2f} of the unsteered model"),
            ("setting", label(best.method), f"{best.chosen.label}, strength {best.best.strength:g}"),
        ]
    )
    sections = [
        Section("result", "Result", [facts, _table(outcomes, unsteered, len(baseline.texts), config)]),
        Section("strengths", "Every method over the strengths", [figure]),
        Section("texts", "Texts", [_examples(best, baseline)]),
    ]
    if search_baseline is not None:
        count = sum(len(setting.scores) for outcome in outcomes for setting in outcome.searched)
        rule = (
            f"{count} settings were tried on {config.search.num_sentences} texts each, for prompts that the report "
            f"does not use. At every place the strongest one with at most {config.search.perplexity:g} times the "
            f"perplexity stands for the place; that with the highest concept rate was measured on those of the report."
        )
        every = Details("All settings", [_search_table(outcomes)])
        sections.append(Section("search", "Search", [Paragraph(rule), every]))
    if further:
        rows = [[str(row["evaluation"]), f"{row['strength']:g}", str(row["value"])] for row in further]
        table = Table("Further evaluations", ("evaluation", "strength", "value"), rows)
        sections.append(Section("further", "Further evaluations", [table]))
    lead = sentence(best, unsteered.concept, config, name)
    run.write_text("report.html", render(Report(f"Transporting activations: {name}", lead, sections, footer)))
