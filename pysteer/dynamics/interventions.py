"""Reviving dead channels: operations on the scale of a norm, when they act, a log of what they did, and undo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pysteer.dynamics.classify import DeadChannels
from pysteer.errors import InputError

OPTIMIZER_STATES = ("keep", "momentum", "all")


@dataclass(frozen=True)
class When:
    """Steps at which something is due: every `every` steps from `start` on, up to and including `stop`."""

    every: int = 1
    start: int = 1
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError("every", value=self.every, allowed="a whole number from 1")

    def due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is one of them."""
        return step >= self.start and (self.stop is None or step <= self.stop) and step % self.every == 0


class Operation(Protocol):
    """What is done to the scale of dead channels."""

    def scales(self, scale: Tensor) -> Tensor:
        """The new scales of the chosen channels, [k] like `scale`."""


def _capped(old: Tensor, new: Tensor, cap: float) -> Tensor:
    """`new` with its size held to `cap`; a scale beyond the cap from the start stays as it is."""
    return torch.where(old.abs() >= cap, old, new.clamp(-cap, cap))


@dataclass(frozen=True)
class Scale:
    """gamma <- factor gamma, its size up to `cap`: the gentle nudge. A scale of 0 stays 0; use `Add` for it."""

    factor: float = 1.1
    cap: float = 2.0

    def __post_init__(self) -> None:
        _check_finite("Scale", factor=self.factor, cap=self.cap)

    def scales(self, scale: Tensor) -> Tensor:
        return _capped(scale, scale * self.factor, self.cap)


@dataclass(frozen=True)
class Add:
    """gamma <- gamma + value sign(gamma), its size up to `cap`; a scale of 0 grows too, to the positive side."""

    value: float = 0.01
    cap: float = 2.0

    def __post_init__(self) -> None:
        _check_finite("Add", value=self.value, cap=self.cap)

    def scales(self, scale: Tensor) -> Tensor:
        return _capped(scale, scale + torch.where(scale < 0, -self.value, self.value), self.cap)


@dataclass(frozen=True)
class Reset:
    """gamma <- `to`."""

    to: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("Reset", to=self.to)

    def scales(self, scale: Tensor) -> Tensor:
        return torch.full_like(scale, self.to)


@dataclass(frozen=True)
class Reinitialise:
    """Parameters of the channel as at the start: a norm gets scale 1 and shift 0; the filter of a convolution or a
    linear layer is drawn anew (uniform in +-1/sqrt(fan in), as torch draws it) from `seed` and the step, bias 0."""

    seed: int = 0

    def scales(self, scale: Tensor) -> Tensor:
        return torch.ones_like(scale)


def _check_finite(name: str, **values: float) -> None:
    for key, value in values.items():
        if not math.isfinite(value) or (key == "cap" and value <= 0):
            raise InputError(f"{key} of {name}", value=value, allowed="a finite number" + ", above 0" * (key == "cap"))


@dataclass
class Change:
    """What happened to some channels of one parameter, with all that undo needs.

    Attributes:
        step: when.
        parameter: its name.
        channels: int64 [k].
        before, after: the parameter there, [k, ...].
        state: state of the optimizer there before, by name.
    """

    step: int
    parameter: str
    channels: Tensor
    before: Tensor
    after: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)


