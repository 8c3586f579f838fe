"""How well a generator follows captions of the shapes task, as judged by the classifier."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pysteer.metrics import object_masks, rate
from pysteer.zoo.shapes.captions import IMAGE_SIDE, REACH, SHAPES, SIZES, STEP, Scene, offset_of, sample_scenes
from pysteer.zoo.shapes.classifier import NONE, ShapeClassifier, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

# How far (pixels) an object's middle may lie from the stated cell; a cell is 8 px wide and scenes jitter by 1 px.
POSITION_TOLERANCE = 5.0


@dataclass(frozen=True)
class Evaluation:
    """``results`` is plain JSON; ``images`` uint8 [N, 64, 64, 3]; ``right`` holds bool [N] per attribute and "stated".

    ``right["position"]`` and the like are true where the attribute is right; ``stated`` says where it was asked for.
    """

    scenes: list[Scene]
    images: Tensor
    verdict: Verdict
    right: dict[str, Tensor]
    stated: dict[str, Tensor]
    results: dict[str, Any]


def generate_images(
    pipeline: Callable[..., Any], captions: Sequence[str], seed: int, batch: int = 64, **settings: Any
) -> Tensor:
    """Images uint8 [N, H, W, 3] of captions; image i uses seed ``seed + i``, whatever the batch size."""
    parts = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        parts.append(pipeline(part, seeds=list(range(seed + start, seed + start + len(part))), **settings).images.cpu())
    return torch.cat(parts)


def object_centres(images: Tensor) -> Tensor:
    """Middle of each object's bounding box in pixels (x, y), fp32 [N, 2]; NaN where there is no object."""
    masks = object_masks(images, margin=0, box=True).float()
    grid = torch.arange(masks.shape[-1], dtype=torch.float32) + 0.5
    mass = masks.sum((1, 2))
    return torch.stack([(masks * grid).sum((1, 2)) / mass, (masks * grid[:, None]).sum((1, 2)) / mass], dim=1)


def position_right(scenes: Sequence[Scene], sizes: Sequence[str], images: Tensor) -> Tensor:
    """Whether each object's middle lies in the cell that the scene's position word names, bool [N].

    ``sizes`` are the judged sizes; they fix how far out a cell lies. Scenes without a position word give False.
    """
    centres = object_centres(images)
    right = torch.zeros(len(scenes), dtype=torch.bool)
    for row, (scene, size) in enumerate(zip(scenes, sizes, strict=True)):
        if scene.position and size in REACH:
            column, line = offset_of(scene.position, size)
            cell = torch.tensor([column, line]) * STEP + IMAGE_SIDE / 2
            right[row] = bool((centres[row] - cell).abs().max() <= POSITION_TOLERANCE)
    return right


def judge(scenes: Sequence[Scene], images: Tensor, verdict: Verdict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which attributes are right and which were stated, bool [N] per attribute."""
    names = ("shape", "colour", "size", "background")
    right = {
        name: torch.tensor([getattr(s, name) == seen for s, seen in zip(scenes, verdict.labels[name], strict=True)])
        for name in names
    }
    right["position"] = position_right(scenes, verdict.labels["size"], images)
    stated = {name: torch.tensor([name in s.stated for s in scenes]) for name in right}
    return right, stated


def _group(rows: Tensor, right: dict[str, Tensor], stated: dict[str, Tensor]) -> dict[str, Any]:
    rates = {name: rate(right[name][rows & stated[name]]).as_dict() for name in right}
    both = rows & stated["colour"]
    rates["shape_and_colour"] = rate((right["shape"] & right["colour"])[both]).as_dict()
    return rates


def summarise(
    scenes: Sequence[Scene], verdict: Verdict, right: dict[str, Tensor], stated: dict[str, Tensor]
) -> dict[str, Any]:
    """Rates with Wilson intervals: overall, by stated size, shape and position, and how often no shape was seen."""
    everything = torch.ones(len(scenes), dtype=torch.bool)
    size = {word: torch.tensor([s.size == word and "size" in s.stated for s in scenes]) for word in SIZES}
    shape = {word: torch.tensor([s.shape == word for s in scenes]) for word in SHAPES}
    return {
        "count": len(scenes),
        "overall": _group(everything, right, stated),
        "by_stated_size": {word: _group(rows, right, stated) for word, rows in size.items()},
        "by_shape": {word: _group(rows, right, stated) for word, rows in shape.items()},
        "by_position": {
            "position stated": _group(stated["position"], right, stated),
            "position left open": _group(~stated["position"], right, stated),
        },
        "no_shape_recognised": rate(torch.tensor([word == NONE for word in verdict.labels["shape"]])).as_dict(),
    }


def evaluate(
    pipeline: Callable[..., Any],
    classifier: ShapeClassifier,
    *,
    count: int = 600,
    seed: int = 0,
    batch: int = 64,
    scenes: Sequence[Scene] | None = None,
    **settings: Any,
) -> Evaluation:
    """Generate one image per sampled caption and judge what the caption states.

    ``settings`` go to the pipeline (cfg, tau, ...). The sampled captions and the noise both follow from ``seed``.
    """
    chosen = list(scenes) if scenes is not None else sample_scenes(count, seed)
    images = generate_images(pipeline, [scene.caption for scene in chosen], seed, batch, **settings)
    verdict = classifier.classify(images)
    right, stated = judge(chosen, images, verdict)
    results = {**summarise(chosen, verdict, right, stated), "seed": seed, "settings": settings}
    return Evaluation(chosen, images, verdict, right, stated, results)


def sample_sheet(images: Tensor, captions: Sequence[str], columns: int = 10, scale: int = 2) -> Image:
    """A picture of images uint8 [N, H, W, 3] in rows, each with its caption below."""
    from PIL import Image, ImageDraw, ImageFont

    side = images.shape[1] * scale
    lines, gap, step = 4, 6, 11
    width, height = side + gap, side + lines * step + gap
    rows = -(-len(captions) // columns)
    page = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for index, caption in enumerate(captions):
        x, y = gap + index % columns * width, gap + index // columns * height
        tile = Image.fromarray(images[index].numpy()).resize((side, side), Image.Resampling.NEAREST)
        page.paste(tile, (x, y))
        for number, line in enumerate(textwrap.wrap(caption, side // 5)[:lines]):
            draw.text((x, y + side + 1 + number * step), line, fill=(40, 40, 40), font=font)
    return page
