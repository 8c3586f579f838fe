"""What adapters of the renderer's classes do to the pictures of the generator, seen by the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.metrics import Rate, rate
from pysteer.weightspace.farm.concepts import parse_concept
from pysteer.weightspace.farm.many import Factors, many_adapters

SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0}


@dataclass(frozen=True)
class Effect:
    """How often pictures show the class, without and with adapters of it; and pictures uint8 [N, H, W, 3]."""

    label: str
    without: Rate
    with_adapters: Rate
    images: Tensor

    def as_dict(self) -> dict[str, Any]:
        return {"label": self.label, "without": self.without.as_dict(), "with": self.with_adapters.as_dict()}


@torch.no_grad()
def paint(
    generator: Any, factors: Factors, scale: Tensor, prompt: str, seeds: Sequence[int], batch: int = 64
) -> Tensor:
    """Pictures uint8 [A, len(seeds), H, W, 3] of one prompt with each of A adapters, the same noise for all.

    Args:
        generator: an `ImageGenerator` with a UNet.
        factors: of A adapters; scale: fp32 [A].
        batch: pictures at a time.
    """
    count, made = len(scale), []
    step = max(1, batch // len(seeds))
    for first in range(0, count, step):
        part = slice(first, first + step)
        some = Factors({k: v[part] for k, v in factors.down.items()}, {k: v[part] for k, v in factors.up.items()})
        size = len(scale[part])
        with many_adapters(generator.pipe.unet, some, scale[part], len(seeds)):
            images = generator([prompt] * (size * len(seeds)), seeds=[*seeds] * size, **SAMPLING).images
        made.append(images.view(size, len(seeds), *images.shape[1:]))
    return torch.cat(made)


def measure_effects(
    generator: Any, chosen: dict[str, tuple[Factors, Tensor]], prompt: str, seeds: Sequence[int],
    advance: Callable[[float], None],
) -> list[Effect]:  # fmt: skip
    """The effect of adapters of every class; `chosen` holds factors and scales by class.

    Classes whose attribute the classifier does not read (positions) are left out.
    """
    from pysteer.zoo import load_classifier

    judge = load_classifier("shapes")
    plain = generator([prompt] * len(seeds), seeds=list(seeds), **SAMPLING).images
    before = judge.classify(plain).labels
    effects = []
    for label, (factors, scale) in chosen.items():
        attribute, value = parse_concept(label)
        if attribute not in before:
            continue
        images = paint(generator, factors, scale, prompt, seeds).flatten(0, 1)
        seen = judge.classify(images).labels[attribute]
        base, now = rate([word == value for word in before[attribute]]), rate([word == value for word in seen])
        effects.append(Effect(label, base, now, images))
        advance(len(images))
    return effects