class Nudger:
    """Applies an operation to the parameters of dead channels.

    Everything happens on the device of the parameter, one indexed write per layer. What is done depends on the merged
    windows alone, so every rank of a distributed run does the same.

    Args:
        model: the module that was watched.
        operation: `Scale`, `Add`, `Reset` or `Reinitialise`.
        when: the steps at which it acts.
        optimizer: its state of the channels that are touched is looked after too.
        state: "keep"; "momentum": first moments (`exp_avg`, `momentum_buffer`) of touched channels become 0, or what
            the optimizer had learnt would pull them back at once; "all": every state of the shape of the parameter.

    Attributes:
        log: every change that was made and not undone, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        operation: Operation,
        when: When | None = None,
        optimizer: Any = None,
        state: str = "momentum",
    ) -> None:
        if state not in OPTIMIZER_STATES:
            raise InputError("state of the optimizer", value=state, allowed=", ".join(OPTIMIZER_STATES))
        self.operation, self.when, self.state = operation, when or When(), state
        self.optimizer = optimizer
        self.log: list[Change] = []
        self._modules = dict(model.named_modules())
        self._parameters = dict(model.named_parameters())

    def step(self, step: int, dead: DeadChannels) -> int:
        """Act on the dead channels if it is time; returns how many channels were changed."""
        return self.apply(dead, step) if self.when.due(step) else 0

    @torch.no_grad()
    def apply(self, dead: DeadChannels, step: int = 0) -> int:
        """Act on the dead channels now; returns how many channels were changed.

        Raises:
            InputError: a dead channel of a module that the operation cannot act on.
        """
        done: set[str] = set()
        changed = 0
        for name, layer in dead.layers.items():
            path = name.rpartition(".")[0]
            if not len(layer.indices) or path in done:
                continue
            done.add(path)
            module = self._modules.get(path)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or (weight.dim() != 1 and not isinstance(self.operation, Reinitialise)):
                kind = type(module).__name__
                allowed = (
                    "norms with a scale" if not isinstance(self.operation, Reinitialise) else "modules with weights"
                )
                raise InputError(f"{type(self.operation).__name__} at {name}", value=kind, allowed=allowed)
            channels = layer.indices.to(weight.device, copy=True)
            self._write(step, f"{path}.weight", channels, self._new(weight, channels, step))
            bias = getattr(module, "bias", None)
            if isinstance(self.operation, Reinitialise) and isinstance(bias, Tensor):
                self._write(step, f"{path}.bias", channels, torch.zeros_like(bias[channels]))
            changed += len(layer.indices)
        return changed

    def _new(self, weight: Tensor, channels: Tensor, step: int) -> Tensor:
        old = weight[channels]
        if weight.dim() == 1:
            return self.operation.scales(old)
        assert isinstance(self.operation, Reinitialise)
        bound = 1 / math.sqrt(max(1, old[0].numel()))
        generator = torch.Generator().manual_seed((self.operation.seed * 1_000_003 + step) % (1 << 63))
        drawn = (2 * torch.rand(old.shape, generator=generator) - 1) * bound
        return drawn.to(old.device, old.dtype)

    def _write(self, step: int, name: str, channels: Tensor, new: Tensor) -> None:
        parameter = self._parameters[name]
        change = Change(step, name, channels.clone(), parameter[channels].clone(), new.clone())
        for key, held in self._states(parameter).items():
            change.state[key] = held[channels].clone()
            if self.state == "all" or (self.state == "momentum" and key in ("exp_avg", "momentum_buffer")):
                held[channels] = 0
        parameter[channels] = new
        self.log.append(change)

    def _states(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of the optimizer with one entry per weight."""
        held = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        return {k: v for k, v in held.items() if isinstance(v, Tensor) and v.shape == parameter.shape}

    @torch.no_grad()
    def undo(self, count: int = 1) -> list[Change]:
        """Take back the last changes, newest first: parameters and optimizer state there become what they were.

        What training did to those channels in between is lost; all others stay.
        """
        undone = []
        for _ in range(min(count, len(self.log))):
            change = self.log.pop()
            parameter = self._parameters[change.parameter]
            parameter[change.channels] = change.before
            held = self._states(parameter)
            for key, before in change.state.items():
                if key in held:
                    held[key][change.channels] = before
            undone.append(change)
        return undone

    def rows(self) -> list[dict[str, Any]]:
        """The changes of scales, one row per channel: step, parameter, channel, before, after."""
        return [
            {"step": c.step, "parameter": c.parameter, "channel": channel, "before": before, "after": after}
            for c in self.log
            if c.before.dim() == 1
            for channel, before, after in zip(c.channels.tolist(), c.before.tolist(), c.after.tolist(), strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The log as tensors; names are `number/step/parameter/what`."""
        state: dict[str, Tensor] = {}
        for number, change in enumerate(self.log):
            stem = f"{number}/{change.step}/{change.parameter}"
            parts = {"channels": change.channels, "before": change.before, "after": change.after}
            parts |= {f"state.{key}": value for key, value in change.state.items()}
            state |= {f"{stem}/{key}": value for key, value in parts.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the log that `state_dict` gave."""
        parts: dict[tuple[int, int, str], dict[str, Tensor]] = {}
        for key, value in state.items():
            number, at, name, what = key.split("/")
            parts.setdefault((int(number), int(at), name), {})[what] = value
        self.log = []
        for (_, step, name), held in sorted(parts.items()):
            if name not in self._parameters:
                raise InputError("state of a nudger, parameter", value=name, allowed="one of the model")
            device = self._parameters[name].device
            kept = {k.removeprefix("state."): v.to(device) for k, v in held.items() if k.startswith("state.")}
            channels, before, after = (held[key].to(device) for key in ("channels", "before", "after"))
            self.log.append(Change(step, name, channels, before, after, kept))
