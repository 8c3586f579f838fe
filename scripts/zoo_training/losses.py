"""Reconstruction losses of image autoencoders."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GRADIENT = 0.5


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences between neighbouring pixels."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


def edge_weight(images: Tensor) -> Tensor:
    """1 + 5 * (largest colour step within 2 px), scaled to mean 1 per image: [B, 1, H, W]."""
    dx, dy = slopes(images)
    steepness = F.pad(dx, (0, 1)).square() + F.pad(dy, (0, 0, 0, 1)).square()
    steepness = F.max_pool2d(steepness.mean(1, keepdim=True).sqrt(), 5, stride=1, padding=2)
    weight = 1.0 + 5.0 * steepness
    return weight / weight.mean((-2, -1), keepdim=True)


def reconstruction_loss(made: Tensor, images: Tensor, edges: bool) -> Tensor:
    """L1 + 2 L2 (optionally edge-weighted) + 0.5 L1 of slopes."""
    weight = edge_weight(images) if edges else 1.0
    error = made - images
    loss = (weight * error.abs()).mean() + 2.0 * (weight * error.square()).mean()
    for made_slope, slope in zip(slopes(made), slopes(images), strict=True):
        loss = loss + 0.5 * GRADIENT * (made_slope - slope).abs().mean()
    return loss
