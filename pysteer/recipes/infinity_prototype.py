"""Recipe `infinity-prototype`: turn one class of pictures into another by steering an Infinity generator.

For every pair of classes: prompts of both, the unsteered images and those of the prompt swap, shifts fitted on paired
generations, images steered over a range of strengths, controls, prompts of other classes with the row gate, a
classifier over all of them, and a report.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pysteer.errors import InputError
from pysteer.files import write_bytes
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.baseline import BaselineFile
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.data import PairData, draw_pair, parse_pair, read_pair
from pysteer.recipes.prototype.experiment import PairExperiment, PairImages
from pysteer.recipes.prototype.generator import Generator, load_generator
from pysteer.recipes.prototype.judge import find_judge
from pysteer.recipes.prototype.page import Checked, sentence, versions, write_report
from pysteer.recipes.prototype.painter import Painter
from pysteer.recipes.prototype.results import PairResults, measure
from pysteer.recipes.prototype.settings import check
from pysteer.recipes.setup_file import Setup, read_setup
from pysteer.recipes.source_config import experiment_file, prepare


@recipe("infinity-prototype", PrototypeConfig, prepare=prepare)
def run_prototype(config: PrototypeConfig, run: Run) -> Summary:
    """Turn one class into another with prototype steering; the main experiment."""
    return run_with(config, run, load_generator(config.infinity, config.device))


def run_with(config: PrototypeConfig, run: Run, generator: Generator) -> Summary:
    """The recipe with a given generator."""
    setup = _setup(config)
    check(config, setup, generator.size)
    every = _pairs(config, run)
    judges = [find_judge(config, data.pair) for data in every]
    painter = Painter(generator.pipe, config, generator.settings)
    experiments = [
        PairExperiment(run, config, painter, data, setup, generator.size, [generator.identity, _data_key(config)])
        for data in every
    ]
    baseline = _baseline(config, painter, generator, len(every))
    if baseline is not None:
        for data in every:
            baseline.load(data)  # a file that does not fit is reported before anything is generated
    planned = sum(experiment.planned for experiment in experiments)
    run.log.info("%d images for %s", planned, ", ".join(data.pair.name for data in every))
    start = time.monotonic()
    with run.progress.task("images", planned) as advance:
        made = [experiment.generate(advance, baseline) for experiment in experiments]
    seconds = time.monotonic() - start
    run.log.info("%d images in %.0f s; judging them", painter.painted, seconds)
    results = [
        measure(images, judge, config) for images, judge in zip(run.progress(made, "judging"), judges, strict=True)
    ]
    for result in results:
        run.log.info("%s", sentence(result))
    run.write_parquet("metrics.parquet", [row for result in results for row in result.rows])
    checked = Checked(seconds, painter.painted, str(generator.identity.get("model", "")), versions())
    run.log.info("drawing the report")
    write_report(run, config, results, made, checked)
    _write_grids(run, config, made)
    return _summary(results, painter, seconds)


def _setup(config: PrototypeConfig) -> Setup | None:
    if not config.experiment_setup:
        return None
    return read_setup(experiment_file(config.experiment_dir, "setup", config.experiment_setup))


def _pairs(config: PrototypeConfig, run: Run) -> list[PairData]:
    if config.dataset_path:
        return [read_pair(config, config.dataset_path, run.derive_seed)]
    pairs = [parse_pair(text, config.variant) for text in config.pairs]
    slugs = [pair.slug for pair in pairs]
    if len(set(slugs)) != len(slugs):
        raise InputError("pairs", value=", ".join(slugs), allowed="each pair once", fix="drop the double one")
    return [draw_pair(pair, config, run.derive_seed) for pair in pairs]


def _data_key(config: PrototypeConfig) -> str:
    """Changes when a setup or prompts file changes under the same name."""
    paths = [config.dataset_path]
    return config_hash([Path(path).read_text(encoding="utf-8") for path in paths if path])


def _baseline(config: PrototypeConfig, painter: Painter, generator: Generator, pairs: int) -> BaselineFile | None:
    if not config.experiment_dir and not config.unchanged_saved:
        return None
    made_by = {**generator.identity, **painter.fingerprint}
    return BaselineFile(config.experiment_dir, config.unchanged_saved, pairs > 1, made_by)


def _write_grids(run: Run, config: PrototypeConfig, made: list[PairImages]) -> None:
    """The side-by-side grids (PNG) under their own name: in `figures/`, and in `results/` of the experiment."""
    for images in made:
        for kind in images.doses:
            sheet = run.path(f"images/{images.data.pair.slug}/sheet-grid-{kind}.png").read_bytes()
            name = Path(config.grid_path)
            several = len(made) > 1 or len(images.doses) > 1
            stem = f"{name.stem}-{images.data.pair.slug}-{kind}" if several else name.stem
            target = name.with_name(f"{stem}.png").name
            write_bytes(run.path(f"figures/{target}"), sheet)
            if config.experiment_dir:
                write_bytes(experiment_file(config.experiment_dir, "results", str(name.parent / target)), sheet)


def _summary(results: list[PairResults], painter: Painter, seconds: float) -> Summary:
    tables: dict[str, list[dict[str, Any]]] = {"settings": [], "dose_response": [], "other_classes": []}
    headline: dict[str, Any] = {}
    best: dict[str, Any] = {}
    score = -1.0
    for result in results:
        slug = result.pair.slug
        tables["settings"] += [{"pair": slug, **m.as_dict()} for m in result.headline.values()]
        tables["dose_response"] += [
            {"pair": slug, **m.as_dict(), "kind": kind} for kind, sets in result.doses.items() for m in sets
        ]
        tables["other_classes"] += [{"pair": slug, **b.as_dict()} for b in result.beside]
        headline[slug] = {key: m.as_dict() for key, m in result.headline.items() if m.group in ("steered", "control")}
        headline[slug]["unsteered"] = result.headline["baseline"].as_dict()
        headline[slug]["prompt_swap"] = result.headline["swap"].as_dict()
        headline[slug]["strength_0_identical"] = dict(result.identical)
        for kind in result.doses:
            m = result.headline[kind]
            kept = m.lowest[1].value if m.relative else 1.0
            if m.target.total and m.target.value * kept > score:
                score = m.target.value * kept
                best = {
                    "pair": slug,
                    "setting": m.key,
                    "target_rate": m.target.value,
                    "kept_rate": kept,
                    "strength": m.strength,
                }
    headline["images"] = {"generated": painter.painted, "seconds": round(seconds, 1)}
    return Summary(best=best, headline=headline, tables=tables)
