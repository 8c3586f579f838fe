"""Random moves of latents, so that a dream holds under them: a draw of its own for every row and step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.errors import InputError

# Presets of the source: jitter in latent pixels, rotation in degrees, largest scale.
LEVELS = {"level_0": (0, 0.0, 1.0), "level_1": (1, 5.0, 1.1), "level_2": (8, 15.0, 1.2), "level_3": (16, 45.0, 1.8)}


@dataclass(frozen=True)
class Augmentation:
    """How far a row is moved.

    Attributes:
        jitter: most pixels it is rolled by, either way, in both directions.
        rotate: most degrees it is turned by, either way.
        scale: most it is enlarged by; at least 1.
    """

    jitter: int = 1
    rotate: float = 5.0
    scale: float = 1.1

    def __post_init__(self) -> None:
        if self.jitter < 0 or self.rotate < 0 or self.scale < 1:
            value = f"jitter {self.jitter}, rotate {self.rotate}, scale {self.scale}"
            raise InputError("augmentation", value=value, allowed="jitter and rotate from 0, scale from 1")

    @classmethod
    def level(cls, name: str) -> Augmentation:
        """A preset: level_0 (none) to level_3."""
        if name not in LEVELS:
            raise InputError("robustness to transformations", value=name, allowed=", ".join(LEVELS))
        return cls(*LEVELS[name])

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Four numbers in [0, 1) for every row, from its own generator, `[R, 4]`."""
        return torch.stack([torch.rand(4, generator=generator) for generator in generators])

    def __call__(self, z: Tensor, draws: Tensor) -> Tensor:
        """Rows `[R, C, H, W]` rolled, then turned and enlarged around their middle (bilinear, zeros outside)."""
        if self.jitter:
            z = self._rolled(z, draws[:, :2])
        if self.rotate or self.scale > 1:
            angle = (draws[:, 2] * 2 - 1) * math.radians(self.rotate)
            zoom = 1 + draws[:, 3] * (self.scale - 1)
            c, s = torch.cos(angle) / zoom, torch.sin(angle) / zoom
            zero = torch.zeros_like(c)
            theta = torch.stack((torch.stack((c, -s, zero), 1), torch.stack((s, c, zero), 1)), 1)
            grid = F.affine_grid(theta.to(z.device, z.dtype), list(z.shape), align_corners=False)
            z = F.grid_sample(z, grid, mode="bilinear", align_corners=False)
        return z

    def _rolled(self, z: Tensor, draws: Tensor) -> Tensor:
        """Every row rolled by whole pixels, as `torch.roll` does."""
        span = 2 * self.jitter + 1
        shifts = (draws * span).long().clamp(max=span - 1) - self.jitter
        rows = torch.arange(len(z), device=z.device)[:, None, None]
        down = (torch.arange(z.shape[2]) - shifts[:, :1]) % z.shape[2]
        right = (torch.arange(z.shape[3]) - shifts[:, 1:]) % z.shape[3]
        last = z.permute(0, 2, 3, 1)
        found: Tensor = last[rows, down[:, :, None].to(z.device), right[:, None, :].to(z.device)]
        return found.permute(0, 3, 1, 2)
