"""The measurements of the recipe `weightspace`: every family and model, controls, and what each layer knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pysteer.recipes.weights.config import WeightspaceConfig
from pysteer.weightspace.canonical import layer_products
from pysteer.weightspace.classify import Outcome, Task, measure, measure_models
from pysteer.weightspace.families import Features, features
from pysteer.weightspace.loraset import LoraSet


@dataclass(frozen=True)
class LayerOutcome:
    """How well one layer alone tells the classes apart, and how well all do without it and the better ones."""

    layer: str
    alone: Outcome
    without: Outcome | None = None


def features_of(adapters: LoraSet, family: str) -> Features:
    """The features of a family of the recipe; `pca` is the flat vector, to be cut by the classifier."""
    return features(adapters, "flat" if family == "pca" else family)


def kept(family: str, config: WeightspaceConfig) -> int | None:
    """How many components a classifier gets of a family; None for all."""
    return config.components if family == "pca" else None


class Experiment:
    """Measures families on one collection.

    Args:
        adapters: labelled adapters.
        config: of the recipe.
    """

    def __init__(self, adapters: LoraSet, config: WeightspaceConfig) -> None:
        self.adapters, self.config = adapters, config
        self.task = Task.of(adapters.labels, adapters.groups, config.runs, config.seed)

    def family(self, family: str, models: Sequence[str]) -> list[Outcome]:
        """Every model on one family; its features are computed once."""
        given = features_of(self.adapters, family)
        outcomes = measure_models(given, self.task, models, keep=kept(family, self.config))
        return [self._named(outcome, family) for outcome in outcomes]

    @staticmethod
    def _named(outcome: Outcome, family: str) -> Outcome:
        return replace(outcome, family=family)

    def shuffled(self, family: str, model: str) -> Outcome:
        """The control: the same with the labels mixed up."""
        labels, groups = self.adapters.labels, self.adapters.groups
        task = Task.of(labels, groups, self.config.runs, self.config.seed, shuffled=True)
        given = features_of(self.adapters, family)
        return self._named(measure(given, task, model, keep=kept(family, self.config)), family)

    def layers(self, advance: Callable[[float], None], side: str = "output") -> list[LayerOutcome]:
        """Ridge on every layer alone, best first, and on all layers but the best 1, 2, ... `ablation` ones."""
        products = {}
        for layer in self.adapters.layers:
            own = layer_products(self.adapters, layer, side)
            products[layer] = own / own.diagonal().mean().clamp_min(1e-300)
        alone = []
        for layer, own in products.items():
            alone.append(LayerOutcome(layer, measure(Features(layer, None, own, 0), self.task, "ridge")))
            advance(1)
        alone.sort(key=lambda each: -each.alone.accuracy.value)
        total = torch.stack(list(products.values())).sum(0)
        for number in range(min(self.config.ablation, len(alone) - 1)):
            total = total - products[alone[number].layer]
            without = measure(Features(f"without the best {number + 1}", None, total, 0), self.task, "ridge")
            alone[number] = replace(alone[number], without=without)
            advance(1)
        return alone


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome with the highest accuracy, shuffled ones aside."""
    return max((each for each in outcomes if not each.shuffled), key=lambda each: each.accuracy.value)


def layer_kind(layer: str) -> str:
    """The last two parts of a layer's name, `attn1.to_q`."""
    return ".".join(layer.split(".")[-2:])


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Plain values of outcomes."""
    return [each.as_dict() for each in outcomes]
