"""Renders scenes as 64 x 64 RGB images from signed distance functions, vectorised over the batch.

Coverage of a pixel is ``clamp(0.5 - d, 0, 1)`` with d the signed distance (pixels, negative inside) from the pixel's
centre to the outline: a one-pixel anti-aliased edge. Nothing here is random, so a scene always gives the same image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.zoo.shapes.captions import IMAGE_SIDE, RGB, SHAPES, Scene

_STAR_INNER = 0.42
_CROSS_ARM = 0.36
_RING_INNER = 0.54


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as tensors: shape ids int64 [N], colours fp32 [N, 3] in [0, 1], centres [N, 2] and radii [N] in px."""

    shape: Tensor
    colour: Tensor
    background: Tensor
    centre: Tensor
    radius: Tensor

    @staticmethod
    def of(scenes: Sequence[Scene]) -> SceneBatch:
        """Collect the geometry and colours of scenes."""
        return SceneBatch(
            shape=torch.tensor([SHAPES.index(s.shape) for s in scenes], dtype=torch.int64),
            colour=torch.tensor([RGB[s.colour] for s in scenes], dtype=torch.float32).reshape(-1, 3),
            background=torch.tensor([RGB[s.background] for s in scenes], dtype=torch.float32).reshape(-1, 3),
            centre=torch.tensor([(s.x, s.y) for s in scenes], dtype=torch.float32).reshape(-1, 2),
            radius=torch.tensor([s.radius for s in scenes], dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice) -> SceneBatch:
        return SceneBatch(
            self.shape[rows], self.colour[rows], self.background[rows], self.centre[rows], self.radius[rows]
        )


def mirrored_polygon_distance(x: Tensor, y: Tensor, chain: Sequence[tuple[float, float]]) -> Tensor:
    """Signed distance to a polygon that is its own mirror image in x = 0, in the units of x and y; negative inside.

    ``chain`` holds the corners of the right half (x >= 0), from one end on the axis to the other. The sign is the
    even-odd crossing test.
    """
    x = x.abs()
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in itertools.pairwise(chain):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp_(0.0, 1.0)
        squared = torch.minimum(squared, (px - along * ex).square_() + (py - along * ey).square_())
        if ey != 0.0:
            straddles = (y >= ay) != (y >= by)
            inside ^= straddles & (px < py * (ex / ey))
    distance = squared.sqrt_()
    return torch.where(inside, -distance, distance)


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    dx, dy = x.abs() - half_x, y.abs() - half_y
    return torch.hypot(dx.clamp_min(0.0), dy.clamp_min(0.0)) + torch.maximum(dx, dy).clamp_max(0.0)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.88, 0.88)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return mirrored_polygon_distance(x, y, ((0.0, -0.9), (1.0, 0.85), (0.0, 0.85)))


def _star_chain() -> list[tuple[float, float]]:
    """The right half of a five-pointed star, one point up, centred by its bounding box."""
    corners = []
    for k in range(6):
        reach = 1.05 if k % 2 == 0 else 1.05 * _STAR_INNER
        corners.append((reach * math.sin(math.pi * k / 5), 0.1 - reach * math.cos(math.pi * k / 5)))
    return corners


_STAR = _star_chain()


def _star(x: Tensor, y: Tensor) -> Tensor:
    return mirrored_polygon_distance(x, y, _STAR)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.97, _CROSS_ARM), _box(x, y, _CROSS_ARM, 0.97))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    middle, half = (1.0 + _RING_INNER) / 2, (1.0 - _RING_INNER) / 2
    return (torch.hypot(x, y) - middle).abs() - half


# Unit-radius distances; every shape lies within [-1, 1] in both directions.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def coverage(batch: SceneBatch) -> Tensor:
    """How much of each pixel the object covers: fp32 [N, 1, 64, 64] in [0, 1]."""
    grid = torch.arange(IMAGE_SIDE, dtype=torch.float32) + 0.5
    radius = batch.radius[:, None, None]
    x = (grid[None, None, :] - batch.centre[:, 0, None, None]) / radius
    y = (grid[None, :, None] - batch.centre[:, 1, None, None]) / radius
    x, y = torch.broadcast_tensors(x, y)
    distance = torch.empty(len(batch), IMAGE_SIDE, IMAGE_SIDE)
    for index, name in enumerate(SHAPES):
        rows = torch.nonzero(batch.shape == index).flatten()
        if len(rows):
            distance[rows] = DISTANCES[name](x[rows], y[rows]) * radius[rows]
    return (0.5 - distance).clamp_(0.0, 1.0).unsqueeze(1)


def render(scenes: Sequence[Scene] | SceneBatch, chunk: int = 64) -> Tensor:
    """Images of scenes: fp32 [N, 3, 64, 64], RGB in [0, 1]."""
    batch = scenes if isinstance(scenes, SceneBatch) else SceneBatch.of(scenes)
    images = torch.empty(len(batch), 3, IMAGE_SIDE, IMAGE_SIDE)
    for start in range(0, len(batch), chunk):
        part = batch[start : start + chunk]
        alpha = coverage(part)
        background, colour = part.background[:, :, None, None], part.colour[:, :, None, None]
        images[start : start + chunk] = background + alpha * (colour - background)
    return images
