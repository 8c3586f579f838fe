"""From images to figures: rates with intervals, distances, change outside the object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pysteer.errors import InputError
from pysteer.metrics import Rate, change_outside, frechet_distance, rate, relative_rate
from pysteer.recipes.prototype.config import Kind, PrototypeConfig
from pysteer.recipes.prototype.data import Pair
from pysteer.recipes.prototype.experiment import ImageSet, PairImages
from pysteer.recipes.prototype.judge import Judge, Judgement
from pysteer.recipes.prototype.settings import Group
from pysteer.zoo.shapes.captions import parse_caption

_NOTHING = Rate(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Measured:
    """One setting, measured.

    Attributes:
        target: share of images that show the target class.
        source: share that still shows the source class.
        kept: attribute -> share of images that show what the prompt states, among prompts that state it.
        relative: the same divided by the unsteered share of the same prompts.
        all_relative: share that shows every other stated attribute, divided by the unsteered share.
        outside: mean absolute pixel change outside the object, 0..1.
        distance, to_swap: squared Frechet distance of classifier features to the baseline and to the prompt swap.
    """

    key: str
    label: str
    group: Group
    kind: str
    strength: float
    count: int
    target: Rate = _NOTHING
    source: Rate = _NOTHING
    kept: dict[str, Rate] = field(default_factory=dict)
    relative: dict[str, Rate] = field(default_factory=dict)
    all_relative: Rate = _NOTHING
    outside: float = math.nan
    distance: float = math.nan
    to_swap: float = math.nan

    @property
    def lowest(self) -> tuple[str, Rate]:
        """The other attribute that suffered most, and its rate relative to the unsteered one."""
        if not self.relative:
            return "", _NOTHING
        return min(self.relative.items(), key=lambda item: item[1].value)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for summary.json."""
        name, lowest = self.lowest
        return {
            "setting": self.key,
            "label": self.label,
            "group": self.group,
            "kind": self.kind,
            "strength": self.strength,
            "prompts": self.count,
            "target_rate": self.target.as_dict(),
            "source_rate": self.source.as_dict(),
            "kept_rate": lowest.value,
            "kept_lowest": name,
            "kept": {key: value.as_dict() for key, value in self.kept.items()},
            "kept_relative": {key: value.as_dict() for key, value in self.relative.items()},
            "kept_all_relative": self.all_relative.as_dict(),
            "change_outside": self.outside,
            "feature_distance": self.distance,
            "feature_distance_to_swap": self.to_swap,
        }


@dataclass(frozen=True)
class Beside:
    """Prompts of other classes under one kind of steering: own class kept, and how often the gate was open."""

    kind: str
    unsteered: Rate
    steered: Rate
    relative: Rate
    passed: Rate
    sources_passed: Rate

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "own_class_unsteered": self.unsteered.as_dict(),
            "own_class_steered": self.steered.as_dict(),
            "own_class_relative": self.relative.as_dict(),
            "gate_open_for_others": self.passed.as_dict(),
            "gate_open_for_sources": self.sources_passed.as_dict(),
        }


@dataclass
class PairResults:
    """Everything measured for a pair; `rows` has one entry per image."""

    pair: Pair
    headline: dict[str, Measured]
    doses: dict[Kind, list[Measured]]
    beside: list[Beside]
    identical: dict[Kind, bool]
    rows: list[dict[str, Any]]


class _View:
    """An image set with what the judge saw in it, and what its prompts asked for."""

    def __init__(self, images: ImageSet, judgement: Judgement | None, pair: Pair) -> None:
        self.images, self.judgement = images, judgement
        words = images.prompts.source
        self.wanted = [_stated(prompt, pair) for prompt in words]

    def shows(self, attribute: str, value: str) -> list[bool]:
        labels = self.judgement.labels.get(attribute, []) if self.judgement else []
        return [label == value for label in labels]

    def hits(self, attribute: str) -> list[bool | None]:
        """Per image: whether the stated value was seen; None where the prompt states none."""
        labels = self.judgement.labels[attribute] if self.judgement else []
        return [
            None if attribute not in wanted else label == wanted[attribute]
            for wanted, label in zip(self.wanted, labels, strict=False)
        ]

    def first(self, count: int) -> _View:
        view = _View.__new__(_View)
        view.images, view.wanted = self.images.first(count), self.wanted[:count]
        view.judgement = None
        if self.judgement is not None:
            labels = {key: words[:count] for key, words in self.judgement.labels.items()}
            view.judgement = Judgement(labels, self.judgement.features[:count])
        return view


def _stated(prompt: str, pair: Pair) -> dict[str, str]:
    if pair.attribute == "class":
        return {}
    try:
        return parse_caption(prompt)
    except InputError:  # free text: only the class can be judged
        return {}


