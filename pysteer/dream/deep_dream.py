"""Deep dreams: latents that activate a feature as much as they can, many features, seeds and timesteps at once.

Every row of the batch is one dream: AdamW changes `z` so that the feature's mean over the tokens of the site rises,
`L = -A(f_t(noised(augmented(z)))) + penalties(z)`. The model is frozen, only the one row of the encoder that reads the
feature is touched, and the run ends at the site. Rows do not depend on each other: their randomness comes from their
own seeds, their penalties and gradients are their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.dream.augment import Augmentation
from pysteer.dream.denoiser import Denoiser
from pysteer.dream.features import Features
from pysteer.dream.regularise import beyond_range, blur, moments_off, precondition, spectral_filter, total_variation
from pysteer.errors import InputError

Snapshot = Callable[[int, Tensor, dict[str, Tensor]], object]


@dataclass(frozen=True)
class DreamConfig:
    """How dreams are optimised. Pixels are those of the latents.

    Attributes:
        num_steps: of the optimisation.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        see_through_schedule_noise: noise the latents as the schedule does at their timestep, afresh at every step.
        total_variation_penalty_weight: of neighbouring pixels that differ.
        range_penalty_weight: of values beyond `range_penalty_threshold`, squared.
        range_penalty_threshold: see there.
        moment_penalty_weight: of a mean other than 0 and a standard deviation other than 1.
        use_gradient_spectral_filtering: divide every frequency f of the gradient by 1 + |f|.
        gradient_smoothing_sigma_start: blur of the gradient at the first step.
        gradient_smoothing_sigma_end: at the last step; linear in between.
        gradient_smoothing_kernel_size: in pixels.
        jitter_max: most pixels the latents are rolled by.
        rotate_max: most degrees they are turned by.
        scale_max: most they are enlarged by.
        leak: weight of tokens where a latent is not active, so that dreams of inactive features start at all.
        snapshot_every: steps between two snapshots; 0 for none but the last.
        autocast: run the model in bf16.
        compile: compile the model up to the site (pays from some hundred steps on).
        seed: of noise and augmentations.
    """

    num_steps: int = 100
    learning_rate: float = 0.05
    weight_decay: float = 0.01
    see_through_schedule_noise: bool = True
    total_variation_penalty_weight: float = 0.5
    range_penalty_weight: float = 0.5
    range_penalty_threshold: float = 3.0
    moment_penalty_weight: float = 0.0
    use_gradient_spectral_filtering: bool = True
    gradient_smoothing_sigma_start: float = 0.5
    gradient_smoothing_sigma_end: float = 0.0
    gradient_smoothing_kernel_size: int = 9
    jitter_max: int = 1
    rotate_max: float = 5.0
    scale_max: float = 1.1
    leak: float = 0.01
    snapshot_every: int = 10
    autocast: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.snapshot_every < 0:
            value = f"{self.num_steps}, {self.snapshot_every}"
            raise InputError("num_steps, snapshot_every", value=value, allowed="from 1, from 0")
        if not 0 < self.learning_rate < math.inf:
            raise InputError("learning_rate", value=self.learning_rate, allowed="a number above 0")
        if self.gradient_smoothing_kernel_size % 2 == 0:
            raise InputError(
                "gradient_smoothing_kernel_size", value=self.gradient_smoothing_kernel_size, allowed="an odd number"
            )


@dataclass(frozen=True)
class Dreams:
    """What a batch of R dreams became.

    Attributes:
        latents: fp32 `[R, ...]`.
        figures: by name (activation, total_variation, range, moment, loss) `[R]`, of the latents as they are, without
            augmentation, with the noise of the last step where noise is seen through.
    """

    latents: Tensor
    figures: dict[str, Tensor]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While the block runs no parameter of the module asks for a gradient."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def row_generator(*keys: int | float) -> torch.Generator:
    """A generator of its own for some numbers."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Objective:
    """How active one feature per row is: mean over the tokens of `max(w x + c, 0)` (raw channels: of `x_c`).

    Args:
        features: of the site.
        chosen: the feature of every row.
        device: where the activations are.
        leak: weight of the negative side in `soft`.
    """

    def __init__(self, features: Features, chosen: Sequence[int], device: torch.device, leak: float) -> None:
        self.weight, self.bias = features.readers(torch.tensor(list(chosen)), device)
        self.latent, self.leak, self.channels_first = features.sae is not None, leak, features.channel_dim == 1

    def pre(self, x: Tensor) -> Tensor:
        """`w x + c` of every token, `[R, L]`: one dot product a token, whatever the size of the autoencoder."""
        tokens = x.flatten(2).float() if self.channels_first else x.float().reshape(len(x), -1, x.shape[-1])
        a = torch.einsum("rdl,rd->rl" if self.channels_first else "rld,rd->rl", tokens, self.weight)
        return a + self.bias[:, None]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is optimised, and the activation itself, `[R]` each."""
        a = self.pre(x)
        if not self.latent:
            return a.mean(1), a.detach().mean(1)
        soft = torch.nn.functional.leaky_relu(a, self.leak).mean(1)
        return soft, a.detach().relu().mean(1)


class _Maps:
    """Latents as maps `[R, C, H, W]`, also where the pipeline packs them into a square of tokens `[R, L, C]`."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.packed = len(shape) == 2
        self.side = math.isqrt(shape[0]) if self.packed else 0
        if len(shape) not in (2, 3) or (self.packed and self.side**2 != shape[0]):
            raise InputError("latents to dream with", value=list(shape), allowed="[C, H, W], or a square of tokens")

    def open(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).reshape(len(z), z.shape[2], self.side, self.side) if self.packed else z

    def close(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).transpose(1, 2) if self.packed else maps


