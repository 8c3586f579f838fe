"""Pictures that show none of the classes, to teach the judge to say so.

Every maker returns images fp32 [N, 3, 64, 64] in [0, 1] and labels per head int64 [N]; IGNORE marks heads on which the
picture says nothing clear.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.zoo.shapes.captions import BACKGROUNDS, COLOURS, IMAGE_SIDE, RGB, Scene, compatible, sample_scenes
from pysteer.zoo.shapes.classifier import HEADS, NONE
from pysteer.zoo.shapes.renderer import SceneBatch, coverage, render

IGNORE = -100
Labelled = tuple[Tensor, dict[str, Tensor]]


def labels_of(scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices of scenes per head."""
    return {name: torch.tensor([words.index(getattr(s, name)) for s in scenes]) for name, words in HEADS.items()}


def _constant(count: int, name: str) -> Tensor:
    return torch.full((count,), HEADS[name].index(NONE))


def _ignored(count: int) -> Tensor:
    return torch.full((count,), IGNORE)


def _nothing(count: int) -> dict[str, Tensor]:
    return {name: _constant(count, name) for name in HEADS}


def _paint(alpha: Tensor, scenes: list[Scene]) -> Tensor:
    batch = SceneBatch.of(scenes)
    background, colour = batch.background[:, :, None, None], batch.colour[:, :, None, None]
    return background + alpha * (colour - background)


def _pixels() -> tuple[Tensor, Tensor]:
    grid = torch.arange(IMAGE_SIDE) + 0.5
    return grid[None, None, :], grid[None, :, None]


def empty(count: int, seed: int) -> Labelled:
    """Plain backgrounds."""
    rng = random.Random(seed)
    names = [rng.choice(BACKGROUNDS) for _ in range(count)]
    images = torch.tensor([RGB[name] for name in names])[:, :, None, None].expand(-1, -1, IMAGE_SIDE, IMAGE_SIDE)
    labels = _nothing(count)
    labels["background"] = torch.tensor([HEADS["background"].index(name) for name in names])
    return images.contiguous(), labels


def noise(count: int, seed: int) -> Labelled:
    """Noise from single pixels to large soft patches."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index in range(count):
        side = (4, 8, 16, 64)[index % 4]
        small = torch.rand(1, 3, side, side, generator=generator)
        parts.append(F.interpolate(small, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear"))
    return torch.cat(parts), _nothing(count)


def blobs(count: int, seed: int) -> Labelled:
    """Objects blurred until their outline is gone."""
    scenes = sample_scenes(count, seed)
    alpha = coverage(SceneBatch.of(scenes))
    for _ in range(3):
        alpha = F.avg_pool2d(F.pad(alpha, (6, 6, 6, 6)), 13, stride=1)
    labels = {**labels_of(scenes), "shape": _constant(count, "shape"), "colour": _ignored(count)}
    return _paint(alpha, scenes), {**labels, "size": _ignored(count)}


def ellipses(count: int, seed: int) -> Labelled:
    """Tilted ellipses and rectangles at least 1.7 times as long as wide."""
    scenes, generator = sample_scenes(count, seed), torch.Generator().manual_seed(seed)
    batch = SceneBatch.of(scenes)
    x, y = _pixels()
    x, y = x - batch.centre[:, 0, None, None], y - batch.centre[:, 1, None, None]
    angle = math.pi * torch.rand(count, 1, 1, generator=generator)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    long = batch.radius[:, None, None]
    short = long / (1.7 + 1.8 * torch.rand(count, 1, 1, generator=generator))
    round_ = torch.rand(count, 1, 1, generator=generator) < 0.5
    oval = (torch.hypot(u / long, v / short) - 1.0) * short
    box = torch.maximum(u.abs() - long, v.abs() - short)
    alpha = (0.5 - torch.where(round_, oval, box)).clamp(0, 1).unsqueeze(1)
    labels = {**labels_of(scenes), "shape": _constant(count, "shape"), "size": _ignored(count)}
    return _paint(alpha, scenes), labels


def polygons(count: int, seed: int) -> Labelled:
    """Irregular star-shaped outlines: a radius that varies randomly with the angle by at least a factor of 2."""
    scenes, generator = sample_scenes(count, seed), torch.Generator().manual_seed(seed)
    batch = SceneBatch.of(scenes)
    x, y = _pixels()
    x, y = x - batch.centre[:, 0, None, None], y - batch.centre[:, 1, None, None]
    knots = torch.rand(count, 7, generator=generator)
    knots = 0.35 + 0.75 * (knots - knots.amin(1, True)) / (knots.amax(1, True) - knots.amin(1, True))
    turn = (torch.atan2(y, x) / (2 * math.pi) + torch.rand(count, 1, 1, generator=generator)) % 1.0 * 7
    low = turn.floor().long() % 7
    share = (turn - turn.floor()).flatten(1)
    a, b = knots.gather(1, low.flatten(1)), knots.gather(1, ((low + 1) % 7).flatten(1))
    reach = (a + (b - a) * share).view_as(turn) * batch.radius[:, None, None]
    alpha = (0.5 - (torch.hypot(x, y) - reach)).clamp(0, 1).unsqueeze(1)
    labels = {**labels_of(scenes), "shape": _constant(count, "shape"), "size": _ignored(count)}
    return _paint(alpha, scenes), labels


def _half_plane(scenes: list[Scene], angle: Tensor) -> Tensor:
    """Coverage of the half plane through each object's centre whose outward normal points at ``angle`` [N, 1, 1]."""
    batch = SceneBatch.of(scenes)
    x, y = _pixels()
    across = (x - batch.centre[:, 0, None, None]) * angle.cos() + (y - batch.centre[:, 1, None, None]) * angle.sin()
    return (0.5 - across).clamp(0, 1).unsqueeze(1)