def measure(made: PairImages, judge: Judge | None, config: PrototypeConfig) -> PairResults:
    """Judge all images of a pair. Without a judge only the pixel change is measured."""
    pair = made.data.pair

    def view(images: ImageSet) -> _View:
        return _View(images, None if judge is None else judge(images.images), pair)

    views = {key: view(images) for key, images in made.headline.items()}
    base, swap = views["baseline"], views["swap"]
    headline = {key: _measure(seen, base, swap, pair, config) for key, seen in views.items()}
    rows = [row for seen in views.values() for row in _rows(seen, base, pair, "headline")]
    doses: dict[Kind, list[Measured]] = {}
    for kind, sets in made.doses.items():
        seen_sets = [views[s.setting.key].first(len(s.prompts)) if s.setting.key in views else view(s) for s in sets]
        count = len(sets[0].prompts)
        first, first_swap = base.first(count), swap.first(count)
        doses[kind] = [_measure(seen, first, first_swap, pair, config) for seen in seen_sets]
        rows += [
            row
            for seen in seen_sets
            if seen.images.setting.key not in views
            for row in _rows(seen, first, pair, "dose")
        ]
    beside_views = {key: view(images) for key, images in made.beside.items()}
    beside = [_beside(kind, beside_views, made, pair) for kind in made.doses if kind in beside_views]
    for seen in beside_views.values():
        rows += _rows(seen, beside_views["baseline"], pair, "other classes")
    return PairResults(pair, headline, doses, beside if judge is not None else [], made.identical, rows)


def _measure(seen: _View, base: _View, swap: _View, pair: Pair, config: PrototypeConfig) -> Measured:
    setting, images = seen.images.setting, seen.images.images
    outside = change_outside(base.images.images, images)
    mean = float(outside.nanmean()) if bool(torch.isfinite(outside).any()) else math.nan
    plain = Measured(setting.key, setting.label, setting.group, setting.kind, setting.level, len(images), outside=mean)
    if seen.judgement is None or base.judgement is None or swap.judgement is None:
        return plain
    kept, relative = {}, {}
    others = [name for name in seen.judgement.labels if name != pair.attribute]
    for name in others:
        mine, theirs = _stated_rows(seen.hits(name), base.hits(name))
        if mine:
            kept[name], relative[name] = rate(mine), relative_rate(mine, theirs)
    everything = [all(hit is not False for hit in row) for row in zip(*(seen.hits(n) for n in others), strict=True)]
    before = [all(hit is not False for hit in row) for row in zip(*(base.hits(n) for n in others), strict=True)]
    far = config.fid and len(images) >= 2
    features = seen.judgement.features
    return replace(
        plain,
        kept=kept,
        relative=relative,
        target=rate(seen.shows(pair.attribute, pair.target)),
        source=rate(seen.shows(pair.attribute, pair.source)),
        all_relative=relative_rate(everything, before) if kept else _NOTHING,
        distance=frechet_distance(features, base.judgement.features) if far else math.nan,
        to_swap=frechet_distance(features, swap.judgement.features) if far else math.nan,
    )


def _stated_rows(mine: Sequence[bool | None], theirs: Sequence[bool | None]) -> tuple[list[bool], list[bool]]:
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _beside(kind: str, views: dict[str, _View], made: PairImages, pair: Pair) -> Beside:
    plain, steered = views["baseline"], views[kind]
    before, after = _stated_rows(plain.hits(pair.attribute), steered.hits(pair.attribute))
    own = made.headline[kind].gate
    gate = steered.images.gate
    return Beside(
        kind,
        rate(before),
        rate(after),
        relative_rate(after, before),
        _NOTHING if gate is None else rate(gate > 0),
        _NOTHING if own is None else rate(own > 0),
    )


def _rows(seen: _View, base: _View, pair: Pair, part: str) -> list[dict[str, Any]]:
    """One row per image for metrics.parquet."""
    setting, prompts = seen.images.setting, seen.images.prompts
    words = prompts.target if setting.swapped else prompts.source
    outside = change_outside(base.images.images, seen.images.images).tolist()
    gate = [1.0] * len(words) if seen.images.gate is None else seen.images.gate.tolist()
    labels = seen.judgement.labels if seen.judgement else {}
    rows = []
    for i, prompt in enumerate(words):
        row: dict[str, Any] = {
            "pair": pair.slug,
            "part": part,
            "setting": setting.key,
            "group": setting.group,
            "kind": setting.kind,
            "strength": float(setting.level),
            "row": i,
            "prompt": prompt,
            "seed": prompts.seeds[i],
            "gate_open": gate[i] > 0,
            "change_outside": outside[i] if math.isfinite(outside[i]) else None,
        }
        for name, seen_words in labels.items():
            row[f"shows_{name}"] = seen_words[i]
            row[f"stated_{name}"] = seen.wanted[i].get(name)
        rows.append(row)
    return rows
