"""One pair of classes: fit every method, search its strength, and measure it on fresh prompts beside its controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pysteer.capture import Examples, Fitted
from pysteer.errors import InputError
from pysteer.recipes.comparison.config import MethodsConfig
from pysteer.recipes.comparison.contenders import Contender
from pysteer.recipes.comparison.places import Place
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.data import PairData, Prompts
from pysteer.recipes.prototype.experiment import ImageSet, PairImages
from pysteer.recipes.prototype.judge import Judge
from pysteer.recipes.prototype.painter import Painter, load_sheets, save_sheets
from pysteer.recipes.prototype.results import Measured, PairResults, measure
from pysteer.recipes.prototype.settings import Group, Setting
from pysteer.steering import Plan

Advance = Callable[[float], None]
_CONTROLS = {"random": "random direction", "shuffled": "shuffled labels"}
UNSTEERED = Setting("baseline", "unsteered", "reference")
SWAP = Setting("swap", "prompt swap (ceiling)", "reference", swapped=True)


def kept(measured: Measured) -> float:
    """The rate of the attribute that suffered most, as a share of its unsteered rate; 1 where none can be judged."""
    values = [rate.value for rate in measured.relative.values() if not math.isnan(rate.value)]
    return min(values, default=1.0)


def choose(doses: Sequence[Measured], least: float) -> Measured:
    """The strength of a method, by the rule of the comparison.

    Of the strengths that keep at least `least` of the unsteered rate of every other attribute the one with the highest
    target rate, of equal ones the one with the lowest feature distance. Where none keeps that much, the one that keeps
    most.
    """
    good = [m for m in doses if kept(m) >= least]
    if not good:
        return max(doses, key=lambda m: (kept(m), m.target.value))
    return min(good, key=lambda m: (-m.target.value, math.inf if math.isnan(m.distance) else m.distance))


def around(best: float, levels: Sequence[float]) -> tuple[float, float]:
    """The strengths halfway to the neighbours of the best one; 0 is the first's, and the last's lies as far beyond."""
    order = sorted(levels)
    at = order.index(best)
    below = order[at - 1] if at else 0.0
    above = order[at + 1] if at + 1 < len(order) else 2 * best - below
    return (below + best) / 2, (best + above) / 2


@dataclass
class Outcome:
    """What became of a method.

    Attributes:
        contender: the method.
        doses: measured on the search prompts, a row a strength.
        chosen: the one of `doses` that was chosen.
        fitted: its parameters.
        images: `main`, `random` and `shuffled` -> images of the fresh prompts.
    """

    contender: Contender
    doses: list[Measured]
    chosen: Measured
    fitted: Fitted
    images: dict[str, ImageSet] = field(default_factory=dict)


@dataclass
class PairOutcome:
    """Everything about a pair: measured on the search prompts and on the fresh ones."""

    data: PairData
    outcomes: list[Outcome]
    search: PairResults
    results: PairResults
    images: dict[str, ImageSet]


class PairTrial:
    """Runs the comparison for one pair; every part is a stage of the run, so a second start continues.

    Args:
        run: the run.
        painter: makes the images.
        judge: looks at them.
        data: the prompts; the first `search` of its test prompts choose the strength, the rest are fresh.
        contenders: the methods.
        search: how many prompts choose the strength.
        identity: plain values that identify the generator.
    """

    def __init__(
        self,
        run: Run,
        painter: Painter,
        judge: Judge,
        data: PairData,
        contenders: Sequence[Contender],
        search: int,
        identity: Any,
    ) -> None:
        self.run, self.painter, self.judge, self.contenders = run, painter, judge, list(contenders)
        self.config: MethodsConfig = run.config
        self.slug = data.pair.slug
        test = data.test
        self.search = replace(data, test=test.first(search))
        self.fresh = replace(data, test=Prompts(test.source[search:], test.target[search:], test.seeds[search:]))
        self.inputs = [identity, config_hash(data)]
        self.examples: dict[Place, Examples] = {}

    @property
    def planned(self) -> int:
        """How many images will be generated, fits included."""
        searched, fresh = len(self.search.test), len(self.fresh.test)
        fits = sum(self._fit_cost(each) for each in self.contenders)
        doses = sum(len(each.strengths) + 2 * self.config.refine for each in self.contenders) * searched
        controls = min(self.config.controls, len(self.contenders))
        most = max((self._fit_cost(each) for each in self.contenders), default=0)
        rows = len(self.contenders) + controls + min(1, controls) + 2
        return fits + doses + rows * fresh + controls * most + 2 * searched

    def _fit_cost(self, contender: Contender) -> int:
        """Images that a fit needs: the first one at a place runs all prompts, a sequential one always its source."""
        place, pairs = contender.place, self.config.fit_pairs
        if all(site.startswith("text") for site in place.sites):
            return 0
        first = next(each for each in self.contenders if each.place == place) is contender
        return 2 * pairs if first else pairs if place.sequential else 0

    def generate(self, advance: Advance) -> PairOutcome:
        """Fit, search and measure everything; `advance(n)` is told about n finished images."""
        before = self._references("search/", self.search, advance)
        searched = dict(before)
        fits, names = {}, {}
        for each in self.contenders:
            fits[each.key] = self._fit(each, None, advance)
            doses = self._searched(each, fits[each.key], before, advance)
            names[each.key] = list(doses)
            searched |= doses
        search = self._judged(searched)
        outcomes = []
        for each in self.contenders:
            measured = [search.headline[name] for name in names[each.key]]
            outcomes.append(Outcome(each, measured, choose(measured, self.config.keep), fits[each.key]))
        images = self._references("", self.fresh, advance)
        controls = self._controls(outcomes, advance)
        self.examples.clear()  # all is fitted
        for outcome in outcomes:
            outcome.images = self._measured(outcome, controls.get(outcome.contender.key, {}), advance)
            images |= {s.setting.key: s for s in outcome.images.values()}
        results = measure(PairImages(self.fresh, headline=images), self.judge, self.config.drawn)
        for row in search.rows:
            row["part"] = "search"
        for row in results.rows:
            row["part"] = "fresh"
        return PairOutcome(self.fresh, outcomes, search, results, images)

    def _fit(self, contender: Contender, control: str | None, advance: Advance) -> Fitted:
        name = contender.key if control is None else f"{contender.key}-{control}"
        folder = self.run.path(f"fitted/{self.slug}/{name}")
        place, count = contender.place, self._fit_cost(contender)
        with self.run.stage(f"{self.slug}-fit-{name}", [*self.inputs, place], quiet=True) as stage:
            if not stage.done:
                fitted = self._examples(place).fit(
                    contender.method, sequential=place.sequential, control=control, fit_seed=self.config.seed
                )
                fitted.save_pretrained(folder)
                stage.notes["images"] = count
        advance(count)
        return Fitted.from_pretrained(folder)

    def _examples(self, place: Place) -> Examples:
        """The examples at a place; they run once for all the methods there."""
        if place not in self.examples:
            prompts = self.search.fit
            here = [each for each in self.contenders if each.place == place]
            pooled = not place.sequential and all(each.method.pooled for each in here)
            self.examples[place] = Examples(
                self.painter.pipe, prompts.source, prompts.target, sites=place.sites, steps=place.steps,
                seeds=prompts.seeds, pool="mean" if pooled else "tokens", batch_size=self.painter.batch_size,
                settings=self.painter.settings,
            )  # fmt: skip
        return self.examples[place]

    def _references(self, folder: str, data: PairData, advance: Advance) -> dict[str, ImageSet]:
        """Unsteered images and those of the target prompts, as rows of the same batches."""
        prompts, count = data.test, len(data.test)
        both = Prompts([*prompts.source, *prompts.target], prompts.source * 2, prompts.seeds * 2)
        images = self._stage(f"{folder}references", both, [None] * (2 * count), None, [], advance)
        return {
            setting.key: ImageSet(setting, prompts, part)
            for setting, part in zip((UNSTEERED, SWAP), images.split(count), strict=True)
        }

    def _judged(self, images: dict[str, ImageSet]) -> PairResults:
        return measure(PairImages(self.search, headline=images), self.judge, self.config.drawn)

    def _searched(
        self, contender: Contender, fitted: Fitted, before: dict[str, ImageSet], advance: Advance
    ) -> dict[str, ImageSet]:
        """Search prompts at all strengths of a method and around the best of them, in the order of the strengths."""
        doses = self._doses(contender, fitted, contender.strengths, "", advance)
        for again in range(1, self.config.refine + 1):
            seen = self._judged(before | doses).headline
            best = choose([seen[name] for name in doses], self.config.keep).strength
            levels = around(best, [images.setting.level for images in doses.values()])
            doses |= self._doses(contender, fitted, levels, f"-refined-{again}", advance)
        return dict(sorted(doses.items(), key=lambda item: item[1].setting.level))

    def _doses(
        self, contender: Contender, fitted: Fitted, levels: Sequence[float], part: str, advance: Advance
    ) -> dict[str, ImageSet]:
        """Search prompts at every strength: (strength, prompt) pairs are the rows of full batches."""
        prompts = self.search.test
        count, plan = len(prompts), fitted.plan()
        strength = torch.tensor(levels).repeat_interleave(count)
        images = self._stage(
            f"search/{contender.key}{part}", _repeated(prompts, len(levels)), [plan] * len(strength), strength,
            [contender.place, list(levels)], advance,
        )  # fmt: skip
        found = {}
        for level, drawn in zip(levels, images.split(count), strict=True):
            setting = self._setting(f"{contender.key}@{level:g}", contender.label, "steered", level)
            found[setting.key] = ImageSet(setting, prompts, drawn)
        return found

    def _measured(self, outcome: Outcome, controls: dict[str, Fitted], advance: Advance) -> dict[str, ImageSet]:
        """Fresh prompts at the chosen strength and, as further rows, its controls."""
        contender, level = outcome.contender, outcome.chosen.strength
        names: dict[str, tuple[str, str, Group, Plan]] = {
            "main": (contender.key, contender.label, "steered", outcome.fitted.plan())
        }
        for name, fitted in controls.items():
            label = f"{_CONTROLS[name]}: {contender.label}"
            names[name] = (f"{contender.key}-{name}", label, "control", fitted.plan())
        prompts = self.fresh.test
        plans = [plan for *_, plan in names.values() for _ in range(len(prompts))]
        images = self._stage(
            contender.key, _repeated(prompts, len(names)), plans, torch.full((len(plans),), level),
            [contender.place, level, list(names)], advance,
        )  # fmt: skip
        parts = zip(names.items(), images.split(len(prompts)), strict=True)
        return {
            name: ImageSet(self._setting(key, label, group, level), prompts, part)
            for (name, (key, label, group, _)), part in parts
        }

    def _controls(self, outcomes: Sequence[Outcome], advance: Advance) -> dict[str, dict[str, Fitted]]:
        """Of the best methods: shuffled labels, where there is a fit without pairs, and of the best one of all whose
        shifts have a fixed length the random direction."""
        found: dict[str, dict[str, Fitted]] = {}
        order = ranked(outcomes, self.config.keep) if self.config.controls else []
        for outcome in order:
            with suppress(InputError):
                found[outcome.contender.key] = {"random": outcome.fitted.random_direction(self.config.seed)}
                break
        for outcome in order[: self.config.controls]:
            with suppress(InputError):
                fitted = self._fit(outcome.contender, "shuffled", advance)
                found.setdefault(outcome.contender.key, {})["shuffled"] = fitted
        return found

    @staticmethod
    def _setting(key: str, label: str, group: Group, level: float) -> Setting:
        return Setting(key, label, group, level=level)

    def _stage(
        self,
        name: str,
        prompts: Prompts,
        plans: Sequence[Plan | None],
        strength: Tensor | None,
        inputs: Any,
        advance: Advance,
    ) -> Tensor:
        """Images of rows, from the run folder when the stage was finished before."""
        path = self.run.path(f"images/{self.slug}/{name}.png")
        key = f"{self.slug}-images-{name.replace('/', '-')}"
        with self.run.stage(key, [*self.inputs, config_hash(prompts.source), inputs], quiet=True) as stage:
            if stage.done:
                advance(len(prompts))
                return load_sheets(path, len(prompts), *stage.notes["side"])
            own = None if strength is None else [plan or Plan() for plan in plans]
            images = self.painter.paint(
                prompts.source, prompts.seeds, advance, plan=own, strength=1.0 if strength is None else strength
            )
            save_sheets(images, path)
            stage.notes |= {"side": list(images.shape[1:3]), "images": len(images)}
        return images


def _repeated(prompts: Prompts, times: int) -> Prompts:
    return Prompts(prompts.source * times, prompts.target * times, prompts.seeds * times)


def ranked(outcomes: Sequence[Outcome], least: float) -> list[Outcome]:
    """Best first, as the search prompts saw them: those that keep enough, then by target rate."""
    return sorted(outcomes, key=lambda o: (kept(o.chosen) < least, -o.chosen.target.value))
