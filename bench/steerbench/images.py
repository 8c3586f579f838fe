"""SteerBench with generators of images of shapes: fit, search the strength, judge fresh images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.steerbench.cells import Cell, Sizes, plain
from pysteer.capture import Examples, Fitted
from pysteer.errors import InputError
from pysteer.metrics import change_outside, frechet_distance
from pysteer.recipes.comparison.contenders import Contender, find_contenders
from pysteer.recipes.comparison.places import Place
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.judge import Judgement, ShapesJudge
from pysteer.recipes.prototype.painter import Painter
from pysteer.steering import Plan
from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import ATTRIBUTES, compatible, parse_caption, sample_scenes

KEEP = 0.95  # of the unsteered rate of the other attributes that a strength should keep
# Concept -> what source prompts show, and what target prompts show instead. None stands for any other value: the
# concept is then that the source's value is gone.
CONCEPTS: dict[str, tuple[dict[str, str], dict[str, str | None]]] = {
    "shape": ({"shape": "circle"}, {"shape": "square"}),
    "colour": ({"colour": "red"}, {"colour": "blue"}),
    "both": ({"shape": "circle", "colour": "red"}, {"shape": "square", "colour": "blue"}),
    "negation": ({"shape": "star"}, {"shape": None}),
}
_SETTINGS: dict[str, dict[str, Any]] = {"diffusion-shapes": {"num_inference_steps": 12}}
_BATCH = {"infinity-shapes": 25, "diffusion-shapes": 24}


@dataclass(frozen=True)
class Drawn:
    """Prompts with the same scenes under the target concept, and noise seeds."""

    source: list[str]
    target: list[str]
    seeds: list[int]


def draw(concept: str, count: int, seed: int, avoid: Sequence[str] = ()) -> Drawn:
    """`count` prompts of the concept, none of `avoid`, as long as there are others."""
    given, wanted = CONCEPTS[concept]
    rng = random.Random(seed)
    taken, source, target = set(avoid), [], []
    for attempt in range(200):
        for scene in sample_scenes(count, seed * 1000 + attempt, given):
            values = {
                name: value or rng.choice([v for v in ATTRIBUTES[name] if v != given[name]])
                for name, value in wanted.items()
            }
            other = replace(scene, **values)
            fresh = scene.caption not in taken or attempt > 100
            if fresh and compatible(other.colour, other.background) and len(source) < count:
                source.append(scene.caption)
                target.append(other.caption)
        if len(source) == count:
            break
    return Drawn(source, target, [rng.randrange(2**31) for _ in source])


def bystanders(concept: str, count: int, seed: int) -> Drawn:
    """Prompts that show another value of the attributes the concept is about."""
    given, _ = CONCEPTS[concept]
    rng = random.Random(seed + 17)
    captions = []
    for i in range(count):
        fixed = {name: rng.choice([v for v in ATTRIBUTES[name] if v != value]) for name, value in given.items()}
        captions.append(sample_scenes(1, seed * 1000 + i, fixed)[0].caption)
    return Drawn(captions, captions, [rng.randrange(2**31) for _ in captions])


def hits(seen: Judgement, concept: str) -> list[bool]:
    """Whether each image shows the target."""
    given, wanted = CONCEPTS[concept]
    found = [True] * len(next(iter(seen.labels.values())))
    for name, value in wanted.items():
        for i, label in enumerate(seen.labels[name]):
            found[i] = found[i] and (label == value if value is not None else label != given[name])
    return found


def shows_stated(seen: Judgement, prompts: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Whether each image shows everything of `names` that its prompt states."""
    stated = [parse_caption(prompt) for prompt in prompts]
    return [all(seen.labels[n][i] == words[n] for n in names if n in words) for i, words in enumerate(stated)]


def spread(features: Tensor) -> float:
    """Mean distance between the features of two images: how different the images are."""
    return float(torch.pdist(features.float()).mean())


def rising(rates: Sequence[float]) -> float:
    """Share of pairs of strengths where the higher one reaches the target at least as often."""
    pairs = [(a, b) for i, a in enumerate(rates) for b in rates[i + 1 :]]
    return sum(b >= a for a, b in pairs) / max(1, len(pairs))


