"""How the bundled pipeline is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

DEFAULTS: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 20}


class Sampler:
    """A diffusers pipeline as the evaluation calls it: prompts and a seed each -> uint8 images."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any) -> SimpleNamespace:
        """Images uint8 [N, H, W, 3]."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = self.pipe(list(prompts), generator=generators, output_type="np", **settings).images
        return SimpleNamespace(images=torch.from_numpy(made).mul(255).round().to(torch.uint8))
