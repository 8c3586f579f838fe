"""Recipe `locate`: where in a model the difference between two prompts lives.

Activations of the target prompt's run are patched into the source prompt's run, for every kind of site by step and by
layer, and it is measured how far the result turns into the target's: how often a classifier sees the target class, or
without one how far the result has come. What turns it is worth fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysteer.capture.generation import whole_run
from pysteer.capture.locate import Place, locate
from pysteer.capture.prompts import read_prompts
from pysteer.capture.recovery import recovery
from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.files import write_bytes
from pysteer.metrics.rates import Rate, rate
from pysteer.models.load import load_model
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.data import Pair, noise_seeds, parse_pair
from pysteer.recipes.prototype.generator import choose_device, load_generator
from pysteer.report.heatmap import heatmap
from pysteer.report.report import Facts, Figure, Paragraph, Report, Section, Table, render
from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import sample_pairs

_KINDS = ("embed", "sa", "attn", "ca", "ff", "ffn", "mlp", "ca_block", "block")  # worth patching where they exist
_ONCE = ("text.output", "pooled")
_RANGES = 5  # steps are put together into at most so many ranges


@dataclass(frozen=True)
class LocateConfig:
    """Which prompts, and where to look.

    Attributes:
        model: a bundled generator, smollm2, a folder, a name of the hub, or an infinity_configuration.yml.
        pairs: pairs of classes, `source->target`, two shapes or two colours each; for the bundled image generators.
        source, target: instead of pairs, files of prompts that belong together line by line; see `pysteer capture`.
        sites: kinds of sites that are patched by step and by layer; empty for all kinds that the model has.
        once: sites that run once, patched as a whole; empty for those that the model has.
        prompts: prompt pairs; the same noise for both.
        steps: denoising steps of a diffusion model; the pipeline's own number when left out.
        batch_size: most prompts in a batch.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: seed of prompts and noise.
    """

    model: str = "infinity-shapes"
    pairs: tuple[str, ...] = field(default=("circle->square", "red->blue"))
    source: str = ""
    target: str = ""
    sites: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    prompts: int = 48
    steps: int | None = None
    batch_size: int = 288
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise InputError("prompts", value=self.prompts, allowed="a whole number from 2")
        if bool(self.source) != bool(self.target):
            raise InputError("source and target", value="one of them", allowed="both files, or pairs")
        if not self.pairs and not self.source:
            raise InputError("pairs", value="none", allowed="at least one pair, or source and target files")


@dataclass(frozen=True)
class _Task:
    """One pair of classes or of files: its prompts and seeds, how results are scored, and what the score is called."""

    slug: str
    name: str
    source: list[str]
    target: list[str]
    seeds: list[int]
    score: Callable[[Any], Tensor]
    what: str
    classed: bool  # whether scores are yes or no


@dataclass(frozen=True)
class _Row:
    """One place: the kind of site, its layers and its steps in words, and the mean score."""

    kind: str
    layers: str
    steps: str
    place: Place
    score: Rate


@dataclass(frozen=True)
class _Axes:
    """Kinds of sites, how many layers the longest has, and ranges of steps."""

    kinds: tuple[str, ...]
    once: tuple[str, ...]
    layers: dict[str, int]
    ranges: tuple[tuple[int, ...], ...]


@recipe("locate", LocateConfig)
def run_locate(config: LocateConfig, run: Run) -> Summary:
    """Find the sites and steps that carry the difference between two classes, by patching activations."""
    pipe, settings = _model(config)
    generate = _generate(pipe, settings)
    axes = _axes(config, pipe)
    choose_sites(find_family(pipe), pipe, [*axes.kinds, *axes.once])  # before anything is generated
    tasks = _tasks(config, run, pipe, generate)
    axes = replace(axes, ranges=_ranges(pipe, lambda: generate(tasks[0].source[:1], tasks[0].seeds[:1])))
    named = _places(axes)
    rows: dict[str, list[_Row]] = {}
    ends: dict[str, tuple[Rate, Rate]] = {}
    with run.progress.task("places", len(named) * len(tasks)) as advance:
        for task in tasks:
            found = locate(
                pipe, task.source, task.target, [place for *_, place in named], score=task.score, seeds=task.seeds,
                batch_size=max(config.batch_size, 2 * len(task.source)), generate=generate, progress=advance,
            )  # fmt: skip
            scores = [_mean(values, task.classed) for values in found.scores]
            rows[task.slug] = [_Row(*name, score) for name, score in zip(named, scores, strict=True)]
            ends[task.slug] = (_mean(found.source, task.classed), _mean(found.target, task.classed))
    tables = [
        {"pair": slug, "site": row.kind, "layers": row.layers, "steps": row.steps, **row.score.as_dict()}
        for slug, every in rows.items()
        for row in every
    ]
    run.write_parquet("metrics.parquet", tables)
    _report(run, tasks, rows, ends, axes)
    first = tasks[0].slug
    top = max(rows[first], key=lambda row: row.score.value)
    best = {"pair": first, "site": top.kind, "layers": top.layers, "steps": top.steps, "target_rate": top.score.value}
    headline = {slug: {"proposed": _proposal(every)} for slug, every in rows.items()}
    return Summary(best=best, headline=headline, tables={"places": tables})


def _model(config: LocateConfig) -> tuple[Any, dict[str, Any]]:
    """The model, and what goes into each of its runs."""
    if Path(config.model).is_file():
        generator = load_generator(config.model, config.device)
        return generator.pipe, generator.settings
    pipe, device = load_model(config.model), choose_device(config.device)
    if hasattr(pipe, "pipe"):  # diffusers; the run has a bar of its own
        pipe.pipe.set_progress_bar_config(disable=True)
    if device.type != "cpu":
        pipe.to(device)
    return pipe, {} if config.steps is None else {"num_inference_steps": config.steps}


def _generate(pipe: Any, settings: dict[str, Any]) -> Callable[[list[str], list[int]], Any]:
    if not settings:
        return whole_run(pipe)
    return lambda prompts, seeds: pipe(prompts, seeds=seeds, **settings)


def _tasks(config: LocateConfig, run: Run, pipe: Any, generate: Callable[[list[str], list[int]], Any]) -> list[_Task]:
    if config.source:
        texts = [read_prompts(path).texts[: config.prompts] for path in (config.source, config.target)]
        if len(texts[0]) != len(texts[1]):
            given = f"{len(texts[0])} and {len(texts[1])}"
            raise InputError("prompts of source and target", value=given, allowed="equal numbers, line by line")
        seeds = noise_seeds(len(texts[0]), run.derive_seed("noise"))
        name = f"{Path(config.source).stem} → {Path(config.target).stem}"
        score = recovery(generate, texts[0], texts[1], seeds)
        return [_Task("source-to-target", name, texts[0], texts[1], seeds, score, "way to the target's result", False)]
    if hasattr(pipe, "read"):
        fix = "give source and target, files of prompts that belong together line by line"
        raise InputError("pairs of classes", value=config.model, allowed="the bundled image generators", fix=fix)
    classifier = load_classifier("shapes")
    return [_class_task(config, run, parse_pair(text, 1), classifier) for text in config.pairs]


def _class_task(config: LocateConfig, run: Run, pair: Pair, classifier: Any) -> _Task:
    seed = run.derive_seed("captions", pair.slug)
    drawn = sample_pairs(config.prompts, pair.attribute, pair.source, pair.target, seed)

    def shows_target(out: Any) -> Tensor:
        labels = classifier.classify(out.images.cpu()).labels[pair.attribute]
        return torch.tensor([float(label == pair.target) for label in labels])

    source, target = ([scene.caption for scene in side] for side in zip(*drawn, strict=True))
    seeds = noise_seeds(config.prompts, run.derive_seed("noise", pair.slug))
    return _Task(
        pair.slug, pair.name, source, target, seeds, shows_target, f"pictures that show the {pair.target}", True
    )


def _mean(scores: Tensor, classed: bool) -> Rate:
    """Mean with its 95 % interval: Wilson's for yes and no, that of the mean otherwise."""
    if classed:
        return rate((scores > 0.5).numpy())
    values = scores.double().numpy()
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Rate(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, len(values))


