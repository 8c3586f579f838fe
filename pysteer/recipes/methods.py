"""Recipe `methods`: one class turned into another by every method, each at the strength that suits it best.

For every pair of classes each method is fitted on the same prompt pairs, its strength is searched on prompts of their
own by one rule, and the images of fresh prompts are judged beside the prompt swap and controls that must not work.
"""

from __future__ import annotations

from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.load import load_model
from pysteer.recipes.comparison.config import MethodsConfig
from pysteer.recipes.comparison.contenders import find_contenders
from pysteer.recipes.comparison.page import of_method, reaches, sentence, sorted_outcomes, write_report
from pysteer.recipes.comparison.trial import PairOutcome, PairTrial, kept
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.data import draw_pair, parse_pair
from pysteer.recipes.prototype.generator import choose_device, weights_mark
from pysteer.recipes.prototype.judge import ShapesJudge
from pysteer.recipes.prototype.page import Checked, versions
from pysteer.recipes.prototype.painter import Painter
from pysteer.zoo import load_classifier


@recipe("methods", MethodsConfig)
def run_methods(config: MethodsConfig, run: Run) -> Summary:
    """Compare all methods: target rate, kept attributes and distance, each at its best strength."""
    device = choose_device(config.device)
    pairs = [parse_pair(text, 1) for text in config.pairs]
    if len({pair.slug for pair in pairs}) != len(pairs):
        raise InputError("pairs", value=", ".join(config.pairs), allowed="each pair once", fix="drop the double one")
    pipe = load_model(config.generator)
    if device.type != "cpu":
        pipe.to(device)
    if hasattr(pipe, "pipe"):  # diffusers; the run has a bar of its own
        pipe.pipe.set_progress_bar_config(disable=True)
    painter, judge = Painter(pipe, config.drawn, config.settings), ShapesJudge(load_classifier("shapes"))
    identity = [config.generator, weights_mark(pipe), device.type]
    trials = []
    for pair in pairs:
        contenders = find_contenders(config.methods, pipe, pair.attribute, config.strengths)
        data = draw_pair(pair, config.drawn, run.derive_seed)
        trials.append(PairTrial(run, painter, judge, data, contenders, config.search_prompts, identity))
    planned = sum(trial.planned for trial in trials)
    run.log.info("about %d images for %s", planned, ", ".join(pair.name for pair in pairs))
    with run.progress.task("images", planned) as advance:
        made = [trial.generate(advance) for trial in trials]
    images, seconds = _spent(run)
    for each in made:
        run.log.info("%s", sentence(each, config))
    run.write_parquet("metrics.parquet", [row for each in made for row in [*each.search.rows, *each.results.rows]])
    run.log.info("drawing the report")
    write_report(run, config, made, Checked(seconds, images, config.generator, versions()))
    return _summary(made, config, images, seconds)


def _spent(run: Run) -> tuple[int, float]:
    """Images and seconds of all stages, those of an interrupted start included."""
    markers = [files.read_json(path, "stage marker") for path in (run.folder / "stages").glob("*.json")]
    return sum(m["notes"]["images"] for m in markers), sum(m["seconds"] for m in markers)


def _summary(made: list[PairOutcome], config: MethodsConfig, images: int, seconds: float) -> Summary:
    tables: dict[str, list[dict[str, Any]]] = {"methods": [], "references": [], "search": []}
    headline: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for each in made:
        slug, order = each.data.pair.slug, sorted_outcomes(each, config)
        for outcome in order:
            contender, m = outcome.contender, of_method(each, outcome)
            named = {"pair": slug, "method": contender.method.name, "options": contender.method.config()}
            where = {"place": contender.place.label, "reaches": reaches(m, config)}
            tables["methods"].append({**named, **where, **m.as_dict()})
            tables["search"] += [{"pair": slug, **dose.as_dict()} for dose in outcome.doses]
        others = [m for m in each.results.headline.values() if m.group != "steered"]
        tables["references"] += [{"pair": slug, **m.as_dict()} for m in others]
        reached = [o.contender.key for o in order if reaches(of_method(each, o), config)]
        headline[slug] = {"reach": reached, "methods": len(order), "unsteered": others[0].as_dict()}
        headline[slug]["prompt_swap"] = others[1].as_dict()
        top = of_method(each, order[0])
        score = (bool(reached), top.target.value * kept(top))
        if not best or score > best["score"]:
            rates = {"target_rate": top.target.value, "kept_rate": kept(top)}
            best = {"pair": slug, "setting": top.key, **rates, "strength": top.strength, "score": score}
    best.pop("score", None)
    headline["images"] = {"generated": images, "seconds": round(seconds, 1)}
    return Summary(best=best, headline=headline, tables=tables)
