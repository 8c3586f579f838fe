"""Recipe `weightspace`: what the weights of LoRA adapters say about what they were trained on, and steering with them.

Every feature family is classified over several runs with splits of their own, in which no image is shared between
parts; shuffled labels and adapters with shared initial factors are the controls. Directions between classes then move
adapters, and the classifier of pictures says what that does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.weights.bridge import Bridge, compare, planned
from pysteer.recipes.weights.config import WeightspaceConfig
from pysteer.recipes.weights.experiment import Experiment, LayerOutcome, best_of, table_rows
from pysteer.recipes.weights.page import Found, write_report
from pysteer.recipes.weights.steering import Edited, Editor, default_pairs, parse_direction
from pysteer.weightspace.classify import Outcome, outcome_of, outcome_record
from pysteer.weightspace.directions import Directions
from pysteer.weightspace.loraset import LoraSet

_SHOWN = ("flat", "delta", "output")  # measured on the collection with shared initial factors


@recipe("weightspace", WeightspaceConfig)
def run_weightspace(config: WeightspaceConfig, run: Run) -> Summary:
    """Classify LoRA adapters by their weights, with controls, and steer by editing them."""
    adapters = open_collection(config.dataset, config, run)
    experiment = Experiment(adapters, config)
    families = config.chosen_families
    total = len(families) * len(config.models) + len(config.best_models) + 1
    known = _mark(adapters)
    with run.progress.task("families and models", total) as advance:
        outcomes = []
        for family in families:
            outcomes += _kept(run, f"family-{family}", known, partial(experiment.family, family, config.models))
            advance(len(config.models))
        best = best_of(outcomes)
        more = [model for model in config.best_models if model not in config.models]
        outcomes += _kept(run, f"more-{best.family}", known, lambda: experiment.family(best.family, more))
        advance(len(config.best_models))
        best = best_of(outcomes)
        outcomes += _kept(run, f"shuffled-{best.family}", known, lambda: [experiment.shuffled(best.family, "ridge")])
        advance(1)
    layers: list[LayerOutcome] = []
    if config.ablation:
        with run.progress.task("layers", len(adapters.layers) + config.ablation) as advance:
            layers = experiment.layers(advance)
    shared = _shared(config, run)
    edits, bridges = _edits(config, run, adapters)
    found = Found(adapters, outcomes, best, layers, shared, edits, bridges, _seconds(run))
    run.write_parquet("metrics.parquet", table_rows([*outcomes, *shared]))
    write_report(run, config, found)
    return _summary(found)


def _mark(adapters: LoraSet) -> str:
    """A hash of which adapters there are: stages of a run are for these."""
    return config_hash([(each.path, each.size, each.changed, each.label) for each in adapters.entries])


def _kept(run: Run, name: str, known: str, measure: Callable[[], list[Outcome]]) -> list[Outcome]:
    """The outcomes of a stage, measured or taken from an earlier start."""
    with run.stage(name, known, quiet=True) as stage:
        if not stage.done:
            stage.notes["outcomes"] = [outcome_record(each) for each in measure()]
        return [outcome_of(record) for record in stage.notes["outcomes"]]


def _seconds(run: Run) -> dict[str, float]:
    """Time per family, those of an earlier start included."""
    found = {}
    for path in sorted((run.folder / "stages").glob("family-*.json")):
        found[path.stem.removeprefix("family-")] = files.read_json(path, "stage marker")["seconds"]
    return found


def open_collection(place: str, config: WeightspaceConfig, run: Run) -> LoraSet:
    """The labelled adapters of a folder; rows go into the run folder where they have to be written.

    Raises:
        InputError: nothing there, or no classes.
    """
    folder = Path(place)
    name = "rows" if place == config.dataset else "rows-fixed-init"
    has_tables = folder.is_dir() and not any(folder.rglob("*.safetensors"))
    with run.progress.follow(f"reading {folder.name}") as show:
        if has_tables:
            from pysteer.weightspace.dataset import import_dataset

            adapters = import_dataset(folder, run.path(name), show)
        else:
            adapters = LoraSet.open(folder, cache=run.path(name), progress=show)
    for skip in adapters.skipped:
        run.log.warning("left out %s: %s", skip.path, skip.reason)
    if config.labels:
        unknown = sorted(set(config.labels) - set(adapters.labels))
        if unknown:
            raise InputError("labels", value=", ".join(unknown), allowed=", ".join(sorted(set(adapters.labels))))
    counts: dict[str, int] = {}
    chosen = []
    for index, label in enumerate(adapters.labels):
        wanted = label and (not config.labels or label in config.labels)
        if wanted and (not config.per_class or counts.get(label, 0) < config.per_class):
            counts[label] = counts.get(label, 0) + 1
            chosen.append(index)
    unlabelled = sum(not label for label in adapters.labels)
    if unlabelled:
        run.log.warning("%d adapters without a class are left out", unlabelled)
    return adapters if len(chosen) == len(adapters) else adapters.where(chosen)


def _shared(config: WeightspaceConfig, run: Run) -> list[Outcome]:
    """Some families on the collection whose adapters started from the same factors."""
    if not config.fixed_init:
        return []
    experiment = Experiment(open_collection(config.fixed_init, config, run), config)
    with run.progress.task("shared initial factors", len(_SHOWN)) as advance:
        found = []
        for family in _SHOWN:
            found += experiment.family(family, ("ridge",))
            advance(1)
        return found


def _edits(config: WeightspaceConfig, run: Run, adapters: LoraSet) -> tuple[list[Edited], list[Bridge]]:
    if not config.generator:
        return [], []
    from pysteer.models.load import load_model

    pairs = list(config.directions) or default_pairs(adapters.labels)
    for text in pairs:
        parse_direction(text, adapters.labels)
    generator = load_model(config.generator)
    if not hasattr(generator, "pipe"):
        raise InputError("generator", value=config.generator, allowed="a pipeline of diffusers")
    generator.pipe.set_progress_bar_config(disable=True)
    editor = Editor(generator, Directions(adapters), config)
    with run.progress.task("pictures", editor.planned(len(pairs)) + len(pairs) * planned(config)) as advance:
        edits = [each for text in pairs for each in editor.all_of(text, advance)]
        bridges = [compare(editor, text, advance) for text in pairs]
    return edits, [each for each in bridges if each is not None]


def _summary(found: Found) -> Summary:
    best = found.best.as_dict()
    control = next(each for each in found.outcomes if each.shuffled).as_dict()
    headline: dict[str, Any] = {
        "adapters": len(found.adapters), "classes": len(found.best.classes), "d": found.adapters.layout.width,
        "best": best, "shuffled": control, "skipped": len(found.adapters.skipped),
        "edits_rising": {f"{e.pair}, {e.kind}": e.rising for e in found.edits},
    }  # fmt: skip
    layers = [
        {"layer": each.layer, "accuracy": each.alone.accuracy.value,
         "without_it_and_better": each.without.accuracy.value if each.without else None}
        for each in found.layers
    ]  # fmt: skip
    tables = {"families": table_rows(found.outcomes), "fixed_init": table_rows(found.shared), "layers": layers,
              "edits": [row for each in found.edits for row in each.rows()],
              "bridges": [row for each in found.bridges for row in each.rows()]}  # fmt: skip
    picked = {name: best[name] for name in ("family", "model", "accuracy", "low", "high")}
    return Summary(best={**picked, "shuffled": control["accuracy"]}, headline=headline, tables=tables)