def _axes(config: LocateConfig, pipe: Any) -> _Axes:
    """What there is to patch: kinds of sites with their numbers of layers."""
    family = find_family(pipe)
    sites = family.sites(pipe)
    layers: dict[str, int] = {}
    for name, site in sites.items():
        stem, _, number = name.rpartition(".")
        if number.isdigit() and site.path != name and site.part != "vae":
            layers[stem] = layers.get(stem, 0) + 1
    kinds = config.sites or tuple(kind for kind in _KINDS if kind in layers)
    once = config.once or tuple(name for name in _ONCE if name in sites)
    return _Axes(kinds, once, {kind: layers.get(kind, 0) for kind in kinds}, ())


def _ranges(pipe: Any, run_once: Callable[[], Any]) -> tuple[tuple[int, ...], ...]:
    """The steps of a run in a few ranges; a pipeline knows how many there are when it has run."""
    if hasattr(pipe, "read"):
        return ((0,),)
    run_once()
    count = find_family(pipe).steps(pipe, "visual")
    edges = np.linspace(0, count, min(count, _RANGES) + 1).round().astype(int).tolist()
    return tuple(tuple(range(a, b)) for a, b in pairwise(edges))


def _words(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"


def _places(axes: _Axes) -> list[tuple[str, str, str, Place]]:
    """(kind, layers, steps, place) of everything that is patched."""
    found = [(name, "-", "-", Place((name,))) for name in axes.once]
    ranges = axes.ranges if len(axes.ranges) > 1 else ()
    for kind in axes.kinds:
        found.append((kind, "all", "all", Place((kind,))))
        found += [(kind, "all", _words(steps), Place((kind,), steps)) for steps in ranges]
        for begin in range(1, len(ranges) - 1):
            steps = sum(ranges[begin:], ())
            found.append((kind, "all", _words(steps), Place((kind,), steps)))
        found += [(kind, str(i), "all", Place((f"{kind}.{i}",))) for i in range(axes.layers[kind])]
    return found


def _proposal(rows: list[_Row]) -> dict[str, Any]:
    """What to fit: of the site that does most, the smallest late part of the steps and the best layer.

    The steps are the fewest last ones that do 95 % of what all do; the layer is the one that does most alone.
    """
    whole = [row for row in rows if row.layers == "all" and row.steps == "all"]
    if not whole:
        return {}
    top = max(whole, key=lambda row: row.score.value)
    last = max((row.place.steps[-1] for row in rows if row.kind == top.kind and row.place.steps), default=None)
    late = [row for row in rows if row.kind == top.kind and row.place.steps and row.place.steps[-1] == last]
    enough = [row for row in late if row.score.value >= 0.95 * top.score.value]
    chosen = min(enough, key=lambda row: len(row.place.steps or ()), default=top)
    single = [row for row in rows if row.kind == top.kind and row.layers.isdigit()]
    layer = max(single, key=lambda row: row.score.value, default=None)
    alone = {} if layer is None else {"layer": int(layer.layers), "layer_rate": layer.score.as_dict()}
    return {"site": chosen.kind, "steps": chosen.steps, "target_rate": chosen.score.as_dict(), **alone}


def _report(
    run: Run, tasks: list[_Task], rows: dict[str, list[_Row]], ends: dict[str, tuple[Rate, Rate]], axes: _Axes
) -> None:
    sections = [_section(run, task, rows[task.slug], ends[task.slug], axes) for task in tasks]
    text = Paragraph(
        f"Activations of the target prompt's run were patched into the source prompt's run, {len(tasks[0].source)} "
        "pairs of prompts that share their noise. A place that turns the result carries the difference; fitting a "
        "method there can turn it, elsewhere it cannot. Both halves of the batch (with and without text) are patched; "
        "texts are patched token by token."
    )
    sections.append(Section("how", "How this was made", [text]))
    lead = []
    for task in tasks:
        found = _proposal(rows[task.slug])
        if found:
            steps = "" if found["steps"] == "all" else f" at steps {found['steps']}"
            best = (
                f", layer {found['layer']} alone {_percent(found['layer_rate']['value'])} %" if "layer" in found else ""
            )
            share = _percent(found["target_rate"]["value"])
            lead.append(f"{task.name}: patching {found['site']}{steps} goes {share} % of the way{best}.")
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet."
    run.write_text("report.html", render(Report("Where a concept lives", " ".join(lead), sections, footer)))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _section(run: Run, task: _Task, rows: list[_Row], ends: tuple[Rate, Rate], axes: _Axes) -> Section:
    blocks: list[Paragraph | Facts | Table | Figure] = [
        Facts(
            [
                ("unpatched", f"{_percent(ends[0].value)} %", f"source prompts: {task.what}"),
                ("prompt swap", f"{_percent(ends[1].value)} %", f"target prompts: {task.what}"),
            ]
        )
    ]
    scores = {(row.kind, row.layers, row.steps): row.score.value for row in rows}
    words = [_words(steps) for steps in axes.ranges] if len(axes.ranges) > 1 else []
    most = max(axes.layers.values(), default=0)
    layers = [str(i) for i in range(most)]
    for name, columns, key in (
        ("step", words, lambda kind, column: (kind, "all", column)),
        ("layer", layers, lambda kind, column: (kind, column, "all")),
    ):
        if columns and axes.kinds:
            values = [[scores.get(key(kind, column), float("nan")) for column in columns] for kind in axes.kinds]
            title = f"{task.name}: one {name}, all {'layers' if name == 'step' else 'steps'}"
            light = heatmap(values, axes.kinds, columns, x=name, title=title)
            dark = heatmap(values, axes.kinds, columns, x=name, title=title, theme="dark")
            write_bytes(run.path(f"figures/{task.slug}-{name}.png"), light)
            blocks.append(Figure(light, f"{task.what} by site and {name}", title, dark))
    whole = [row for row in rows if row.layers in ("all", "-") and row.steps not in words]
    cells = [
        [row.kind, row.steps, f"{_percent(row.score.value)} [{_percent(row.score.low)}, {_percent(row.score.high)}]"]
        for row in whole
    ]
    blocks.append(Table(f"{task.what}, %.", ["site", "steps", "score"], cells))
    return Section(task.slug, task.name, blocks)
