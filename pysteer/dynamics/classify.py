"""Which channels are dead, since when, and by what measure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.dynamics.window import Window
from pysteer.errors import InputError
from pysteer.steering.site import brief, did_you_mean

REFERENCE = "threshold_groupnorm_activity"
# method -> (statistic or None for the scale |gamma|, default threshold, whether dead is above it)
_METHODS: dict[str, tuple[str | None, float, bool]] = {
    "mean_abs": ("mean_abs", 1e-3, False),
    "std": ("std", 1e-3, False),
    "gamma": (None, 1e-3, False),
    "near_zero_fraction": ("near_zero_fraction", 0.99, True),
    "zero_fraction": ("zero_fraction", 0.99, True),
    REFERENCE: ("mean_abs", 1e-3, False),
}
METHODS = tuple(_METHODS)


@dataclass(frozen=True)
class Quantile:
    """A threshold of every layer: `factor` times the `q` quantile of the measure over the channels of the layer."""

    q: float = 0.5
    factor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.q <= 1 or not self.factor >= 0:
            allowed = "q from 0 to 1, factor 0 or more"
            raise InputError("quantile threshold", value=f"q {self.q}, factor {self.factor}", allowed=allowed)


Threshold = float | Quantile | Mapping[str, "float | Quantile"] | None


@dataclass(frozen=True)
class DeadLayer:
    """The dead channels of one point.

    Attributes:
        indices: which channels, int64 [k] in rising order.
        values: their measure, [k].
        since: the step of the first window in which each was dead without a break since, int64 [k].
        threshold: what the measure was held against.
        metric: the measure.
        width: channels of the layer.
    """

    indices: Tensor
    values: Tensor
    since: Tensor
    threshold: float
    metric: str
    width: int

    @property
    def mask(self) -> Tensor:
        """bool [width], True for dead channels."""
        return torch.zeros(self.width, dtype=torch.bool).index_fill_(0, self.indices, True)


@dataclass(frozen=True)
class DeadChannels:
    """The dead channels of all points at one step; layers without any are there too, with none."""

    step: int
    layers: dict[str, DeadLayer]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], step: int, widths: Mapping[str, int]) -> DeadChannels:
        """What `rows` described; layers without dead channels are left out.

        Args:
            rows: from `rows`.
            step: of the window.
            widths: channels of every point.
        """
        layers = {}
        for name in dict.fromkeys(row["layer"] for row in rows):
            own = [row for row in rows if row["layer"] == name]
            indices, since = (torch.tensor([row[key] for row in own]) for key in ("channel", "since"))
            values = torch.tensor([row["value"] for row in own], dtype=torch.float64)
            layers[name] = DeadLayer(indices, values, since, own[0]["threshold"], own[0]["metric"], widths[name])
        return cls(step, layers)

    @property
    def count(self) -> int:
        """How many channels are dead."""
        return sum(len(layer.indices) for layer in self.layers.values())

    @property
    def total(self) -> int:
        """How many channels were looked at."""
        return sum(layer.width for layer in self.layers.values())

    def names(self) -> list[str]:
        """Dead channels as `point[channel]`."""
        return [f"{name}[{c}]" for name, layer in self.layers.items() for c in layer.indices.tolist()]

    def rows(self) -> list[dict[str, Any]]:
        """One row per dead channel: step, layer, channel, metric, value, threshold, since."""
        return [
            {
                "step": self.step,
                "layer": name,
                "channel": channel,
                "metric": layer.metric,
                "value": value,
                "threshold": layer.threshold,
                "since": since,
            }
            for name, layer in self.layers.items()
            for channel, value, since in zip(
                layer.indices.tolist(), layer.values.tolist(), layer.since.tolist(), strict=True
            )
        ]

    def scales(self) -> dict[str, dict[str, Any]]:
        """By point: param_name_scale, inactive_channel_indices, metric_used, threshold_value and the values."""
        return {
            name: {
                "param_name_scale": f"{name.rpartition('.')[0]}.weight",
                "inactive_channel_indices": layer.indices.tolist(),
                "metric_used": layer.metric,
                "threshold_value": layer.threshold,
                "values_of_inactive_channels": layer.values.tolist(),
            }
            for name, layer in self.layers.items()
            if len(layer.indices)
        }

    def __or__(self, other: DeadChannels) -> DeadChannels:
        """Channels that either of the two calls dead."""
        merged = dict(self.layers)
        for name, theirs in other.layers.items():
            mine = merged.get(name)
            if mine is None or not len(mine.indices):
                merged[name] = theirs
                continue
            new = ~torch.isin(theirs.indices, mine.indices)
            indices = torch.cat([mine.indices, theirs.indices[new]])
            order = indices.argsort()
            merged[name] = DeadLayer(
                indices[order],
                torch.cat([mine.values, theirs.values[new]])[order],
                torch.cat([mine.since, theirs.since[new]])[order],
                mine.threshold,
                f"{mine.metric} or {theirs.metric}" if mine.metric != theirs.metric else mine.metric,
                mine.width,
            )
        return DeadChannels(max(self.step, other.step), merged)


class Classifier:
    """Calls channels dead by one measure, window after window.

    Args:
        method: "mean_abs", "std" (of the activation), "gamma" (|scale| of a norm), "near_zero_fraction",
            "zero_fraction", or "threshold_groupnorm_activity": mean |x| at the outputs of group norms. A norm with
            scale 0 and a shift still has a mean |x|; "std" and "gamma" see that it is dead.
        threshold: dead is a measure below it (fractions: at or above). One number, a `Quantile` of each layer, or
            either by layer: keys are point names, module paths or regular expressions, the first that fits counts.
            None takes the default of the method.
        layers: points or paths that are looked at; None takes all that fit the method.
        persistence: in how many windows in a row a channel must have been below before it is called dead.
        model: where the scales are; needed for "gamma" and for "threshold_groupnorm_activity".
    """

    def __init__(
        self,
        method: str = "std",
        threshold: Threshold = None,
        *,
        layers: Sequence[str] | None = None,
        persistence: int = 1,
        model: nn.Module | None = None,
    ) -> None:
        if method not in _METHODS:
            fix = did_you_mean(method, METHODS)
            raise InputError("method of classification", value=method, allowed=", ".join(METHODS), fix=fix)
        if persistence < 1:
            raise InputError("persistence", value=persistence, allowed="a whole number from 1")
        if model is None and method in ("gamma", REFERENCE):
            raise InputError(f"classification by {method} without a model", fix="give model=")
        self.method, self.persistence, self.model = method, persistence, model
        self.threshold = _METHODS[method][1] if threshold is None else threshold
        self.layers = None if layers is None else [name.removeprefix("vae.") for name in layers]
        self._modules = {} if model is None else dict(model.named_modules())
        self._below: dict[str, Tensor] = {}  # windows in a row
        self._since: dict[str, Tensor] = {}

    def classify(self, window: Window) -> DeadChannels:
        """Look at a window; call it for every window in turn, since it keeps count.

        Raises:
            InputError: a layer that was asked for is not in the window.
        """
        found = {}
        for name, width in zip(self._chosen(window.names), self._widths(window), strict=True):
            values = self._measure(window, name)
            threshold = self._threshold_of(name, values)
            below = values >= threshold if _METHODS[self.method][2] else values < threshold
            runs = self._below.get(name, torch.zeros(width, dtype=torch.int64))
            since = self._since.get(name, torch.full((width,), -1))
            since = torch.where(below, torch.where(runs == 0, window.step, since), -1)
            runs = torch.where(below, runs + 1, 0)
            self._below[name], self._since[name] = runs, since
            dead = (runs >= self.persistence).nonzero().flatten()
            metric = _METHODS[self.method][0] or "gamma"
            found[name] = DeadLayer(dead, values[dead], since[dead], threshold, metric, width)
        return DeadChannels(window.step, found)

    def _chosen(self, names: Sequence[str]) -> list[str]:
        if self.layers is None:
            return [name for name in names if self._fits(name)]
        chosen = []
        for asked in self.layers:
            matches = [name for name in names if asked in (name, name.rpartition(".")[0])]
            if not matches:
                fix = did_you_mean(asked, names) or "watch this layer too"
                raise InputError("layer to classify is not watched", value=asked, allowed=brief(names), fix=fix)
            chosen += [name for name in matches if name not in chosen]
        return chosen

    def _widths(self, window: Window) -> list[int]:
        widths = dict(zip(window.names, window.widths, strict=True))
        return [widths[name] for name in self._chosen(window.names)]

    def _fits(self, name: str) -> bool:
        path, _, capture = name.rpartition(".")
        module = self._modules.get(path)
        if self.method == REFERENCE:
            return isinstance(module, nn.GroupNorm) and capture == "output"
        return self.method != "gamma" or (capture == "output" and _scale(module) is not None)

    def _measure(self, window: Window, name: str) -> Tensor:
        stat = _METHODS[self.method][0]
        if stat is not None:
            return window.stat(stat)[name]
        scale = _scale(self._modules.get(name.rpartition(".")[0]))
        if scale is None:
            raise InputError("classification by gamma of a layer without a scale", value=name, fix="choose norms")
        return scale.detach().abs().double().cpu()

    def _threshold_of(self, name: str, values: Tensor) -> float:
        rule = self.threshold
        if isinstance(rule, Mapping):
            path = name.rpartition(".")[0]
            fitting = [own for key, own in rule.items() if key in (name, path) or re.fullmatch(key, path)]
            if not fitting:
                raise InputError("layer without a threshold", value=name, allowed=", ".join(rule), fix="add '.*'")
            rule = fitting[0]
        return rule.factor * float(values.nanquantile(rule.q)) if isinstance(rule, Quantile) else float(rule)

    def state_dict(self) -> dict[str, Tensor]:
        """How long every channel has been below."""
        named = (("below", self._below), ("since", self._since))
        return {f"{name}/{kind}": values for kind, held in named for name, values in held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for key, values in state.items():
            name, _, kind = key.rpartition("/")
            (self._below if kind == "below" else self._since)[name] = values.clone()


def _scale(module: nn.Module | None) -> Tensor | None:
    """The scale per channel of a norm."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 1 else None
