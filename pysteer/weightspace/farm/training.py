"""DreamBooth training of A adapters at once: every step is one run of the denoiser over A times I rows.

The adapters do not meet: the loss is the sum of their own losses, Adam works element by element, and each draws its
pictures, timesteps and noise from a generator of its own. An adapter is therefore the same in any batch, up to the
rounding of batched products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.weightspace.farm.concepts import Lesson
from pysteer.weightspace.farm.many import Factors, find_layers, many_adapters


@dataclass(frozen=True)
class TrainingConfig:
    """How adapters are trained.

    Attributes:
        steps: optimizer steps.
        rows: images of an adapter in a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: `constant`, or `linear` from `lr` down to zero.
        prompt: for all adapters; `{class}` in it is replaced by the class, which then leaks into the weights.
        init: `own`, every adapter starts from factors of its own, or `shared`, all start from the same.
        targets: names of the layers that get factors.
        alpha: scale of the factors times the rank; the rank itself when None, so that the scale is 1.
        precision: of the frozen denoiser.
    """

    steps: int = 60
    rows: int = 4
    lr: float = 1e-2
    weight_decay: float = 1e-2
    schedule: Literal["constant", "linear"] = "linear"
    prompt: str = ""
    init: Literal["own", "shared"] = "own"
    targets: tuple[str, ...] = ("to_q", "to_v")
    alpha: float | None = None
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise InputError(name, value=getattr(self, name), allowed=f"a whole number from {least}")
        if not self.lr > 0 or self.weight_decay < 0:
            raise InputError("lr, weight_decay", value=(self.lr, self.weight_decay), allowed="lr > 0, decay >= 0")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError("alpha", value=self.alpha, allowed="above 0, or nothing for the rank")
        if not self.targets:
            raise InputError("targets", value="none", allowed="at least one name of a layer")

    def prompt_of(self, lesson: Lesson) -> str:
        """The prompt that an adapter is trained with."""
        return self.prompt.replace("{class}", lesson.class_word)

    def scale_of(self, rank: int) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / rank


@dataclass(frozen=True)
class Trained:
    """Adapters as they came out of a batch: factors, and the loss of every adapter at every step fp32 [steps, A]."""

    factors: Factors
    losses: Tensor


class Teacher:
    """A pipeline made ready for training: a frozen copy of its denoiser, its encoders, its noise schedule.

    Args:
        pipe: a diffusers pipeline with a UNet that takes a text encoding and nothing else, such as Stable Diffusion.
        config: how to train.

    Raises:
        InputError: another kind of pipeline, or one that predicts something other than noise, image or velocity.
    """

    def __init__(self, pipe: Any, config: TrainingConfig) -> None:
        unet = getattr(pipe, "unet", None)
        if unet is None or getattr(unet.config, "addition_embed_type", None) is not None:
            raise InputError("pipeline", value=type(pipe).__name__, allowed="one with a UNet and one text encoder")
        self.prediction = pipe.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise InputError("prediction_type", value=self.prediction, allowed="epsilon, v_prediction, sample")
        self.pipe, self.config, self.device = pipe, config, unet.device
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
        self.unet = copy.deepcopy(unet).requires_grad_(False).eval()
        for part in self.unet.children():  # part by part: a cast of the whole model makes diffusers warn
            part.to(dtype)
        self.dtype = dtype
        if self.device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            self.unet.set_attn_processor(AttnProcessor())  # plain products: their backward is the faster one on a CPU
            self.unet.to(memory_format=torch.channels_last)
        self.layers = find_layers(self.unet, config.targets)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Latents fp32 [N, C, h, w] (posterior means, scaled as the denoiser takes them) of uint8 [N, H, W, 3]."""
        vae = self.pipe.vae
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
        means = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)]).float()
        return (means - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The encoding [L, D] of a prompt; kept."""
        if prompt not in self._texts:
            given = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
            self._texts[prompt] = self.pipe.encode_prompt(prompt, **given)[0][0].to(self.dtype)
        return self._texts[prompt]

    def initial(self, lessons: Sequence[Lesson]) -> Factors:
        """Factors before training: `down` drawn from N(0, 1/r), `up` zeros, zeros beyond an adapter's own rank.

        An adapter draws the numbers of rank 4 whatever its rank, so that ranks share their first rows.
        """
        widest = max(lesson.rank for lesson in lessons)
        down: dict[str, list[Tensor]] = {path: [] for path in self.layers}
        for lesson in lessons:
            generator = torch.Generator().manual_seed(0 if self.config.init == "shared" else lesson.seed)
            for path, layer in self.layers.items():
                drawn = torch.randn(max(4, widest), layer.in_features, generator=generator)[:widest] / lesson.rank**0.5
                drawn[lesson.rank :] = 0
                down[path].append(drawn)
        up = {path: torch.zeros(len(lessons), layer.out_features, widest) for path, layer in self.layers.items()}
        stacked = {path: torch.stack(parts).to(self.device) for path, parts in down.items()}
        return Factors(stacked, {path: value.to(self.device) for path, value in up.items()})

    def train(self, lessons: Sequence[Lesson], advance: Callable[[float], None] = lambda units: None) -> Trained:
        """Train the adapters of `lessons`; `advance(1)` after every step.

        Raises:
            InputError: no lessons.
        """
        if not lessons:
            raise InputError("lessons", value=0, allowed="at least one")
        config, start = self.config, self.initial(lessons)
        scale = torch.tensor([config.scale_of(lesson.rank) for lesson in lessons], device=self.device)
        draws = [Draws(self.latents(lesson.images), lesson.seed, config.rows) for lesson in lessons]
        text = torch.stack([self.text(config.prompt_of(lesson)) for lesson in lessons])
        text = text.repeat_interleave(config.rows, 0)
        losses = torch.empty(config.steps, len(lessons))
        with many_adapters(self.unet, start, scale, config.rows) as layers:
            weights = [weight for layer in layers.values() for weight in (layer.down, layer.up)]
            optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
            for step in range(config.steps):
                if config.schedule == "linear":
                    optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
                loss = self.losses(draws, text)
                loss.sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses[step] = loss.detach().cpu()
                advance(1)
            down = {path: layer.down.detach().cpu() for path, layer in layers.items()}
            up = {path: layer.up.detach().cpu() for path, layer in layers.items()}
        return Trained(Factors(down, up), losses)

    def losses(self, draws: Sequence[Draws], text: Tensor) -> Tensor:
        """The mean squared error of every adapter, fp32 [A], on its next pictures; `text` [A I, L, D]."""
        scheduler = self.pipe.scheduler
        total = int(scheduler.config.num_train_timesteps)
        parts = [draw.next(total) for draw in draws]
        latents, noise = (torch.cat(given) for given in list(zip(*parts, strict=True))[:2])
        steps = torch.cat([part[2] for part in parts]).to(self.device)
        noisy = scheduler.add_noise(latents, noise, steps).to(self.dtype)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        made = self.unet(noisy, steps, text, return_dict=False)[0].float()
        wanted = noise if self.prediction == "epsilon" else latents
        if self.prediction == "v_prediction":
            wanted = scheduler.get_velocity(latents, noise, steps)
        return (made - wanted).square().reshape(len(draws), -1).mean(1)


class Draws:
    """The pictures, noise and timesteps of one adapter, from a generator of its own."""

    def __init__(self, latents: Tensor, seed: int, rows: int) -> None:
        self.latents, self.rows = latents, rows
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.order: list[int] = []

    def next(self, timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise [I, C, h, w], timesteps [I] spread evenly; all pictures are seen before one comes again."""
        while len(self.order) < self.rows:
            self.order += torch.randperm(len(self.latents), generator=self.generator).tolist()
        chosen, self.order = self.order[: self.rows], self.order[self.rows :]
        picked = self.latents[chosen]
        noise = torch.randn(picked.shape, generator=self.generator).to(picked.device)
        spread = (torch.arange(self.rows) + torch.rand(self.rows, generator=self.generator)) / self.rows
        return picked, noise, (timesteps * spread).long()
