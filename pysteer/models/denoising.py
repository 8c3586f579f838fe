"""A run of a diffusers pipeline that can stop after any step and fork."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pysteer.errors import InputError

if TYPE_CHECKING:
    from pysteer.models.diffusion import DiffusionOutput, ImageGenerator

_OURS = ("set_timesteps", "step", "all_timesteps")  # what a resumed run puts on the scheduler
_KEPT = ("_internal_dict", *_OURS)  # and its configuration


class _Stopped(Exception):
    """Ends a call of the pipeline after a step."""


class Denoising:
    """A run of a pipeline: `advance(until)` computes steps, `fork(rows)` makes a run whose row i goes on from row
    `rows[i]`, so rows that go the same way at first are computed once. Made by `ImageGenerator.begin`.

    A run goes on by calling the pipeline again with the latents, the state of the scheduler and of every row's noise
    stream as they were. Prompts are encoded again then, so steering of a text encoder has to be there again, too.

    Attributes:
        at: how many steps are done.
        steps: of the whole run.
        output: images and latents after the last step.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative: Sequence[str] | None,
        decode: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.generator, self.decode = generator, decode
        self.prompts, self.settings = list(prompts), dict(settings)
        self.negative = None if negative is None else list(negative)
        self.noise = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on every device
        self.steps = generator.steps(**self.settings)
        self.at = 0
        self.latents: Tensor | None = None
        self.state: dict[str, Any] = {}
        self.output: DiffusionOutput | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @torch.no_grad()
    def advance(self, until: int | None = None) -> Denoising:
        """Compute the steps before `until`, by default all that are left, and the images after the last one."""
        end = self.steps if until is None else until
        if not self.at <= end <= self.steps:
            raise InputError("step to go on to", value=end, allowed=f"{self.at} to {self.steps}")
        if end == self.at:
            return self
        if end < self.steps:
            self._check()
        given = dict(self.settings) if self.latents is None else {**self.settings, "latents": self._scaled()}
        if self.negative is not None:
            given["negative_prompt"] = self.negative
        with self._resumed():
            if end == self.steps:
                self.output = self.generator.run(self.prompts, self.noise, self.decode, given)
                self.latents = self.output.latents
            else:
                self._run_until(end, given)
        self.at = end
        return self

    def _run_until(self, end: int, given: dict[str, Any]) -> None:
        last, begun = end - 1 - self.at, self.at

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if step == last:
                self.latents = tensors["latents"]
                raise _Stopped
            return {}

        try:
            self.generator.run(self.prompts, self.noise, False, {**given, "callback_on_step_end": stop})
        except _Stopped:
            scheduler = self.generator.pipe.scheduler
            full = self.state["timesteps"] if begun else scheduler.timesteps
            self.state = {name: _copied(value) for name, value in vars(scheduler).items() if name not in _KEPT}
            self.state["timesteps"] = full
            return
        raise InputError("steps of the run", value=end, fix="the pipeline ended before that step")

    def _check(self) -> None:
        reason = self.generator.why_not_forked(self.settings)
        if reason:
            raise InputError("run that stops between steps", value=reason, fix="run it as a whole")

    def _scaled(self) -> Tensor:
        """The latents as the pipeline takes them: it multiplies them with the noise level of the first step."""
        assert self.latents is not None
        scheduler = self.generator.pipe.scheduler
        return self.latents / scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else self.latents

    @contextmanager
    def _resumed(self) -> Iterator[None]:
        """Have the pipeline go on where this run stopped: its scheduler lists the steps that are left only."""
        if not self.at:
            yield
            return
        scheduler, state, at = self.generator.pipe.scheduler, self.state, self.at

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            vars(scheduler).update({name: _copied(value) for name, value in state.items()})
            scheduler.timesteps = state["timesteps"][at:]

        def step(*args: Any, **kwargs: Any) -> Any:
            scheduler.timesteps = state["timesteps"]  # the pipeline has the list by now, and solvers count on all
            return type(scheduler).step(scheduler, *args, **kwargs)

        functools.update_wrapper(step, type(scheduler).step)  # pipelines look at its arguments
        scheduler.all_timesteps = state["timesteps"]
        scheduler.set_timesteps, scheduler.step = set_timesteps, step
        try:
            yield
        finally:
            for name in _OURS:
                delattr(scheduler, name)
            scheduler.timesteps = state["timesteps"]

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None) -> Denoising:
        """A run of `len(rows)` images, number i going on from image `rows[i]` and from the state of its noise.

        Args:
            rows: int64 `[N]`, each below the number of images; in any order, with repetitions.
            seeds: not used: the noise of an image begins with its first step.
        """
        index, count = rows.tolist(), len(self)
        forked: Denoising = object.__new__(Denoising)
        forked.__dict__.update(self.__dict__)
        forked.prompts = [self.prompts[i] for i in index]
        forked.negative = None if self.negative is None else [self.negative[i] for i in index]
        forked.noise = [torch.Generator().set_state(self.noise[i].get_state()) for i in index]
        forked.latents = None if self.latents is None else self.latents[rows.to(self.latents.device)]
        forked.state = {name: _taken(value, rows, count) for name, value in self.state.items()}
        return forked


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _taken(value: Any, rows: Tensor, count: int) -> Any:
    """What a scheduler keeps, for other rows: tensors with more than one dimension are per row, others per step."""
    if isinstance(value, list):
        return [_taken(item, rows, count) for item in value]
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == count:
        return value[rows.to(value.device)]
    return value
