"""Edited adapters on the generator: how the rate of a class follows the distance along a direction."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.metrics import Rate, rate
from pysteer.recipes.farm.check import SAMPLING
from pysteer.recipes.weights.config import WeightspaceConfig
from pysteer.weightspace.attaching import attached
from pysteer.weightspace.directions import Direction, Directions
from pysteer.weightspace.farm.concepts import parse_concept


@dataclass(frozen=True)
class Dose:
    """Pictures of adapters moved by t: rates of the target and of the source class, and of no known class."""

    t: float
    target: Rate
    source: Rate
    none: Rate
    images: Tensor


@dataclass(frozen=True)
class Edited:
    """One direction: what it is, its length beside that of an adapter, and a dose per strength."""

    pair: str
    kind: str
    relative_length: float
    doses: tuple[Dose, ...]

    @property
    def rising(self) -> bool:
        """Whether the target rate never falls by more than one picture from one strength to the next, and rises."""
        values = [dose.target.value for dose in self.doses]
        slack = 1.0 / self.doses[0].target.total + 1e-9
        steady = all(b >= a - slack for a, b in itertools.pairwise(values))
        return steady and values[-1] > values[0] + slack

    def rows(self) -> list[dict[str, Any]]:
        """Plain values, a row per strength."""
        return [
            {"pair": self.pair, "direction": self.kind, "t": d.t, "target": d.target.as_dict(),
             "source": d.source.as_dict(), "none": d.none.as_dict(), "relative_length": self.relative_length}
            for d in self.doses
        ]  # fmt: skip


def default_pairs(labels: list[str]) -> list[str]:
    """A pair of colours and a pair of shapes, as far as the collection has them."""
    found = []
    for attribute in ("colour", "shape"):
        own = sorted({label for label in labels if label.startswith(f"{attribute}=")})
        if len(own) > 1:
            found.append(f"{own[-1]}->{own[0]}")
    return found


def parse_direction(text: str, labels: list[str]) -> tuple[str, str]:
    """Source and target class of `source->target`.

    Raises:
        InputError: not of that form, or classes that the collection does not have.
    """
    source, arrow, target = (part.strip() for part in text.partition("->"))
    if not arrow or source not in labels or target not in labels or source == target:
        raise InputError("directions", value=text, allowed=f"source->target of {', '.join(sorted(set(labels)))}")
    return source, target


class Editor:
    """Makes pictures with edited adapters and judges them.

    Args:
        generator: an `ImageGenerator` with a UNet.
        directions: of the collection.
        config: of the recipe.
    """

    def __init__(self, generator: Any, directions: Directions, config: WeightspaceConfig) -> None:
        from pysteer.zoo import load_classifier

        self.generator, self.directions, self.config = generator, directions, config
        self.judge = load_classifier("shapes")

    def planned(self, pairs: int) -> int:
        """How many pictures `pairs` pairs take, with their controls."""
        c = self.config
        return pairs * 3 * len(c.strengths) * c.edit_adapters * c.edit_images

    def all_of(self, text: str, advance: Callable[[float], None]) -> list[Edited]:
        """The mean difference, the probe and a random direction as long as the former, on one pair of classes."""
        labels = self.directions.adapters.labels
        source, target = parse_direction(text, labels)
        mean = self.directions.between(target, source)
        kinds = {
            "mean difference": mean,
            "probe": self.directions.probe(target, source),
            "random, same length": self.directions.random(zlib.crc32(text.encode()) + self.config.seed, mean),
        }
        return [self._edited(text, kind, direction, source, target, advance) for kind, direction in kinds.items()]

    def _edited(
        self, text: str, kind: str, direction: Direction, source: str, target: str, advance: Callable[[float], None]
    ) -> Edited:
        own = [i for i, label in enumerate(self.directions.adapters.labels) if label == source]
        own = own[: self.config.edit_adapters]
        attribute, value = parse_concept(target)
        before = parse_concept(source)[1]
        doses = []
        for t in self.config.strengths:
            images = self.paint(own, direction, t)
            advance(len(images))
            seen = self.judge.classify(images).labels[attribute]
            shown, still, none = (rate([word == wanted for word in seen]) for wanted in (value, before, "none"))
            doses.append(Dose(t, shown, still, none, images))
        typical = float(self.directions.gram.diagonal().mean().sqrt())
        return Edited(text, kind, self.directions.length(direction) / typical, tuple(doses))

    @torch.no_grad()
    def paint(self, adapters: list[int], direction: Direction, t: float) -> Tensor:
        """Pictures uint8 [A * edit_images, H, W, 3] of adapters moved by t, the same noise for each."""
        c = self.config
        edited = [self.directions.edit(i, direction, t, rank=c.edit_rank) for i in adapters]
        seeds = [c.seed + k for k in range(c.edit_images)] * len(edited)
        # `attached` with one adapter serves any number of rows; with several they share the rows out.
        with attached(self.generator, edited if len(edited) > 1 else edited[0], rows=c.edit_images):
            return self.generator([""] * len(seeds), seeds=seeds, **SAMPLING).images
