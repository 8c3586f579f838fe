"""A denoiser on its own: run with given latents and timesteps per row, up to one site and no further."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError, PysteerError
from pysteer.families.base import find_family
from pysteer.families.diffusion_runs import Call
from pysteer.steering.attach import attach
from pysteer.steering.site import Site

_TIMES = ("timestep", "timesteps", "t")
_ROWS = 2  # of the call that is recorded: what has as many rows in it is there once per row


def unguided(pipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`, without guidance where the pipeline has it and they say nothing of it."""
    known = inspect.signature(type(getattr(pipe, "pipe", pipe)).__call__).parameters
    return {**({"guidance_scale": 1.0} if "guidance_scale" in known else {}), **settings}


class _Reached(Exception):
    """The site has run: what comes after it is of no interest."""


class _Reader:
    """Attached to a site; keeps the activation and ends the run where no graph is being compiled.

    In a compiled graph the rest of the model is dead code, because nobody reads it: the compiler drops it.
    """

    def __init__(self, stop: bool) -> None:
        self.held: Tensor | None = None
        self.stop, self.reading = stop, False

    def apply(self, x: Tensor) -> Tensor:
        """See `pysteer.steering.attach.Applier`."""
        if torch.compiler.is_compiling():
            self.held = x
        elif self.reading:  # not when the pipeline runs in between, to decode
            self.held = x
            if self.stop:
                raise _Reached
        return x

    def to(self, device: torch.device) -> _Reader:
        """See there."""
        return self


class Denoiser:
    """The denoiser of a pipeline with the arguments it gets for one prompt.

    They are recorded from a call of the pipeline, so this works for whatever the denoiser is given besides latents and
    timestep.

    Args:
        pipe: an `ImageGenerator`.
        prompt: what the denoiser is conditioned on.
        settings: arguments of the pipeline.

    Attributes:
        shape: of the latents of one row, as the denoiser gets them.
        module: the denoiser.

    Raises:
        InputError: a pipeline without a denoiser that takes a timestep.
    """

    def __init__(self, pipe: Any, prompt: str = "", settings: Mapping[str, Any] | None = None) -> None:
        self.generator = pipe
        self.pipe = getattr(pipe, "pipe", pipe)
        family = find_family(pipe)
        found = family.root(pipe, "visual") if family.name == "diffusers" else None
        if found is None:
            raise InputError("pipeline", value=type(self.pipe).__name__, allowed="one of diffusers with a denoiser")
        self.module = found
        self.settings = unguided(pipe, settings or {})
        self._call = Call(self.module)
        self._time = next((name for name in self._call.names if name in _TIMES), "")
        if not self._time:
            raise InputError("denoiser", value=type(self.module).__name__, allowed="one that is given a timestep")
        self._sample = self._call.names[0]
        self._given = self._record(prompt)
        first = self._given.pop(self._sample)
        self.shape, self.dtype = tuple(first.shape[1:]), first.dtype
        time = torch.as_tensor(self._given.pop(self._time)).float().flatten()[0]
        largest = float(torch.as_tensor(self.pipe.scheduler.timesteps).float().max())
        self._time_scale = float(time) / largest if largest else 1.0

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.module.parameters()).device

    def _record(self, prompt: str) -> dict[str, Any]:
        held: dict[str, Any] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not held:
                held.update({**dict(zip(self._call.names, args, strict=False)), **kwargs})

        hook = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.generator([prompt] * _ROWS, seeds=0, decode=False, **{**self.settings, "num_inference_steps": 1})
        finally:
            hook.remove()
        if not held or len(held[self._sample]) != _ROWS:
            raise InputError("settings of the denoiser", value=self.settings, allowed="settings without guidance")
        return held

    def arguments(self, rows: int) -> dict[str, Any]:
        """The arguments besides latents and timestep for a batch of `rows`."""

        def spread(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == _ROWS:
                return value[:1].expand(rows, *value.shape[1:])
            if isinstance(value, dict):
                return {name: spread(each) for name, each in value.items()}
            if isinstance(value, list) and len(value) == _ROWS:
                return value[:1] * rows
            return value

        return {name: spread(value) for name, value in self._given.items()} | {"return_dict": False}

    def times(self, timesteps: Tensor) -> Tensor:
        """Timesteps of the scheduler as this denoiser wants them, `[R]`."""
        scaled = timesteps.to(self.device, torch.float32) * self._time_scale
        return scaled if self._time_scale != 1.0 else timesteps.to(self.device)

    @contextmanager
    def reading(self, site: Site, *, early_exit: bool = True) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """While the block runs, `f(latents [R, ...], timesteps [R])` gives the activation of a site, with gradients.

        The model runs up to the site: outside a compiled graph it is left there; in a compiled one, what comes after
        the site is dropped by the compiler.

        Args:
            site: of the denoiser.
            early_exit: False runs all of the model.
        """
        if site.part != "visual":
            raise InputError(f"part of site {site.name}", value=site.part, allowed="visual, the denoiser")
        reader, cache = _Reader(early_exit), dict[int, dict[str, Any]]()

        def read(latents: Tensor, timesteps: Tensor) -> Tensor:
            rows = len(latents)
            if rows not in cache:
                cache[rows] = self.arguments(rows)
            given = {self._sample: latents.to(self.dtype), self._time: self.times(timesteps), **cache[rows]}
            reader.held = None
            if torch.compiler.is_compiling():
                self.module(**given)
            else:
                reader.reading = True
                try:
                    with suppress(_Reached):
                        self.module(**given)
                finally:
                    reader.reading = False
            found = reader.held
            if found is None:
                raise PysteerError(f"site {site.name} did not run; fix: choose another site")
            return found

        with attach(self.module, [(site, reader)]):
            yield read
            reader.held = None

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents as they are at their timesteps, `sqrt(a_t) z + sqrt(1 - a_t) e`, or `(1 - s_t) z + s_t e` for flow
        matching, with `a` the cumulative alphas of the scheduler and `s = t / 1000`.

        Args:
            latents, noise: `[R, ...]`.
            timesteps: `[R]`.
        """
        scheduler = self.pipe.scheduler
        view = (-1, *[1] * (latents.dim() - 1))
        total = int(getattr(scheduler.config, "num_train_timesteps", 1000))
        if hasattr(scheduler, "alphas_cumprod"):
            place = timesteps.round().long().clamp(0, total - 1).to(latents.device)
            a = scheduler.alphas_cumprod.to(latents.device, latents.dtype)[place].view(view)
            return a.sqrt() * latents + (1 - a).sqrt() * noise
        s = (timesteps.to(latents.device, latents.dtype) / total).clamp(0, 1).view(view)
        return (1 - s) * latents + s * noise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 `[R, H, W, 3]` of latents `[R, ...]`, through the pipeline's own end.

        The pipeline runs one step and is given the latents as the result of it, so packing, scaling and post-processing
        are its own, whatever kind it is.
        """

        def put(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": latents.to(tensors["latents"])}

        given = {**self.settings, "num_inference_steps": 1, "callback_on_step_end": put}
        images: Tensor = self.generator([""] * len(latents), seeds=[0] * len(latents), **given).images
        return images
