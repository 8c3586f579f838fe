"""What keeps a dream from becoming noise: penalties per row, and what is done to the gradient of every row.

All of it works on maps `[R, C, H, W]`, row by row: a row does not depend on those beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-8


def total_variation(z: Tensor) -> Tensor:
    """`mean |z_h+1 - z_h| + mean |z_w+1 - z_w|` of every row, `[R]`."""
    down = (z[:, :, 1:] - z[:, :, :-1]).abs().flatten(1).mean(1)
    right = (z[..., 1:] - z[..., :-1]).abs().flatten(1).mean(1)
    return down + right


def beyond_range(z: Tensor, threshold: float) -> Tensor:
    """`mean relu(|z| - threshold)^2` of every row, `[R]`."""
    return (z.abs() - threshold).relu().square().flatten(1).mean(1)


def moments_off(z: Tensor) -> Tensor:
    """`|mean z| + |std z - 1|` of every row, `[R]`: how far it is from standard noise."""
    flat = z.flatten(1)
    return flat.mean(1).abs() + (flat.std(1) - 1).abs()


def spectral_filter(height: int, width: int, device: torch.device) -> Tensor:
    """`1 / (1 + |f|)` for every frequency `f` (in cycles per map) of a map, `[H, W]`."""
    down = torch.fft.fftfreq(height, d=1 / height, device=device)
    right = torch.fft.fftfreq(width, d=1 / width, device=device)
    return 1 / (1 + (down[:, None].square() + right[None].square()).sqrt())


def precondition(gradient: Tensor, scale: Tensor) -> Tensor:
    """`ifft2(fft2(g) scale)`, brought back to the standard deviation that every row had."""
    filtered = torch.fft.ifft2(torch.fft.fft2(gradient) * scale).real
    rows = (-1, *[1] * (gradient.dim() - 1))
    before, after = (x.flatten(1).std(1) for x in (gradient, filtered))
    return filtered * (before / after.clamp_min(_SMALL)).view(rows)


def blur(maps: Tensor, sigma: float, size: int) -> Tensor:
    """A Gaussian blur of `size` pixels (odd, cut to the map) and standard deviation `sigma`; none for sigma 0."""
    if sigma <= 0 or size < 2:
        return maps
    for dim in (-2, -1):
        half = min(size // 2, maps.shape[dim] - 1)
        places = torch.arange(-half, half + 1, device=maps.device, dtype=maps.dtype)
        kernel = torch.exp(-0.5 * (places / sigma).square())
        kernel = (kernel / kernel.sum()).view(1, 1, -1, 1) if dim == -2 else (kernel / kernel.sum()).view(1, 1, 1, -1)
        pad = (0, 0, half, half) if dim == -2 else (half, half, 0, 0)
        channels = maps.shape[1]
        padded = F.pad(maps, pad, mode="reflect")
        maps = F.conv2d(padded, kernel.expand(channels, 1, *kernel.shape[2:]), groups=channels)
    return maps