class ImageBench:
    """Measures cells with one generator; unsteered images of a concept and seed are made once.

    Args:
        generator: its name; settings and batch size go by it.
        pipe: a pipeline that draws the captions of the shapes task.
        sizes: how much is measured.
    """

    def __init__(self, generator: str, pipe: Any, sizes: Sizes) -> None:
        self.pipe, self.sizes = pipe, sizes
        if hasattr(self.pipe, "pipe"):
            self.pipe.pipe.set_progress_bar_config(disable=True)
        config = PrototypeConfig(batch_size=_BATCH.get(generator, 32))
        self.painter = Painter(self.pipe, config, _SETTINGS.get(generator, {}))
        self.judge = ShapesJudge(load_classifier("shapes"))
        self.known: dict[tuple[str, int], dict[str, Any]] = {}
        self.examples: dict[tuple[str, int, Place], Examples] = {}

    def _paint(
        self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan | None = None, level: Any = 1.0
    ) -> Tensor:
        images: Tensor = self.painter.paint(prompts, seeds, lambda count: None, plan=plan, strength=level)
        return images

    def _base(self, concept: str, seed: int) -> dict[str, Any]:
        """Prompts of a concept and seed, what the model makes of them unsteered, and of the target prompts."""
        if (concept, seed) not in self.known:
            sizes = self.sizes
            most = max((sizes.pairs, *sizes.efficiency))
            fitted = draw(concept, most, 4 * seed + 1)
            search = draw(concept, sizes.search, 4 * seed + 2, fitted.source)
            fresh = draw(concept, sizes.prompts, 4 * seed + 3, [*fitted.source, *search.source])
            beside = bystanders(concept, sizes.beside, 4 * seed + 4)
            base: dict[str, Any] = {"fit": fitted, "search": search, "fresh": fresh, "beside": beside}
            for name in ("search", "fresh", "beside"):
                images = self._paint(base[name].source, base[name].seeds)
                base |= {f"{name} images": images, f"{name} seen": self.judge(images)}
            swapped = self._paint(fresh.target, fresh.seeds)
            base["swap images"], base["swap seen"] = swapped, self.judge(swapped)
            self.known[concept, seed] = base
        return self.known[concept, seed]

    def _others(self, concept: str, seen: Judgement) -> list[str]:
        return [name for name in seen.labels if name not in CONCEPTS[concept][0]]

    def _examples(self, cell: Cell, place: Place, data: Drawn) -> Examples:
        """The examples of a concept and seed at a place, run once for all the cells that are fitted on them."""
        key = (cell.concept, cell.seed, place)
        if key not in self.examples:
            self.examples = {k: kept for k, kept in self.examples.items() if k[:2] == key[:2]}
            self.examples[key] = Examples(
                self.pipe, data.source, data.target, sites=place.sites, steps=place.steps, seeds=data.seeds,
                batch_size=self.painter.batch_size, settings=self.painter.settings,
            )  # fmt: skip
        return self.examples[key]

    def _fit(self, cell: Cell, contender: Contender, data: Drawn) -> Fitted:
        fitted = self._examples(cell, contender.place, data).fit(
            contender.method, first=cell.pairs, sequential=contender.place.sequential, fit_seed=cell.seed,
            control="shuffled" if cell.control == "shuffled" else None,
        )  # fmt: skip
        return fitted.random_direction(cell.seed) if cell.control == "random" else fitted

    def _search(self, cell: Cell, contender: Contender, plan: Plan, base: dict[str, Any]) -> list[dict[str, float]]:
        """Target rate and kept rate, relative to unsteered, at every strength."""
        data, levels = base["search"], contender.strengths
        count = len(data.source)
        level = torch.tensor(levels).repeat_interleave(count)
        images = self._paint(data.source * len(levels), data.seeds * len(levels), plan, level)
        others = self._others(cell.concept, base["search seen"])
        before = sum(shows_stated(base["search seen"], data.source, others))
        found = []
        for strength, part in zip(levels, images.split(count), strict=True):
            seen = self.judge(part)
            reached = sum(hits(seen, cell.concept)) / count
            kept = sum(shows_stated(seen, data.source, others)) / max(1, before)
            found.append({"strength": strength, "target": reached, "kept": kept})
        return found

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything about a cell; lists have an entry per fresh prompt."""
        base = self._base(cell.concept, cell.seed)
        attribute = next(iter(CONCEPTS[cell.concept][0]))
        contender = find_contenders([cell.method], self.pipe, attribute)[0]
        try:
            plan = self._fit(cell, contender, base["fit"]).plan()
        except InputError as error:  # some methods have no such control
            return {"left_out": str(error)}
        doses = self._search(cell, contender, plan, base)
        chosen = choose(doses)
        fresh = base["fresh"]
        images = self._paint(fresh.source, fresh.seeds, plan, chosen["strength"])
        seen, before = self.judge(images), base["fresh seen"]
        beside = base["beside"]
        aside = self.judge(self._paint(beside.source, beside.seeds, plan, chosen["strength"]))
        others, own = self._others(cell.concept, seen), list(CONCEPTS[cell.concept][0])
        return {
            "strength": chosen["strength"],
            "place": contender.place.label,
            "doses": doses,
            "monotone": rising([dose["target"] for dose in doses]),
            "target": hits(seen, cell.concept),
            "target_unsteered": hits(before, cell.concept),
            "target_swap": hits(base["swap seen"], cell.concept),
            "kept": shows_stated(seen, fresh.source, others),
            "kept_unsteered": shows_stated(before, fresh.source, others),
            "beside": shows_stated(aside, beside.source, own),
            "beside_unsteered": shows_stated(base["beside seen"], beside.source, own),
            "outside": [plain(value) for value in change_outside(base["fresh images"], images).tolist()],
            "distance": frechet_distance(seen.features, before.features),
            "diversity": spread(seen.features) / spread(before.features),
        }


def choose(doses: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the strengths that keep enough the one that reaches the target most often, else the one that keeps most."""
    good = [dose for dose in doses if dose["kept"] >= KEEP]
    if not good:
        return max(doses, key=lambda dose: (dose["kept"], dose["target"]))
    return max(good, key=lambda dose: (dose["target"], -dose["strength"]))
