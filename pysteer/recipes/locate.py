"""Recipe `locate`: where in an Infinity generator the difference between two classes lives.

Activations of the target prompt's run are patched into the source prompt's run, for every kind of site by scale and by
layer, and a classifier says how often the picture turns into the target class. What turns it is worth fitting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.locate import Located, Place, locate
from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.files import write_bytes
from pysteer.metrics.rates import Rate, rate
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.data import Pair, noise_seeds, parse_pair
from pysteer.recipes.prototype.generator import load_generator
from pysteer.report.heatmap import heatmap
from pysteer.report.report import Facts, Figure, Paragraph, Report, Section, Table, render
from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import sample_pairs


@dataclass(frozen=True)
class LocateConfig:
    """Which pair of classes, and where to look.

    Attributes:
        infinity: a bundled generator, a pipeline folder, or an infinity_configuration.yml.
        pairs: pairs of classes, `source->target`, two shapes or two colours each.
        sites: kinds of sites that are patched by scale and by layer.
        once: sites that run once, patched as a whole.
        prompts: prompt pairs; the same noise for both.
        batch_size: most prompts in a batch.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: seed of prompts and noise.
    """

    infinity: str = "infinity-shapes"
    pairs: tuple[str, ...] = field(default=("circle->square", "red->blue"))
    sites: tuple[str, ...] = field(default=("sa", "ca", "ffn", "ca_block"))
    once: tuple[str, ...] = field(default=("text.output", "pooled"))
    prompts: int = 48
    batch_size: int = 288
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise InputError("prompts", value=self.prompts, allowed="a whole number from 2")
        if not self.pairs or not (self.sites or self.once):
            raise InputError("pairs, sites, once", value="none", allowed="at least one pair and one site")


@dataclass(frozen=True)
class _Row:
    """One place: the kind of site, its layers and its scales in words, and the rate of the target class."""

    kind: str
    layers: str
    scales: str
    place: Place
    rate: Rate


@recipe("locate", LocateConfig)
def run_locate(config: LocateConfig, run: Run) -> Summary:
    """Find the sites and scales that carry the difference between two classes, by patching activations."""
    generator = load_generator(config.infinity, config.device)
    pipe, classifier = generator.pipe, load_classifier("shapes")
    size = generator.size
    pairs = [parse_pair(text, 1) for text in config.pairs]
    named = _places(config, size.layers, size.scales)
    for *_, place in named:  # a misspelt site is found before anything is generated
        choose_sites(find_family(pipe), pipe, place.sites)
    rows: dict[str, list[_Row]] = {}
    ends: dict[str, tuple[Rate, Rate]] = {}
    with run.progress.task("places", len(named) * len(pairs)) as advance:
        for pair in pairs:
            found = _locate(config, run, pipe, classifier, pair, [place for *_, place in named], advance)
            hits = [rate((scores > 0.5).numpy()) for scores in found.scores]
            rows[pair.slug] = [_Row(*name, hit) for name, hit in zip(named, hits, strict=True)]
            ends[pair.slug] = (rate((found.source > 0.5).numpy()), rate((found.target > 0.5).numpy()))
    tables = [
        {"pair": slug, "site": row.kind, "layers": row.layers, "scales": row.scales, **row.rate.as_dict()}
        for slug, every in rows.items()
        for row in every
    ]
    run.write_parquet("metrics.parquet", tables)
    _report(run, config, pairs, rows, ends, size.layers, size.scales)
    first = pairs[0].slug
    top = max(rows[first], key=lambda row: row.rate.value)
    best = {"pair": first, "site": top.kind, "layers": top.layers, "scales": top.scales, "target_rate": top.rate.value}
    headline = {slug: {"proposed": _proposal(every)} for slug, every in rows.items()}
    return Summary(best=best, headline=headline, tables={"places": tables})


def _places(config: LocateConfig, layers: int, scales: int) -> list[tuple[str, str, str, Place]]:
    """(kind, layers, scales, place) of everything that is patched."""
    found = [(name, "-", "-", Place((name,))) for name in config.once]
    for kind in config.sites:
        found.append((kind, "all", "all", Place((kind,))))
        found += [(kind, "all", str(s), Place((kind,), (s,))) for s in range(scales)]
        found += [
            (kind, "all", f"{s}-{scales - 1}", Place((kind,), tuple(range(s, scales)))) for s in range(1, scales - 1)
        ]
        found += [(kind, str(i), "all", Place((f"{kind}.{i}",))) for i in range(layers)]
    return found


def _locate(
    config: LocateConfig, run: Run, pipe: Any, classifier: Any, pair: Pair, places: list[Place], advance: Any
) -> Located:
    drawn = sample_pairs(
        config.prompts, pair.attribute, pair.source, pair.target, run.derive_seed("captions", pair.slug)
    )

    def shows_target(out: Any) -> Tensor:
        labels = classifier.classify(out.images.cpu()).labels[pair.attribute]
        return torch.tensor([float(label == pair.target) for label in labels])

    return locate(
        pipe,
        [source.caption for source, _ in drawn],
        [target.caption for _, target in drawn],
        places,
        score=shows_target,
        seeds=noise_seeds(config.prompts, run.derive_seed("noise", pair.slug)),
        batch_size=max(config.batch_size, 2 * config.prompts),
        progress=advance,
    )


def _proposal(rows: list[_Row]) -> dict[str, Any]:
    """The smallest part of the late scales of a site that does what the whole site does, of the site that does most."""
    whole = [row for row in rows if row.layers == "all" and row.scales == "all"]
    if not whole:
        return {}
    top = max(whole, key=lambda row: row.rate.value)
    late = [row for row in rows if row.kind == top.kind and "-" in row.scales and row.layers == "all"]
    enough = [row for row in late if row.rate.value >= 0.95 * top.rate.value]
    chosen = min(enough, key=lambda row: len(row.place.steps or ()), default=top)
    return {"site": chosen.kind, "scales": chosen.scales, "target_rate": chosen.rate.as_dict()}


def _report(
    run: Run,
    config: LocateConfig,
    pairs: list[Pair],
    rows: dict[str, list[_Row]],
    ends: dict[str, tuple[Rate, Rate]],
    layers: int,
    scales: int,
) -> None:
    sections = [_section(run, config, pair, rows[pair.slug], ends[pair.slug], layers, scales) for pair in pairs]
    text = Paragraph(
        f"Activations of the target prompt's run were patched into the source prompt's run, {config.prompts} pairs of "
        "prompts that differ in the class word and share their noise. A place that turns the picture carries the "
        "difference; fitting a method there can turn it, elsewhere it cannot. Both halves of the batch (with and "
        "without text) are patched; texts are patched token by token."
    )
    sections.append(Section("how", "How this was made", [text]))
    lead = [
        f"{pair.name}: {found['site']} at scales {found['scales']} turns {_percent(found['target_rate']['value'])} % "
        "when patched."
        for pair in pairs
        if (found := _proposal(rows[pair.slug]))
    ]
    footer = f"pysteer run {run.recipe}; configuration {run.hash}; all numbers are in metrics.parquet."
    run.write_text("report.html", render(Report("Where a concept lives", " ".join(lead), sections, footer)))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _section(
    run: Run, config: LocateConfig, pair: Pair, rows: list[_Row], ends: tuple[Rate, Rate], layers: int, scales: int
) -> Section:
    blocks: list[Paragraph | Facts | Table | Figure] = [
        Facts(
            [
                ("unpatched", f"{_percent(ends[0].value)} %", f"source prompts that show the {pair.target}"),
                ("prompt swap", f"{_percent(ends[1].value)} %", f"target prompts that show the {pair.target}"),
            ]
        )
    ]
    rates = {(row.kind, row.layers, row.scales): row.rate.value for row in rows}
    by_scale = [[rates[kind, "all", str(s)] for s in range(scales)] for kind in config.sites]
    by_layer = [[rates[kind, str(i), "all"] for i in range(layers)] for kind in config.sites]
    for name, values, caption in (
        ("scale", by_scale, "one scale, all layers"),
        ("layer", by_layer, "one layer, all scales"),
    ):
        if values:
            columns, title = [str(i) for i in range(len(values[0]))], f"{pair.name}: {caption}"
            light = heatmap(values, config.sites, columns, x=name, title=title)
            dark = heatmap(values, config.sites, columns, x=name, title=title, theme="dark")
            write_bytes(run.path(f"figures/{pair.slug}-{name}.png"), light)
            blocks.append(Figure(light, f"Rate of {pair.target} by site and {name}", caption, dark))
    whole = [row for row in rows if row.layers in ("all", "-") and not row.scales.isdigit()]
    cells = [
        [row.kind, row.scales, f"{_percent(row.rate.value)} [{_percent(row.rate.low)}, {_percent(row.rate.high)}]"]
        for row in whole
    ]
    blocks.append(Table(f"Pictures that show the {pair.target}, %.", ["site", "scales", "target class"], cells))
    return Section(pair.slug, pair.name, blocks)
