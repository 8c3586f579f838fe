"""Pipelines of the diffusers library, and their denoisers and autoencoders on their own.

Parts of a pipeline: "visual" is the denoiser (UNet or transformer), "text", "text_2" and "text_3" are its text
encoders, "vae" is the autoencoder. Every module whose output is an activation is a site under its path in the denoiser
(`mid_block.resnets.0`, `transformer_blocks.3.attn`), behind `text.` in a text encoder and behind `vae.` in the
autoencoder, so regular expressions over module names work as they do elsewhere. Blocks that return two streams are
there as `path` (the image), `path:0` and `path:1`. The usual places also have short names, numbered from 0 in the order
of execution:

    attn.i, ca.i, ff.i   self-attention, cross-attention and feed-forward of transformer block i, before the residual
    block.i              output of transformer block i: the image tokens
    context.i            its text tokens, where image and text are two streams (Flux, SD3); so context_attn, context_ff
    resnet.i             output of residual block i of a UNet, a map
    down.i.j, mid.j, up.i.j   output of an attention of a UNet with all its transformer blocks, a map
    time                 the vector per row that holds the timestep
    text.block.i, text.attn.i, text.mlp.i, text.embed, text.norm   as in the family `transformers`
    text.output          what the pipeline reads of the encoder: of the last norm, or of the block before the last
    vae.decoder.resnet.i, vae.decoder.attn.i, the same for vae.encoder

A whole level of a UNet (`down_blocks.1`) is no site: its last output also leaves through the skip connection, which
steering the level would miss. The sites inside change both.

The visual clock is the denoising step: the place of the timestep that the denoiser is given among those of the
scheduler. It is looked up on the device at every call, so solvers that call twice a step keep it right, and image to
image begins where its first timestep stands. Steps are counted by distinct timesteps. A denoiser on its own stays at
step 0 until `set_timesteps` gives it some.

Which rows are conditional is learned from the call of the pipeline: with B prompts times images per prompt, a run of
the denoiser over 2 B rows is `[uncond rows | cond rows]`, a run over B rows is conditional, and a second run over B
rows in the same step is unconditional (true guidance in two calls). Without a call of the pipeline (a denoiser on its
own, a loop written by hand) all rows are conditional; there, a strength per row tells them apart. The first run of a
text encoder in a call of the pipeline is conditional, further ones are negative prompts. Padding is steered like all
tokens, since it is attended to, unless the pipeline gives its text encoder an attention mask.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError, PysteerError
from pysteer.families.base import Family, OnRows, register
from pysteer.families.diffusion_runs import (
    ROOM,
    Call,
    Clock,
    Entrance,
    Run,
    device_of,
    inner_of,
    run_of,
    watch_pipeline,
)
from pysteer.families.diffusion_sites import autoencoder_sites, denoiser_sites
from pysteer.families.per_object import PerObject
from pysteer.families.transformers import TransformersFamily, attended
from pysteer.steering.site import Site

_DENOISERS = ("unet", "transformer")
_TEXTS = {"text": "text_encoder", "text_2": "text_encoder_2", "text_3": "text_encoder_3"}
_CODERS = ("quant_conv", "post_quant_conv", "encoder", "decoder")  # an autoencoder is called through these alone
_TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio")


def pipeline_of(obj: Any) -> Any:
    """The pipeline in `obj`: itself, or that of a `pysteer.models.diffusion.ImageGenerator`; None for anything else."""
    inner = obj if not hasattr(obj, "token_ids") else getattr(obj, "pipe", None)
    return inner if _is_pipeline(type(inner)) else None  # type: ignore[arg-type]  # of None and Any, says mypy


@functools.cache
def _is_pipeline(kind: type[object]) -> bool:
    return any(base.__name__ == "DiffusionPipeline" for base in kind.__mro__)


def set_timesteps(model: nn.Module, timesteps: Tensor | Iterable[float]) -> None:
    """Tell the clock of a denoiser that runs without its pipeline which timesteps it will be given, in order.

    Args:
        model: the denoiser.
        timesteps: `[S]`, for example `scheduler.timesteps`; equal neighbours are one step. The denoiser may be given
            them as they are or divided by 1000.

    Raises:
        InputError: no timesteps, or a pipeline, whose scheduler says.
    """
    model = inner_of(model)
    if pipeline_of(model) is not None:
        raise InputError("set_timesteps of a pipeline", fix="call pipe.scheduler.set_timesteps(n), or just run it")
    values = torch.as_tensor(timesteps)
    if values.dim() != 1 or not len(values):
        raise InputError("timesteps", value=list(values.shape), allowed="a list [S] of at least one")
    clock = FAMILY.hub(model).clock
    if clock is None:
        raise InputError("set_timesteps", value=type(model).__name__, allowed="a denoiser")
    clock.take(values, repeats=True, device=device_of(model))


class _Hub:
    """Clocks, listeners and the run in progress of one pipeline or module."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.clocks = {
            part: torch.zeros((), dtype=torch.int64, device=device_of(module)) for part, module in parts.items()
        }
        self.clock = Clock(parts["visual"]) if "visual" in parts else None
        self.listeners: list[OnRows] = []
        self.entrances: list[Entrance] = []
        self.undo: list[Callable[[], None]] = []
        self.run: Run | None = None

    def tell(self, part: str, cond: int, uncond: int, lengths: Tensor | None, uncond_first: bool = False) -> None:
        for listener in list(self.listeners):
            listener(part, cond, uncond, lengths, uncond_first)

    def heard(self, part: str) -> bool:
        """Whether anybody wants to know about the rows of a part."""
        return any(part in getattr(listener, "parts", (part,)) for listener in self.listeners)

    def enter(self, part: str, device: torch.device) -> None:
        """Have the clock of a part without steps where its input is."""
        if self.clocks[part].device != device:
            with torch.inference_mode(False):
                self.clocks[part] = self.clocks[part].to(device)

    def watch(self, pipe: Any, parts: Mapping[str, nn.Module]) -> None:
        """Be told of every run of every part, and of every call of the pipeline."""
        if pipe is not None:
            self.undo.append(watch_pipeline(pipe, self._running))
        for part, module in parts.items():
            if part == "visual":
                self._watch_denoiser(pipe, module)
            elif part == "vae":
                for name in _CODERS:
                    if isinstance(getattr(inner_of(module), name, None), nn.Module):
                        self._watch_coder(inner_of(module), name)
            else:
                self._watch_text(pipe, part, module)

    def leave(self) -> None:
        """Undo `watch`."""
        for undo in reversed(self.undo):
            undo()
        self.undo, self.entrances, self.run = [], [], None

    def _enter_by(self, entrance: Entrance) -> None:
        self.entrances.append(entrance)
        self.undo.append(entrance.undo)

    @contextmanager
    def _running(self, pipe: Any, arguments: dict[str, Any]) -> Iterator[None]:
        before, self.run = self.run, run_of(pipe, arguments)
        for entrance in self.entrances:
            entrance.look()
        try:
            yield
        finally:
            self.run = before

    def _watch_denoiser(self, pipe: Any, module: nn.Module) -> None:
        clock, call = self.clock, Call(inner_of(module))
        assert clock is not None
        time = next((name for name in call.names if name in _TIMESTEPS), "")
        name = next((name for name in _DENOISERS if pipe is not None and _has(pipe, name)), "")

        def inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timestep = call.get(time, args, kwargs) if time else None
            if timestep is not None:
                clock.look_up(timestep)

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sample = call.get(call.names[0], args, kwargs)
            device = (sample if isinstance(sample, Tensor) else sample[0]).device
            if pipe is None:
                clock.take(None, repeats=False, device=device)
            else:
                _take_schedule(clock, pipe, device)
            inside(args, kwargs)
            roles = (len(sample), 0, False) if self.run is None else self.run.roles(len(sample), pipe)
            self.tell("visual", roles[0], roles[1], None, roles[2])

        self._enter_by(Entrance(lambda: getattr(pipe, name) if name else module, before, inside))

    def _watch_text(self, pipe: Any, part: str, module: nn.Module) -> None:
        call = Call(inner_of(module))

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cond = self.run is None or self.run.reads_prompts(part)
            if not self.heard(part):
                return
            given = call.get(call.names[0], args, kwargs)
            if given is None:
                given = kwargs["inputs_embeds"]
            mask = call.get("attention_mask", args, kwargs) if "attention_mask" in call.names else None
            rows, tokens = given.shape[:2]
            self.enter(part, given.device)
            self.tell(part, rows if cond else 0, 0 if cond else rows, attended(mask, rows, tokens, given.device))

        self._enter_by(Entrance(lambda: getattr(pipe, _TEXTS[part]), before, _refuse(part)))

    def _watch_coder(self, vae: nn.Module, name: str) -> None:
        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.enter("vae", args[0].device)
            self.tell("vae", len(args[0]), 0, None)

        self._enter_by(Entrance(lambda: getattr(vae, name), before, _refuse("vae")))


