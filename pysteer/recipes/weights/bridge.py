"""Weight directions beside activation steering: the shift that dW predicts, and the one fitted on activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import pysteer
from pysteer.methods import MeanDifference
from pysteer.metrics import Rate, rate
from pysteer.recipes.farm.check import SAMPLING
from pysteer.recipes.weights.steering import Editor, parse_direction
from pysteer.steering import Plan, steer
from pysteer.weightspace.attaching import attached, layer_inputs, plan_of, predicted_shifts, shift_cosines
from pysteer.weightspace.farm.concepts import parse_concept
from pysteer.zoo.shapes.captions import sample_pairs

STRENGTHS = (1.0, 2.0, 4.0)
_KINDS = ("weights", "predicted shift of activations", "fitted shift of activations")


@dataclass(frozen=True)
class Bridge:
    """One pair of classes.

    Attributes:
        pair: of classes.
        cosines: layer -> mean over steps of the cosine between predicted and fitted shift.
        rates: (what is changed, strength, share of pictures that show the target class); unsteered first.
    """

    pair: str
    cosines: dict[str, float]
    rates: tuple[tuple[str, float, Rate], ...]

    def rows(self) -> list[dict[str, Any]]:
        """Plain values."""
        mean = sum(self.cosines.values()) / len(self.cosines)
        return [
            {"pair": self.pair, "what": what, "strength": s, "target": r.as_dict(), "mean_cosine": mean}
            for what, s, r in self.rates
        ]


def planned(config: Any) -> int:
    """Pictures of one pair."""
    return config.edit_adapters * config.edit_images * (1 + len(_KINDS) * len(STRENGTHS))


@torch.no_grad()
def compare(editor: Editor, text: str, advance: Callable[[float], None]) -> Bridge | None:
    """Apply a direction to the generator in weights and in activations; None for pairs of different attributes.

    The predicted shift is dW h, with the mean input h of every layer and step for the empty prompt. The fitted one is
    the difference of mean outputs of the same layers between captions that differ in the class word.
    """
    source, target = parse_direction(text, editor.directions.adapters.labels)
    attribute, value = parse_concept(target)
    before, old = parse_concept(source)
    if before != attribute or attribute not in ("shape", "colour", "background"):
        return None
    generator, c = editor.generator, editor.config
    prompts = [""] * (c.edit_adapters * c.edit_images)
    change = editor.directions.adapter(editor.directions.between(target, source), rank=c.edit_rank)
    layers = [layer for layer in change.layers if layer.startswith("unet.")]
    shifts = predicted_shifts(change, layer_inputs(generator, layers, prompts[:16], **SAMPLING))
    pairs = sample_pairs(32, attribute, old, value, c.seed)
    plain, about = ([pair[k].caption for pair in pairs] for k in (0, 1))
    sites = [layer.removeprefix("unet.") for layer in layers]
    fitted = pysteer.fit(generator, MeanDifference(), plain, about, sites=sites, settings=SAMPLING).plan()
    cosines = {layer: float(each.mean()) for layer, each in shift_cosines(shifts, fitted).items()}

    def judged() -> Rate:
        images = generator(prompts, seeds=c.seed, **SAMPLING).images
        advance(len(images))
        return rate([word == value for word in editor.judge.classify(images).labels[attribute]])

    rates = [("unsteered", 0.0, judged())]
    plans: list[tuple[str, Plan | None]] = list(zip(_KINDS, (None, plan_of(shifts), fitted), strict=True))
    for name, plan in plans:
        for strength in STRENGTHS:
            # One strength for both: a factor on dW, or on the shift.
            with attached(generator, change, strength) if plan is None else steer(generator, plan, strength=strength):
                rates.append((name, strength, judged()))
    return Bridge(text, cosines, tuple(rates))