def _angles(count: int, seed: int) -> Tensor:
    return 2 * math.pi * torch.rand(count, 1, 1, generator=torch.Generator().manual_seed(seed))


def halves(count: int, seed: int) -> Labelled:
    """Objects of which one half is missing."""
    scenes, angle = sample_scenes(count, seed), _angles(count, seed)
    alpha = coverage(SceneBatch.of(scenes)) * _half_plane(scenes, angle)
    # A triangle without its lower half is a triangle.
    still = torch.tensor([scene.shape == "triangle" for scene in scenes]) & (angle.sin().flatten() > 0.5)
    shape = torch.where(still, _ignored(count), _constant(count, "shape"))
    return _paint(alpha, scenes), {**labels_of(scenes), "shape": shape, "size": _ignored(count)}


def two_colours(count: int, seed: int) -> Labelled:
    """Good outlines filled with two colours, half and half: the colour is none of the classes."""
    scenes, rng = sample_scenes(count, seed), random.Random(seed)
    side = _half_plane(scenes, _angles(count, seed))
    other = []
    for scene in scenes:
        fits = [c for c in COLOURS if compatible(c, scene.background) and compatible(c, scene.colour)]
        other.append(RGB[rng.choice(fits)])
    batch = SceneBatch.of(scenes)
    fill = batch.colour[:, :, None, None] * side + torch.tensor(other)[:, :, None, None] * (1 - side)
    background = batch.background[:, :, None, None]
    images = background + coverage(batch) * (fill - background)
    return images, {**labels_of(scenes), "colour": _constant(count, "colour")}


def ghosts(count: int, seed: int) -> Labelled:
    """Two different objects blended half-transparently over one background."""
    scenes, generator = sample_scenes(2 * count, seed), torch.Generator().manual_seed(seed)
    images = render(scenes)
    share = 0.4 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    first = scenes[:count]
    second = [
        Scene(**{**vars(b), "background": a.background, "colour": a.colour})
        for a, b in zip(first, scenes[count:], strict=True)
    ]
    mixed = share * images[:count] + (1 - share) * render(second)
    different = torch.tensor([a.shape != b.shape for a, b in zip(first, second, strict=True)])
    labels = labels_of(first)
    labels["shape"] = torch.where(different, _constant(count, "shape"), _ignored(count))
    return mixed, {**labels, "colour": _ignored(count), "size": _ignored(count)}


MAKERS: dict[str, Callable[[int, int], Labelled]] = {
    "empty": empty,
    "noise": noise,
    "blobs": blobs,
    "ellipses": ellipses,
    "polygons": polygons,
    "halves": halves,
    "two_colours": two_colours,
    "ghosts": ghosts,
}


def negatives(count: int, seed: int) -> Labelled:
    """``count`` pictures of every kind."""
    made = [make(count, seed + index) for index, make in enumerate(MAKERS.values())]
    return torch.cat([images for images, _ in made]), {
        name: torch.cat([labels[name] for _, labels in made]) for name in HEADS
    }