def _refuse(part: str) -> Callable[..., None]:
    """A text encoder or autoencoder in a graph that something around it was compiled into cannot tell its rows."""

    def inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise PysteerError(
            f"part {part} is inside a compiled graph and cannot tell its rows; fix: compile the text encoder, or the "
            "encoder and decoder of the autoencoder, as modules"
        )

    return inside


class DiffusersFamily(Family):
    """Takes a `DiffusionPipeline`, an `ImageGenerator` around one, a denoiser or an autoencoder (compiled or not)."""

    name = "diffusers"

    def __init__(self) -> None:
        self._hubs: PerObject[_Hub] = PerObject("diffusers_hub")

    def matches(self, obj: Any) -> bool:
        return pipeline_of(obj) is not None or _is_model(inner_of(obj))

    def parts(self, obj: Any) -> dict[str, nn.Module]:
        """The parts that `obj` has, as they are called: possibly compiled."""
        pipe = pipeline_of(obj)
        if pipe is None:
            return {"vae" if _is_autoencoder(inner_of(obj)) else "visual": obj}
        named = {"visual": next((name for name in _DENOISERS if _has(pipe, name)), ""), **_TEXTS, "vae": "vae"}
        return {part: getattr(pipe, name) for part, name in named.items() if name and _has(pipe, name)}

    def root(self, obj: Any, part: str) -> nn.Module:
        parts = self.parts(obj)
        if part not in parts:
            raise InputError(f"part of {type(obj).__name__}", value=part, allowed=", ".join(parts))
        root: nn.Module = inner_of(parts[part])
        return root

    def sites(self, obj: Any) -> dict[str, Site]:
        found: dict[str, Site] = {}
        for part, module in self.parts(obj).items():
            if part == "visual":
                found |= denoiser_sites(inner_of(module))
            elif part == "vae":
                found |= autoencoder_sites(inner_of(module))
            else:
                found |= _text_sites(part, inner_of(module), self._reads_early(obj))
        return found

    def steps(self, obj: Any, part: str) -> int:
        if part != "visual":
            return 1
        clock, pipe = self.hub(obj).clock, pipeline_of(obj)
        assert clock is not None
        if pipe is not None:
            _take_schedule(clock, pipe, clock.step.device)
        return clock.count or (ROOM if pipe is not None else 1)

    def room(self, obj: Any, part: str) -> int:
        steps = self.steps(obj, part)
        return max(ROOM, 1 << steps.bit_length()) if part == "visual" and pipeline_of(obj) is not None else steps

    def lasting(self, obj: Any, part: str) -> bool:
        clock = self.hub(obj).clock
        return part != "visual" or (pipeline_of(obj) is None and clock is not None and not clock.count)

    def once(self, obj: Any, site: Site) -> bool:
        return site.part != "visual"

    def clock(self, obj: Any, part: str) -> Tensor:
        hub = self.hub(obj)
        return hub.clock.step if part == "visual" and hub.clock is not None else hub.clocks[part]

    def connect(self, obj: Any, on_rows: OnRows) -> Callable[[], None]:
        hub = self.hub(obj)
        if not hub.listeners:
            try:
                hub.watch(pipeline_of(obj), self.parts(obj))
            except BaseException:
                hub.leave()
                raise
        hub.listeners.append(on_rows)

        def disconnect() -> None:
            if on_rows in hub.listeners:
                hub.listeners.remove(on_rows)
                if not hub.listeners:
                    hub.leave()

        return disconnect

    def hub(self, obj: Any) -> _Hub:
        """Clocks and listeners of a model or a pipeline."""
        key = pipeline_of(obj) or inner_of(obj)
        return self._hubs.get(key, lambda: _Hub(self.parts(obj)))

    def _reads_early(self, obj: Any) -> bool:
        """Whether the pipeline reads CLIP before its last block, as those with two CLIP encoders do (SDXL, SD3)."""
        encoders = [module for part, module in self.parts(obj).items() if part in _TEXTS]
        return sum(_is_clip(inner_of(encoder)) for encoder in encoders) > 1


