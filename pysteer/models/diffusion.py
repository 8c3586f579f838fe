"""A diffusers pipeline with what the rest of the library asks of a generator of images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.models.denoising import Denoising
from pysteer.steering.site import did_you_mean

_OURS = {"generator": "seeds", "output_type": "decode", "prompt": "prompts", "negative_prompt": "negative_prompts"}

_NOT_FORKED = ("PNDMScheduler", "DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


@dataclass
class DiffusionOutput:
    """images: uint8 `[N, H, W, 3]` on the CPU, None where none were wanted; latents: as the pipeline gives them."""

    images: Tensor | None
    latents: Tensor | None


class ImageGenerator:
    """Text to image with a pipeline of diffusers, for `pysteer.steer`, `pysteer.fit`, `Recorder` and `locate`.

        generator = ImageGenerator.from_pretrained("stabilityai/sdxl-turbo", dtype=torch.float16).to("cuda")
        fitted = pysteer.fit(generator, LinearAcT(), plain, about, sites="ca", settings={"num_inference_steps": 1})
        with pysteer.steer(generator, fitted.plan()):
            images = generator(prompts, seeds=0, num_inference_steps=1).images

    Args:
        pipe: a `DiffusionPipeline` that makes images of prompts.
    """

    def __init__(self, pipe: Any) -> None:
        if not any(base.__name__ == "DiffusionPipeline" for base in type(pipe).__mro__):
            raise InputError("pipe", value=type(pipe).__name__, allowed="a DiffusionPipeline")
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> ImageGenerator:
        """Load a folder or a model of the hub; options go to `DiffusionPipeline.from_pretrained`."""
        from diffusers import DiffusionPipeline

        return cls(DiffusionPipeline.from_pretrained(name, **options))

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        device: torch.device = self.pipe._execution_device
        return device

    def to(self, *args: Any, **kwargs: Any) -> ImageGenerator:
        """Move or cast the pipeline, as `DiffusionPipeline.to`."""
        self.pipe.to(*args, **kwargs)
        return self

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        decode: bool = True,
        negative_prompts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> DiffusionOutput:
        """Generate one image per prompt. The noise of an image is that of its seed, whatever else is in the batch.

        Args:
            prompts: N prompts.
            seeds: of the first image, counting up, or one per prompt.
            decode: whether to make images of the latents.
            negative_prompts: one for all or one per prompt; they need guidance.
            batch_size: prompts at a time, None for all.
            settings: arguments of the pipeline's call: num_inference_steps, guidance_scale, height and so on.

        Raises:
            InputError: seeds or negative prompts that do not fit, or a setting that the pipeline does not have.
        """
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise InputError("batch_size", value=batch_size, allowed="a whole number above 0")
        prompts, numbers, negative = self._rows(prompts, seeds, negative_prompts, settings)
        count = len(prompts)
        batches, size = [], batch_size or count
        for start in range(0, count, size):
            part = slice(start, start + size)
            more = {} if negative is None else {"negative_prompt": negative[part]}
            noise = [torch.Generator().manual_seed(seed) for seed in numbers[part]]  # on the CPU: the same everywhere
            batches.append(self.run(prompts[part], noise, decode, {**settings, **more}))
        images = torch.cat([batch.images for batch in batches if batch.images is not None]) if decode else None
        latents = [batch.latents for batch in batches if batch.latents is not None]
        return DiffusionOutput(images, torch.cat(latents) if latents else None)

    def begin(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        decode: bool = True,
        negative_prompts: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> Denoising:
        """The same as a call, but in parts: to be advanced step by step, and forked."""
        return Denoising(self, *self._rows(prompts, seeds, negative_prompts, settings), decode, settings)

    def why_not_forked(self, settings: Mapping[str, Any]) -> str:
        """Why a run cannot stop between its steps and go on with other rows; "" where it can."""
        scheduler, known = self.pipe.scheduler, self._arguments()
        if "callback_on_step_end" not in known or "latents" not in known:
            return f"{type(self.pipe).__name__} takes no latents or no callback"
        if getattr(scheduler, "order", 1) != 1 or type(scheduler).__name__ in _NOT_FORKED:
            return f"{type(scheduler).__name__} takes several parts per step, or noise of its own"
        taken = {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "latents", "timesteps", "sigmas"}
        return f"settings {', '.join(sorted(taken & set(settings)))}" if taken & set(settings) else ""

    def _rows(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        negative_prompts: str | Sequence[str] | None,
        settings: Mapping[str, Any],
    ) -> tuple[list[str], list[int], list[str] | None]:
        """Prompts, seeds and negative prompts, one per image."""
        prompts = _texts("prompts", prompts)
        count = len(prompts)
        numbers = list(range(seeds, seeds + count)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if len(numbers) != count:
            raise InputError("seeds", value=len(numbers), allowed=f"one number or {count} numbers (one per prompt)")
        negative = None if negative_prompts is None else _texts("negative_prompts", negative_prompts, count)
        self._check(settings, negative is not None)
        return prompts, numbers, negative

    def run(
        self, prompts: list[str], noise: list[torch.Generator], decode: bool, settings: dict[str, Any]
    ) -> DiffusionOutput:
        """One call of the pipeline, every image with a noise stream of its own, which is used up."""
        last: list[Tensor] = []
        if decode:
            settings = {**settings, **self._keeping(last, settings)}
        out = self.pipe(prompt=prompts, generator=noise, output_type="pt" if decode else "latent", **settings)
        if not hasattr(out, "images"):
            raise InputError("pipeline", value=type(self.pipe).__name__, allowed="one that makes images")
        if not decode:
            return DiffusionOutput(None, out.images)
        pixels = out.images.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
        return DiffusionOutput(pixels.permute(0, 2, 3, 1).contiguous(), last[0] if last else None)

    def _keeping(self, last: list[Tensor], settings: dict[str, Any]) -> dict[str, Any]:
        """The callback that keeps the latents of the last step, after a callback of the user."""
        own = settings.get("callback_on_step_end")
        if "callback_on_step_end" not in self._arguments():
            return {}

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            given = tensors["latents"]
            changed = own(pipe, step, timestep, tensors) if own is not None else None
            last[:] = [(changed or {}).get("latents", given)]
            return changed or {}

        names = settings.get("callback_on_step_end_tensor_inputs", ["latents"])
        return {
            "callback_on_step_end": keep,
            "callback_on_step_end_tensor_inputs": list(dict.fromkeys([*names, "latents"])),
        }

    def _arguments(self) -> dict[str, inspect.Parameter]:
        return dict(list(inspect.signature(type(self.pipe).__call__).parameters.items())[1:])

    def _check(self, settings: Mapping[str, Any], negative: bool) -> None:
        known = self._arguments()
        for name in settings:
            if name in _OURS:
                raise InputError("setting", value=name, fix=f"give {_OURS[name]}=")
            if name not in known:
                raise InputError(
                    f"setting of {type(self.pipe).__name__}", value=name, allowed=", ".join(known),
                    fix=did_you_mean(name, known),
                )  # fmt: skip
        if settings.get("num_images_per_prompt", 1) != 1:
            raise InputError("num_images_per_prompt", value=settings["num_images_per_prompt"], fix="repeat the prompts")
        if negative and "negative_prompt" not in known:
            raise InputError("negative_prompts", value=type(self.pipe).__name__, allowed="a pipeline that takes them")

    def steps(self, **settings: Any) -> int:
        """How many denoising steps a call with these settings takes."""
        for name in ("timesteps", "sigmas"):
            if settings.get(name) is not None:
                return len(settings[name])
        default = self._arguments()["num_inference_steps"].default
        return int(settings.get("num_inference_steps", default))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Any:
        """Run the text encoders over the prompts; returns what `encode_prompt` of the pipeline does."""
        encode = self.pipe.encode_prompt
        known = inspect.signature(encode).parameters
        given = {
            "prompt": _texts("prompts", prompts), "device": self.device, "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }  # fmt: skip
        needed = {name: None for name, it in known.items() if it.default is inspect.Parameter.empty}
        return encode(**{**needed, **{name: value for name, value in given.items() if name in known}})

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of every prompt as the first text encoder gets them: padded, unless padding is masked out."""
        tokenizer = self.pipe.tokenizer
        masked = any("mask" in name for name in inspect.signature(type(self.pipe).encode_prompt).parameters)
        padding = {} if masked else {"padding": "max_length", "max_length": tokenizer.model_max_length}
        ids: list[list[int]] = tokenizer(_texts("prompts", prompts), truncation=True, **padding)["input_ids"]
        return ids


def _texts(what: str, given: str | Sequence[str], count: int = 0) -> list[str]:
    texts = [given] * (count or 1) if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts) or (count and len(texts) != count):
        allowed = f"one text or {count} texts" if count else "a list with at least one string"
        raise InputError(what, value=given, allowed=allowed)
    return texts
