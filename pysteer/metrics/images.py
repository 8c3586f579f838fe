"""How much a picture changed outside the object it shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.errors import InputError


def _check(images: Tensor, name: str) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] != 3:
        raise InputError(
            name, value=f"{images.dtype} {list(images.shape)}", allowed="uint8 [B, H, W, 3]", fix="pass RGB bytes"
        )


def background_colour(images: Tensor) -> Tensor:
    """Background colour of `images` [B, H, W, 3] uint8: the median of the outermost pixels, [B, 3] fp32 in 0..255."""
    _check(images, "images")
    x = images.float()
    border = torch.cat([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], dim=1)
    return border.median(dim=1).values


def object_masks(images: Tensor, *, threshold: float = 40.0, margin: int = 3, box: bool = True) -> Tensor:
    """Where `images` [B, H, W, 3] uint8 show an object: bool [B, H, W].

    A pixel belongs to it if any channel differs from the background colour by more than `threshold` (0..255). With
    `box` the mask is the bounding box of those pixels, because a square drawn over a circle rightly fills the corners
    of that box; `margin` pixels are added all round. Single stray pixels are ignored (3x3 majority).
    """
    colour = background_colour(images)
    differs = (images.float() - colour[:, None, None]).abs().amax(-1) > threshold
    dense = F.avg_pool2d(differs.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0.5
    if box:
        rows, columns = dense.any(2), dense.any(1)
        dense = _between(rows)[:, :, None] & _between(columns)[:, None, :]
    if margin > 0:
        dense = F.max_pool2d(dense.float()[:, None], 2 * margin + 1, stride=1, padding=margin)[:, 0] > 0
    return dense


def _between(marks: Tensor) -> Tensor:
    """True from the first to the last true value of each row of `marks` [B, L] bool."""
    forward = marks.cummax(1).values
    backward = marks.flip(1).cummax(1).values.flip(1)
    return forward & backward


def change_outside(baseline: Tensor, steered: Tensor, masks: Tensor | None = None, *, least: float = 0.05) -> Tensor:
    """Mean absolute pixel change outside the object, per image: fp32 [B] in 0..1.

    `baseline` and `steered` are uint8 [B, H, W, 3]; `masks` bool [B, H, W] mark the object (default: `object_masks` of
    the baseline). NaN where less than `least` of the picture lies outside.
    """
    _check(baseline, "baseline")
    _check(steered, "steered")
    if baseline.shape != steered.shape:
        raise InputError(
            "steered images", value=list(steered.shape), allowed=f"{list(baseline.shape)}", fix="compare equal sets"
        )
    outside = ~(object_masks(baseline) if masks is None else masks)
    change = (steered.float() - baseline.float()).abs().mean(-1) / 255.0
    count = outside.flatten(1).sum(1)
    mean = (change * outside).flatten(1).sum(1) / count.clamp(min=1)
    return torch.where(count >= least * outside[0].numel(), mean, torch.nan)
