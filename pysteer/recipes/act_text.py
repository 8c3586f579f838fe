"""Recipe `act-text`: learn maps from the activations of two sets of texts, and generate over a range of strengths.

Extract responses and learn (at once, or site after site with the earlier ones steered), search sites and strength on
prompts of their own where that is asked for, generate with all strengths of a prompt as rows of one batch, measure how
often the concept appears and how likely the unsteered model finds the texts, and report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from pysteer.data.tasks import load_task
from pysteer.errors import InputError
from pysteer.metrics.rates import Rate
from pysteer.models.language import LanguageModel
from pysteer.models.load import load_model
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.generator import choose_device
from pysteer.recipes.prototype.page import versions
from pysteer.recipes.transport.evaluations import check_evaluations, further_evaluations
from pysteer.recipes.transport.settings import ActTextConfig, ModelSettings
from pysteer.recipes.transport.text_page import ranked, sentence, write_text_report
from pysteer.recipes.transport.text_trial import Outcome, TextTrial
from pysteer.recipes.transport.texts import Score, Texts, scores
from pysteer.recipes.transport.trackers import Trackers


def load_language(settings: ModelSettings) -> LanguageModel:
    """The language model of the settings, in the type and on the device that they name.

    Raises:
        InputError: the model is missing, or is none of language.
    """
    import torch

    lm = load_model(settings.name)
    if not isinstance(lm, LanguageModel) or lm.model.get_output_embeddings() is None:
        raise InputError(
            "model.name", value=settings.name, allowed="a language model: smollm2, a folder or a name of the hub"
        )
    device = choose_device(settings.device)
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = named.get(settings.dtype) or (torch.bfloat16 if fast_bfloat16(device.type) else torch.float32)
    return lm.to(device, dtype)


def fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: GPUs, and CPUs with matrix units for it."""
    import torch

    if device != "cpu":
        return True
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@recipe("act-text", ActTextConfig)
def run_act_text(config: ActTextConfig, run: Run) -> Summary:
    """Steer a language model towards a concept: fit, generate over strengths, concept rate and perplexity."""
    task = load_task(config.task, config.seed)
    if task.pair is not None:
        raise InputError("task", value=config.task.name, allowed="a task of texts", fix="pysteer run act-image")
    check_evaluations(config, task)
    trackers = Trackers(config.tracking, run.folder, config)
    lm = load_language(config.model)
    trial = TextTrial(run, config, lm, task)
    sites = ", ".join(place.label for place in trial.places)
    run.log.info("task %s: %d and %d texts; sites %s", task.name, len(task.source), len(task.target), sites)
    run.log.info("%d texts for %s", trial.planned, ", ".join(trial.methods))
    with run.progress.task("texts", trial.planned) as advance:
        baseline, search_score, found = trial.outcomes(advance)
    outcomes = ranked(found, config.evaluation.perplexity_bar)
    unsteered = scores(baseline, baseline, task.words)[0]
    _write_tables(run, outcomes, baseline, unsteered)
    _track(trackers, outcomes)
    further = further_evaluations(run, config, trial, outcomes[0], baseline)
    run.log.info("%s", sentence(outcomes[0], unsteered.concept, config, task.name))
    footer = f"pysteer run act-text, {config.model.name}, {next(lm.model.parameters()).dtype}, {versions()}"
    write_text_report(run, config, outcomes, unsteered, search_score, baseline, task.name, further, footer)
    trackers.close()
    return _summary(outcomes, unsteered, config, further)


def _write_tables(run: Run, outcomes: Sequence[Outcome], baseline: Texts, unsteered: Score) -> None:
    """`text_generation.csv` as the published pipeline writes it, and all scores as a table."""
    for outcome in outcomes:
        if outcome.texts is None:
            continue
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["strength", "prompt", "generation"])
        for each in (baseline, outcome.texts):
            writer.writerows(zip(each.strengths, each.prompts, each.texts, strict=True))
        inside = "" if sum(o.texts is not None for o in outcomes) == 1 else f"{outcome.method}/"
        run.write_text(f"generate_with_hooks/{inside}text_generation.csv", text.getvalue())
    rows = [_row("unsteered", "", "report", unsteered)]
    for outcome in outcomes:
        if outcome.texts is not None:
            rows += [_row(outcome.method, outcome.chosen.label, "report", score) for score in outcome.scores]
        for setting in outcome.searched:
            rows += [_row(setting.method, setting.place.label, "search", score) for score in setting.scores]
    run.write_parquet("metrics.parquet", rows)


def _row(method: str, place: str, use: str, score: Score) -> dict[str, Any]:
    concept: Rate = score.concept
    measured = {"concept_rate": concept.value, "concept_low": concept.low, "concept_high": concept.high}
    ratio = {"perplexity_ratio": score.ratio, "ratio_low": score.low, "ratio_high": score.high}
    where = {"method": method, "place": place, "prompts": use, "strength": score.strength, "texts": concept.total}
    return {**where, **measured, "perplexity": score.perplexity, **ratio}


def _track(trackers: Trackers, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for score in outcome.scores:
            values = {"concept_rate": score.concept.value, "perplexity": score.perplexity, "ratio": score.ratio}
            trackers.log(outcome.method, score.strength, values)


def _summary(
    outcomes: Sequence[Outcome], unsteered: Score, config: ActTextConfig, further: list[dict[str, Any]]
) -> Summary:
    best, bar = outcomes[0], config.evaluation.perplexity_bar
    named = {"method": best.method, "place": best.chosen.label, "strength": best.best.strength}
    rates = {"target_rate": best.best.concept.value, "perplexity_ratio": best.best.ratio}
    table = [
        {
            "method": o.method,
            "place": o.chosen.label,
            "prompts": "search" if o.texts is None else "report",
            "readable": s.ratio <= bar,
            **s.as_dict(),
        }
        for o in outcomes
        for s in o.scores
    ]
    search = [
        {"method": setting.method, "place": setting.place.label, **score.as_dict()}
        for outcome in outcomes
        for setting in outcome.searched
        for score in setting.scores
    ]
    headline = {"unsteered": unsteered.as_dict(), "best": {**named, **best.best.as_dict()}}
    return Summary(
        best={**named, **rates, "unsteered_rate": unsteered.concept.value},
        headline=headline,
        tables={"methods": table, "search": search, "further": further},
    )
