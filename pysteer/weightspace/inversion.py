"""The adapter in the span of a collection that explains given images best (weights2weights, Dravid et al. 2024).

Adapters are `mean + sum_k z_k component_k`; the z are found by gradient descent on the denoising loss of the images,
the denoiser and the components staying as they are. What comes out is an adapter like those of the collection, even
from a single image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.weightspace.adapter import Adapter
from pysteer.weightspace.directions import Directions
from pysteer.weightspace.farm.training import Draws, Teacher, TrainingConfig


@dataclass(frozen=True)
class Inversion:
    """What an inversion found.

    Attributes:
        directions: of the collection.
        coefficients: fp64 `[N]` on its adapters.
        z: fp32 `[k]`, standard deviations along the components.
        first_loss, last_loss: mean denoising loss over the first and the last tenth of the steps.
    """

    directions: Directions
    coefficients: Tensor
    z: Tensor
    first_loss: float
    last_loss: float

    def adapter(self, rank: int = 4) -> Adapter:
        """The adapter, cut to a rank."""
        return self.directions.combine(self.coefficients, rank=rank, name="inverted")


class _Span(nn.Module):
    """A linear layer plus a change that is linear in z: `base(x) + sum_k z_k up_k (down_k x)`, z_0 = 1."""

    def __init__(self, base: nn.Linear, up: Tensor, down: Tensor, owner: Tensor, z: Tensor) -> None:
        super().__init__()
        self.base, self.up, self.down, self.owner = base, up, down, owner
        self.z = [z]  # in a list, so that it is no parameter of this layer

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.z[0].new_ones(1), self.z[0]])[self.owner].to(x.dtype)
        low = (x @ self.down.T.to(x.dtype)) * weight
        return self.base(x) + low @ self.up.T.to(x.dtype)


def read_images(folder: Path, pipe: Any) -> Tensor:
    """The images of a folder as uint8 `[N, H, W, 3]`, at the size that the pipeline generates.

    Raises:
        InputError: no folder, or no image that can be read.
    """
    from PIL import Image, UnidentifiedImageError

    side = int(pipe.unet.config.sample_size * pipe.vae_scale_factor)
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
            try:
                image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            except (UnidentifiedImageError, OSError) as error:
                raise InputError(f"image cannot be read ({error})", value=str(path)) from error
            found.append(torch.from_numpy(np.array(image)))
    if not found:
        raise InputError("folder of images", value=str(folder), allowed="at least one image")
    return torch.stack(found)


def invert(
    directions: Directions, pipe: Any, images: Tensor, *, prompt: str = "", components: int = 16, steps: int = 60,
    rows: int = 16, lr: float = 0.1, component_rank: int = 8, seed: int = 0,
    advance: Callable[[float], None] = lambda units: None,
) -> Inversion:  # fmt: skip
    """Find the adapter in the span of a collection that explains images best.

    Args:
        directions: of the collection; its layers must be those of the UNet of `pipe`.
        pipe: the diffusers pipeline that the adapters are for.
        images: uint8 `[N, H, W, 3]`.
        prompt: the prompt that the adapters were trained with.
        components: how many principal components to search in.
        steps, rows, lr: of Adam, which starts at the mean of the collection.
        component_rank: rank that components are cut to while searching.
        advance: called with 1 after every step.

    Raises:
        InputError: layers that the pipeline does not have, or no components.
    """
    if components < 1 or steps < 1:
        raise InputError("components, steps", value=(components, steps), allowed="1 or more each")
    every = [directions.mean(), *(directions.component(k) for k in range(components))]
    teacher = Teacher(pipe, TrainingConfig(steps=steps, rows=rows, prompt=prompt, precision="fp32"))
    parts = [directions.adapter(each, rank=component_rank) for each in every]
    z = torch.zeros(components, requires_grad=True)
    for layer in directions.adapters.layers:
        component, _, path = layer.partition(".")
        if component != "unet" or path not in dict(teacher.unet.named_modules()):
            raise InputError("layer of the collection", value=layer, allowed="layers of the UNet")
        its = [part.layers[layer] for part in parts]
        owner = torch.cat([torch.full((it.rank,), k) for k, it in enumerate(its)])
        base = teacher.unet.get_submodule(path)
        assert isinstance(base, nn.Linear)
        span = _Span(base, torch.cat([it.up for it in its], 1), torch.cat([it.down for it in its]), owner, z)
        parent, _, name = path.rpartition(".")
        setattr(teacher.unet.get_submodule(parent), name, span)  # the teacher's UNet is a copy of its own
    draws = [Draws(teacher.latents(images), seed, rows)]
    text = teacher.text(prompt).expand(rows, -1, -1)
    optimizer = torch.optim.Adam([z], lr=lr)
    losses = []
    for _ in range(steps):
        loss = teacher.losses(draws, text).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        advance(1)
    tail = max(1, steps // 10)
    coefficients = every[0].coefficients.clone()
    for weight, each in zip(z.detach().double(), every[1:], strict=True):
        coefficients += weight * each.coefficients
    first, last = (sum(part) / len(part) for part in (losses[:tail], losses[-tail:]))
    return Inversion(directions, coefficients, z.detach(), first, last)
