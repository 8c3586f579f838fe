"""How many weights of every parameter are next to nothing: absolute, relative to their mean, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.dynamics.points import is_kind
from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.layouts import DTYPE_CODES

MODES = ("threshold", "percent_of_mean", "both")
_NO_MEAN = 1e-9  # a mean |w| below this says nothing; the relative test is then |w| < 1e-9


@dataclass(frozen=True)
class Health:
    """Weights of one step.

    Attributes:
        step: when.
        names: of the parameters.
        mean_abs: mean |w| of each, [P] fp64.
        percent: by mode, the percentage of weights that count as dead, [P] fp64.
    """

    step: int
    names: Sequence[str]
    mean_abs: Tensor
    percent: dict[str, Tensor] = field(default_factory=dict)


class WeightHealth:
    """Percentage of dead weights of every convolution, linear layer and norm.

    `threshold`: |w| < t. `percent_of_mean`: |w| < p mean|w|. `both`: both of them; where the mean is below 1e-9, the
    relative test is |w| < 1e-9 (so a parameter of zeros is 100 % dead).

    On a CPU a parameter is read twice by the compiled `channel_moments`, the second time from the cache, without a
    temporary tensor; all three modes come out of it. On a GPU nothing waits for the device before the end.

    Args:
        model: any module.
        threshold: t.
        percent: p, a fraction.
        mode: the mode whose history is kept.
        parameters: names of the parameters; None takes those of all convolutions, linear layers and norms.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float = 1e-8,
        percent: float = 0.01,
        mode: str = "threshold",
        parameters: Sequence[str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError("mode of weight health", value=mode, allowed=", ".join(MODES))
        if not threshold >= 0 or not percent >= 0:
            raise InputError("threshold, percent", value=f"{threshold}, {percent}", allowed="0 or more")
        known = dict(model.named_parameters())
        chosen = _weights(model) if parameters is None else [name.removeprefix("vae.") for name in parameters]
        for name in chosen:
            if name not in known:
                raise InputError("parameter", value=name, allowed=", ".join(list(known)[:8]) + ", ...")
        self.threshold, self.percent, self.mode = float(threshold), float(percent), mode
        self.parameters = {name: known[name] for name in chosen}
        self.history: list[Health] = []
        self._buffer = torch.zeros(len(chosen), 8, 2, dtype=torch.float64)
        self._plans: list[tuple[Any, Any]] = [(None, None)] * len(chosen)

    def measure(self, step: int = 0) -> Health:
        """Look at all parameters as they are now; the result is added to the history."""
        means, near = self._moments([self.threshold] * len(self.parameters))
        relative = torch.where(means < _NO_MEAN, _NO_MEAN, self.percent * means)
        _, below = self._moments(relative.tolist())
        both = torch.minimum(near, below)  # counts grow with the limit: this is the count below the smaller one
        # A mean of nothing with a few weights above the limit is what the relative test calls alive.
        below = torch.where((means < _NO_MEAN) & (below < 1), 0.0, below)
        percent = {"threshold": 100 * near, "percent_of_mean": 100 * below, "both": 100 * both}
        health = Health(step, list(self.parameters), means, percent)
        self.history.append(health)
        return health

    def rows(self) -> list[dict[str, Any]]:
        """The history as rows `layer, step, percentage` of the chosen mode."""
        return [
            {"layer": name, "step": health.step, "percentage": value}
            for health in self.history
            for name, value in zip(health.names, health.percent[self.mode].tolist(), strict=True)
        ]

    def _moments(self, limits: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Mean |w| and the share of |w| < limit of every parameter, [P] fp64."""
        serves = backends.choices("cpu")[:1] == ("cpu",)
        kernel = backends.extension().channel_moments if serves else None
        start, threads = self._buffer.data_ptr(), torch.get_num_threads()
        slow: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (weight, limit) in enumerate(zip(self.parameters.values(), limits, strict=True)):
            key, sizes = self._plans[index]
            if key != (weight.shape, weight.stride(), weight.dtype, weight.device.type):
                key, sizes = _plan(weight)
                self._plans[index] = (key, sizes)
            if kernel is not None and sizes is not None:
                kernel(weight.data_ptr(), start + index * 128, *sizes[0], limit, 0, sizes[1], threads)
            else:
                size = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
                slow[index] = size.double().mean(), (size < limit).double().mean()
        means, shares = self._buffer[:, 5].mean(1), self._buffer[:, 6].sum(1) / self._buffer[:, 0].sum(1)
        if slow:  # one transfer
            found = torch.stack([torch.stack(pair) for pair in slow.values()]).cpu()
            means[list(slow)], shares[list(slow)] = found[:, 0], found[:, 1]
        return means, shares


def _weights(model: nn.Module) -> list[str]:
    """Weights and biases of convolutions, linear layers and norms."""
    found = []
    for path, module in model.named_modules():
        if is_kind(module, "all"):
            found += [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
    return found


def _plan(weight: Tensor) -> tuple[Any, Any]:
    """What identifies the layout of a weight, and how the kernel walks it as two channels; None where it cannot."""
    key = (weight.shape, weight.stride(), weight.dtype, weight.device.type)
    count = weight.numel()
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    if not weight.is_cpu or not dense or count < 2 or count % 2 or weight.dtype not in DTYPE_CODES:
        return key, None
    half = count // 2
    return key, ((1, half, 2, count, 1, half), DTYPE_CODES[weight.dtype])