def _has(pipe: Any, name: str) -> bool:
    return isinstance(getattr(pipe, name, None), nn.Module)


def _is_autoencoder(model: Any) -> bool:
    return type(model).__name__.startswith(("Autoencoder", "AsymmetricAutoencoder")) and _has(model, "decoder")


def _is_model(model: Any) -> bool:
    if not isinstance(model, nn.Module) or not any(base.__name__ == "ModelMixin" for base in type(model).__mro__):
        return False
    return _is_autoencoder(model) or any(name in _TIMESTEPS for name in Call(model).names)


def _is_clip(encoder: Any) -> bool:
    return str(getattr(encoder.config, "model_type", "")).startswith("clip_text")


def _take_schedule(clock: Clock, pipe: Any, device: torch.device) -> None:
    scheduler = pipe.scheduler
    known = getattr(scheduler, "num_inference_steps", None) is not None  # before the first run it lists all timesteps
    repeats = getattr(scheduler, "order", 1) > 1
    # A run that goes on has fewer left. Not getattr: what schedulers lack they look for in their configuration.
    timesteps = vars(scheduler).get("all_timesteps", scheduler.timesteps)
    clock.take(timesteps if known else None, repeats=repeats, device=device)


def _text_sites(part: str, encoder: Any, reads_early: bool) -> dict[str, Site]:
    """The sites of a text encoder, their names behind that of the part."""
    known = {k: s for k, s in TransformersFamily().sites(encoder).items() if not k.startswith("text.")}
    blocks = [name for name in known if name.startswith("block.")]
    output = blocks[-2] if reads_early and _is_clip(encoder) and len(blocks) > 1 else "norm"
    if output in known:
        known["output"] = known[output]
    return {f"{part}.{k}": Site(f"{part}.{k}", s.path, part, s.element, s.layout, s.width) for k, s in known.items()}


FAMILY = DiffusersFamily()
register(FAMILY)