class Dreamer:
    """Optimises batches of dreams at one site.

    Args:
        denoiser: what the latents are given to.
        features: of the site.
        config: how.
    """

    def __init__(self, denoiser: Denoiser, features: Features, config: DreamConfig) -> None:
        self.denoiser, self.features, self.config = denoiser, features, config
        self.maps = _Maps(denoiser.shape)
        self.move = Augmentation(config.jitter_max, config.rotate_max, config.scale_max)

    def start(self, seeds: Sequence[int]) -> Tensor:
        """Noise to start from, one row per seed, fp32 `[R, ...]`."""
        rows = [torch.randn(self.denoiser.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows)

    def __call__(
        self,
        latents: Tensor,
        chosen: Sequence[int],
        timesteps: Sequence[float],
        seeds: Sequence[int],
        *,
        snapshot: Snapshot | None = None,
    ) -> Dreams:
        """Optimise.

        Args:
            latents: where every row starts, `[R, ...]`.
            chosen: the feature of every row.
            timesteps: of every row.
            seeds: of every row; a row's randomness depends on its seed, feature and timestep alone.
            snapshot: told `(step, latents, figures)` at step 0, every `snapshot_every` steps and at the end.

        Raises:
            InputError: numbers of rows that do not fit.
        """
        if not len(latents) == len(chosen) == len(timesteps) == len(seeds) or not len(latents):
            value = f"{len(latents)}, {len(chosen)}, {len(timesteps)}, {len(seeds)}"
            raise InputError("latents, features, timesteps, seeds", value=value, allowed="as many of each, not none")
        device, c = self.denoiser.device, self.config
        objective = Objective(self.features, chosen, device, c.leak)
        rows = zip(seeds, chosen, timesteps, strict=True)
        generators = [row_generator(c.seed, seed, feature, time) for seed, feature, time in rows]
        times = torch.tensor([float(time) for time in timesteps], device=device)
        z = latents.detach().to(device, torch.float32).clone().requires_grad_(True)
        adam = torch.optim.AdamW([z], lr=c.learning_rate, weight_decay=c.weight_decay)
        shape = self.maps.open(z).shape
        scale = spectral_filter(shape[2], shape[3], device)
        with frozen(self.denoiser.module), self.denoiser.reading(self.features.site) as read:
            run = torch.compile(read) if c.compile else read
            for step in range(c.num_steps):
                noise, draws = self._draw(generators, z)
                loss, figures = self._loss(run, z, noise, draws, times, objective)
                if snapshot is not None and c.snapshot_every and step % c.snapshot_every == 0:
                    snapshot(step, z.detach().clone(), figures)
                (gradient,) = torch.autograd.grad(loss, z)
                z.grad = self._shaped(gradient, step, scale)
                adam.step()
            noise, _ = self._draw(generators, z)
            with torch.no_grad():
                _, figures = self._loss(run, z, noise, None, times, objective)
        made = z.detach()
        if snapshot is not None:
            snapshot(c.num_steps, made.clone(), figures)
        return Dreams(made.cpu(), {name: value.cpu() for name, value in figures.items()})

    def _draw(self, generators: list[torch.Generator], z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and moves of a step, from the generator of every row."""
        draws = self.move.draw(generators)
        noise = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators])
        return noise.to(z.device), draws

    def _loss(
        self, run: Any, z: Tensor, noise: Tensor, draws: Tensor | None, times: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the rows of their losses, and the figures of every row."""
        c, maps = self.config, self.maps.open(z)
        seen = z if draws is None else self.maps.close(self.move(maps, draws))
        if c.see_through_schedule_noise:
            seen = self.denoiser.noised(seen, noise, times)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=c.autocast):
            x = run(seen, times)
        wanted, activation = objective(x)
        penalties = {
            "total_variation": (c.total_variation_penalty_weight, total_variation(maps)),
            "range": (c.range_penalty_weight, beyond_range(maps, c.range_penalty_threshold)),
            "moment": (c.moment_penalty_weight, moments_off(maps)),
        }
        loss = sum((weight * value for weight, value in penalties.values() if weight), -wanted)
        figures = {"activation": activation, **{name: value.detach() for name, (_, value) in penalties.items()}}
        return loss.sum(), {**figures, "loss": loss.detach()}

    def _shaped(self, gradient: Tensor, step: int, scale: Tensor) -> Tensor:
        """The gradient with its spectrum and its smoothness changed."""
        c, maps = self.config, self.maps.open(gradient)
        if c.use_gradient_spectral_filtering:
            maps = precondition(maps, scale)
        start, end = c.gradient_smoothing_sigma_start, c.gradient_smoothing_sigma_end
        sigma = start + (end - start) * step / max(c.num_steps - 1, 1)
        return self.maps.close(blur(maps, sigma, c.gradient_smoothing_kernel_size)).contiguous()
