"""Images over strengths: all strengths of a prompt are rows of one batch, stored in a folder per strength."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import pysteer
from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.frame import Run
from pysteer.recipes.progress import Advance
from pysteer.recipes.transport.settings import ImageSettings
from pysteer.steering import Plan


def folder_name(strength: float, guidance: float) -> str:
    """`0.500_7.500`: strength and guidance scale, three decimals each."""
    return f"{strength:.03f}_{guidance:.03f}"


def guidance_key(pipe: Any) -> str:
    """What the generator calls its guidance scale."""
    return "guidance_scale" if hasattr(pipe, "pipe") else "cfg"


def own_guidance(pipe: Any, settings: ImageSettings) -> float:
    """The guidance scale the generator uses when none is given."""
    key = guidance_key(pipe)
    if key in settings.settings:
        return float(settings.settings[key])
    defaults = getattr(pipe, "defaults", {})
    if key in defaults:
        return float(defaults[key])
    from pysteer.models.infinity.generate import generate

    call = pipe.pipe.__call__ if hasattr(pipe, "pipe") else generate
    parameter = inspect.signature(call).parameters.get(key)
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, (int, float)) else 1.0


class ImageWriter:
    """Generates images and keeps them in the run folder, in batches that are stages.

    Args:
        run: the run.
        pipe: an `InfinityPipeline` or `ImageGenerator`.
        settings: how.
        identity: what beside the configuration the images depend on.
    """

    def __init__(self, run: Run, pipe: Any, settings: ImageSettings, identity: Any) -> None:
        self.run, self.pipe, self.settings, self.identity = run, pipe, settings, identity

    def call_settings(self, guidance: float | None = None) -> dict[str, Any]:
        """Arguments of a generation."""
        chosen = dict(self.settings.settings)
        if self.settings.inference_steps:
            if not hasattr(self.pipe, "pipe"):
                raise InputError(
                    "generation.inference_steps", value=self.settings.inference_steps, allowed="0 for this model"
                )
            chosen["num_inference_steps"] = self.settings.inference_steps
        if guidance is not None:
            chosen[guidance_key(self.pipe)] = guidance
        return chosen

    def write(
        self,
        key: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        strengths: Sequence[float],
        guidance: float,
        plan: Plan | None,
        advance: Advance,
    ) -> dict[float, Tensor]:
        """Images uint8 `[N, H, W, 3]` per strength; strength 0 is unsteered and comes with the others.

        Image i of every strength has the same noise. PNG files lie in `images/{key}/{strength}_{guidance}/{i}.png`.
        """
        per_batch = max(1, self.settings.rows // len(strengths))
        for number, start in enumerate(range(0, len(prompts), per_batch)):
            part = slice(start, start + per_batch)
            places = range(len(prompts))[part]
            paths = {(s, i): self._path(key, s, guidance, i) for s in strengths for i in places}
            name = f"images-{key}-{guidance:g}-{number}".replace(".", "_")
            with self.run.stage(name, self.identity, quiet=True) as stage:
                if not stage.done or not all(path.is_file() for path in paths.values()):
                    made = self._made(list(prompts[part]), list(seeds[part]), strengths, guidance, plan)
                    for (strength, i), path in paths.items():
                        files.write_image(path, self._sized(made[strength][i - start]))
            advance(len(paths))
        return {s: self._read(key, s, guidance, len(prompts)) for s in strengths}

    def _path(self, key: str, strength: float, guidance: float, index: int) -> Path:
        return self.run.path(f"images/{key}/{folder_name(strength, guidance)}/{index}.png")

    def _made(
        self, prompts: list[str], seeds: list[int], strengths: Sequence[float], guidance: float, plan: Plan | None
    ) -> dict[float, Tensor]:
        rows, numbers = prompts * len(strengths), seeds * len(strengths)
        settings = self.call_settings(guidance)
        if plan is None:
            images = self.pipe(rows, seeds=numbers, **settings).images
        else:
            levels = torch.tensor([s for s in strengths for _ in prompts], dtype=torch.float32)
            with pysteer.steer(self.pipe, plan, strength=levels):
                images = self.pipe(rows, seeds=numbers, **settings).images
        return dict(zip(strengths, images.cpu().split(len(prompts)), strict=True))

    def _sized(self, image: Tensor) -> Image.Image:
        picture = Image.fromarray(image.contiguous().numpy(), "RGB")
        side = self.settings.size
        return picture.resize((side, side), Image.Resampling.BICUBIC) if side else picture

    def _read(self, key: str, strength: float, guidance: float, count: int) -> Tensor:
        found = []
        for index in range(count):
            with Image.open(self._path(key, strength, guidance, index)) as picture:
                found.append(torch.from_numpy(np.array(picture.convert("RGB"))))
        return torch.stack(found)

    def animate(self, key: str, guidance: float, images: dict[float, Tensor]) -> list[Path]:
        """A picture per prompt that goes through the strengths and back; none where none is wanted."""
        kind = self.settings.animation
        if kind == "none" or len(images) < 2:
            return []
        written = []
        for index in range(len(next(iter(images.values())))):
            frames = [Image.fromarray(images[s][index].contiguous().numpy(), "RGB") for s in sorted(images)]
            frames += frames[-2:0:-1]
            path = self.run.path(f"images/{key}/animations/{index}_{guidance:.03f}_animation.{kind}")
            more: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
            with files.atomic_path(path) as temporary:
                frames[0].save(
                    temporary, save_all=True, append_images=frames[1:], duration=self.settings.frame_ms, loop=0, **more
                )
            written.append(path)
        return written
