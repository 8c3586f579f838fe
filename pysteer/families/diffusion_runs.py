"""What happens while a diffusers pipeline runs: the clock by timestep, the roles of rows, and being told of it all."""

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.families.per_object import PerObject

ROOM = 64  # steps that a plan may name before a run tells how many there are
_MOST_KNOWN = 4096
# What these are given of a timestep t, as a t + b; any other model gets t, t / 1000 or t times its `timestep_scale`.
_BACKWARDS = {
    "Lumina2Transformer2DModel": (-1e-3, 1.0),
    "LuminaNextDiT2DModel": (-1e-3, 1.0),
    "ZImageTransformer2DModel": (-1e-3, 1.0),
    "MochiTransformer3DModel": (-1.0, 1000.0),
}
_COND_FIRST = ("Lumina", "ZImage", "StableCascadePrior", "DiTPipeline")
_PERTURBED = "do_perturbed_attention_guidance"  # a property; what pipelines lack they look for in their configuration
_FAR = 1e30  # a timestep that none is near to


def inner_of(module: Any) -> Any:
    """The module inside a `torch.compile(module)` wrapper, else the module itself."""
    return module._orig_mod if isinstance(getattr(module, "_orig_mod", None), nn.Module) else module


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter is."""
    return next(module.parameters()).device


class Clock:
    """The denoising step, looked up by timestep on the device."""

    def __init__(self, model: nn.Module) -> None:
        device = device_of(model)
        scale = getattr(getattr(model, "config", None), "timestep_scale", None) or 1.0
        known = _BACKWARDS.get(type(model).__name__)
        given = [known] if known else [(1.0, 0.0), (1e-3, 0.0), (float(scale), 0.0)]
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.factors = torch.tensor([(1 / a, -b / a) for a, b in given], device=device).T.unsqueeze(-1)  # [2, K, 1]
        self.choice = torch.full((1,), -1, device=device)  # which of the K it is; found out at the first call
        self.values = torch.full((ROOM,), _FAR, device=device)
        self.places = torch.zeros(ROOM, dtype=torch.int64, device=device)
        self.source: Tensor | None = None
        self.taken: tuple[bool, Tensor] | None = None  # what was taken over from the source, on a CPU
        self.known: dict[float, int] = {}  # steps of timesteps that were looked up, on a CPU
        self.count = 0

    def take(self, timesteps: Tensor | None, *, repeats: bool, device: torch.device) -> None:
        """Take over the timesteps of a run, if they are others than before, and go to `device`."""
        if device != self.step.device:
            with torch.inference_mode(False):
                for name in ("step", "factors", "choice", "values", "places"):
                    setattr(self, name, getattr(self, name).to(device))
        if timesteps is None or timesteps is self.source:
            return
        self.source, count = timesteps, len(timesteps)
        if self._has_taken(timesteps, repeats):
            return
        self.count = count
        self.known.clear()
        with torch.inference_mode(False), torch.no_grad():
            if count > len(self.values):
                size = 1 << (count - 1).bit_length()
                self.values = torch.full((size,), _FAR, device=device)
                self.places = torch.zeros(size, dtype=torch.int64, device=device)
            new = timesteps[1:] != timesteps[:-1]
            self.values.fill_(_FAR)
            self.values[:count].copy_(timesteps)
            self.places[:count].copy_(torch.nn.functional.pad(new, (1, 0)).cumsum(0))
        if repeats:
            self.count = 1 + int(new.sum())

    def _has_taken(self, timesteps: Tensor, repeats: bool) -> bool:
        """Whether these are the timesteps as before, seen without waiting on a CPU alone; if not, notes them."""
        if self.step.device.type != "cpu" or timesteps.device.type != "cpu":
            self.taken = None
            return False
        before, self.taken = self.taken, (repeats, timesteps.clone())
        if before is None or before[0] != repeats:
            return False
        return before[1].dtype == timesteps.dtype and torch.equal(before[1], timesteps)

    def look_up(self, timestep: Any) -> None:
        """Set the step. Of timesteps per row the largest counts."""
        if not self.count:
            return
        if torch.compiler.is_compiling() or self.step.device.type != "cpu":
            self._find(torch.as_tensor(timestep))
            return
        given = torch.as_tensor(timestep).detach()
        # Not item(): nothing here waits for a device. And few calls: this is done at every step, on cold caches.
        values = (given.float() if given.dtype is torch.bfloat16 else given).cpu().numpy()
        number = float(values if values.ndim == 0 else values.max())
        step = self.known.get(number)
        if step is None:
            self._find(given)
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            self.known[number] = int(self.step.numpy())
        else:
            self.step.fill_(step)

    def _find(self, timestep: Tensor) -> None:
        """Set the step; tensor code alone."""
        given = timestep.to(self.step.device, torch.float32).detach().amax()
        # Relative, since numbers divided by 1000 and rounded to bf16 are off by that much.
        miss = (self.factors[0] * given + self.factors[1] - self.values).abs() / (self.values.abs() + 1e-6)
        # A model gets its timesteps in one way, but 1 may be the last one as well as 1000 / 1000: the way is settled at
        # the first call, in favour of the early step.
        least, place = miss.min(1)
        best = (least + 1e-6 * place).argmin(0, keepdim=True)
        self.choice.copy_(torch.where(self.choice < 0, best, self.choice))
        self.step.copy_(self.places[place[self.choice]].squeeze(0))


@dataclass
class Run:
    """One call of a pipeline."""

    images: int  # prompts times images per prompt; 0 when the call does not say
    cond_first: bool
    negative_only: bool  # the prompts came encoded, so the text encoders see nothing but negative prompts
    texts: dict[str, int] = field(default_factory=dict)  # runs of each text encoder
    step: Any = math.nan  # of the scheduler
    halves: int = 0  # runs of the denoiser over one half in this step

    def roles(self, rows: int, pipe: Any) -> tuple[int, int, bool]:
        """Which rows of a run of the denoiser are which: cond, uncond, whether the latter come first."""
        images = self.images or (rows // 2 if getattr(pipe, "do_classifier_free_guidance", False) else rows)
        perturbed = hasattr(type(pipe), _PERTURBED) and getattr(pipe, _PERTURBED)
        if rows not in (images, 2 * images) or perturbed:
            raise InputError(
                f"rows of the denoiser of {type(pipe).__name__}",
                value=f"{rows} for {images} images",
                allowed=f"{images}, or {2 * images} with guidance",
                fix="steer the denoiser alone, with a strength per row",
            )
        step = getattr(pipe.scheduler, "step_index", math.nan)  # counts steps on the host; some schedulers have none
        if rows != images or step != self.step or step != step:
            self.step, self.halves = step, 0
        self.halves += 1 if rows == images else 3
        if rows != images:
            return images, images, not self.cond_first
        return (0, images, False) if self.halves == 2 else (images, 0, False)

    def reads_prompts(self, part: str) -> bool:
        """Whether the run of a text encoder that begins is over the prompts, not over negative ones."""
        self.texts[part] = self.texts.get(part, 0) + 1
        return self.texts[part] == 1 and not self.negative_only


class Entrance:
    """Has `before(args, kwargs)` called ahead of every run of a module, outside its graph where it is compiled.

    Args:
        find: the module as it is called: it may be replaced by a compiled one later.
        before: what to do.
        inside: what is done in a compiled graph that is entered in another way.
    """

    def __init__(self, find: Callable[[], nn.Module], before: Callable[..., None], inside: Callable[..., None]) -> None:
        self.find, self.before, self.inside = find, before, inside
        self.told = False
        self.wrapped: list[tuple[nn.Module, str, Any, Any]] = []
        self.hook = inner_of(find()).register_forward_pre_hook(self._hook, with_kwargs=True)
        self.look()

    def look(self) -> None:
        """Find the compiled forms of the module that there are by now."""
        outer = self.find()
        inner = inner_of(outer)
        for holder, key in ((outer, "forward"), (inner, "_compiled_call_impl")):
            original = holder.__dict__.get(key)
            if original is None or (key == "forward" and holder is inner):
                continue
            if not any(holder is known and original is ours for known, _, _, ours in self.wrapped):
                ours = self._around(original)
                self.wrapped.append((holder, key, original, ours))
                holder.__dict__[key] = ours  # not setattr: a compiled wrapper passes that on to what it wraps

    def _around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            self.before(args, kwargs)
            self.told = True
            try:
                return original(*args, **kwargs)
            finally:
                self.told = False

        return run

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.told:
            (self.inside if torch.compiler.is_compiling() else self.before)(args, kwargs)

    def undo(self) -> None:
        self.hook.remove()
        for holder, key, original, ours in reversed(self.wrapped):
            if holder.__dict__.get(key) is ours:  # else somebody wrapped ours, which then only passes on
                holder.__dict__[key] = original
        self.before = self.inside = lambda args, kwargs: None


class Call:
    """The arguments of a module's `forward` by name."""

    def __init__(self, module: nn.Module) -> None:
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument, None where it was not given."""
        place = self.names.index(name)
        return args[place] if place < len(args) else kwargs.get(name)


def run_of(pipe: Any, arguments: dict[str, Any]) -> Run:
    """What the arguments of a call of a pipeline say about its rows."""
    prompts = next(
        (arguments[n] for n in ("prompt", "prompt_embeds", "class_labels") if arguments.get(n) is not None), 0
    )
    if isinstance(prompts, (str, int)):
        images = 1 if isinstance(prompts, str) else arguments.get("batch_size") or 0
    else:
        images = len(prompts)
    images *= arguments.get("num_images_per_prompt") or 1
    cond_first = type(pipe).__name__.startswith(_COND_FIRST)
    return Run(images, cond_first, negative_only=arguments.get("prompt") is None)


_Running = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]
_WATCHED: PerObject[_Running] = PerObject("running")


def watch_pipeline(pipe: Any, running: _Running) -> Callable[[], None]:
    """Have every call of a pipeline run in the context `running(pipe, arguments)`; returns what ends that.

    The class of the pipeline is swapped for a subclass of the same name, since Python looks up `__call__` in the class.
    """
    base = pipe.__class__
    _WATCHED.set(pipe, running)
    object.__setattr__(pipe, "__class__", _watched_class(base))

    def undo() -> None:
        _WATCHED.drop(pipe)
        if type(pipe) is _watched_class(base):
            object.__setattr__(pipe, "__class__", base)

    return undo


@functools.cache
def _watched_class(base: type) -> type:
    signature = inspect.signature(base.__call__)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = _WATCHED.find(self)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            running = None  # the call itself says it best
        if running is None:
            return base.__call__(self, *args, **kwargs)
        bound.apply_defaults()
        with running(self, bound.arguments):
            return base.__call__(self, *args, **kwargs)

    functools.update_wrapper(__call__, base.__call__)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), {**names, "__call__": __call__})
