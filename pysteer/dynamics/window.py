"""What a monitor saw in one window: eight statistics of every channel, under their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.channel_moments import ChannelMoments
from pysteer.steering.site import brief, did_you_mean

STATS: dict[str, Callable[[ChannelMoments], Tensor]] = {
    "count": lambda m: m.count,
    "mean": lambda m: m.mean,
    "std": lambda m: m.std(0),
    "minimum": lambda m: m.minimum,
    "maximum": lambda m: m.maximum,
    "mean_abs": lambda m: m.mean_abs,
    "near_zero_fraction": lambda m: m.near_zero_fraction(),
    "zero_fraction": lambda m: m.zero_fraction(),
}
# Names that others gave to the same thing.
ALIASES = {
    "mean_abs_activation_per_channel": "mean_abs",
    "mean_activation": "mean",
    "std_activation": "std",
    "min": "minimum",
    "max": "maximum",
}
PHASES = ("train", "validation")


def stat_name(name: str) -> str:
    """The name of a statistic in `STATS`, aliases resolved.

    Raises:
        InputError: there is no such statistic.
    """
    name = ALIASES.get(name, name)
    if name not in STATS:
        fix = did_you_mean(name, [*STATS, *ALIASES])
        raise InputError("unknown statistic", value=name, allowed=", ".join(STATS), fix=fix)
    return name


@dataclass(frozen=True)
class Window:
    """The activations of all forward passes between two steps, as moments of every channel.

    Attributes:
        step: the step that closed it.
        phase: "train" or "validation".
        names: of the points, in order.
        widths: channels of each point.
        moments: [8, D] fp64 on the CPU, D = sum of the widths; rows as in `ChannelMoments`.
        maps: for the points whose maps are kept, activations [n, C, ...] of the first forward pass.
    """

    step: int
    phase: str
    names: Sequence[str]
    widths: Sequence[int]
    moments: Tensor
    maps: dict[str, Tensor]

    def _slice(self, name: str) -> slice:
        if name not in self.names:
            raise InputError("point", value=name, allowed=brief(self.names), fix=did_you_mean(name, self.names))
        index = list(self.names).index(name)
        start = sum(self.widths[:index])
        return slice(start, start + self.widths[index])

    def of(self, name: str) -> ChannelMoments:
        """The moments of one point, `[C]` each."""
        return ChannelMoments.of(self.moments[:, self._slice(name)])

    def stat(self, stat: str) -> dict[str, Tensor]:
        """A statistic of every point, `[C]` fp64 each; see `STATS`. `std` divides by n. NaN for channels never seen."""
        values = STATS[stat_name(stat)](ChannelMoments.of(self.moments))
        return dict(zip(self.names, values.split(list(self.widths)), strict=True))

    def table(self, metrics: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        """Rows in the columns of the activity table: how a per-channel metric is distributed over the channels.

        Args:
            metrics: names of metrics by point.

        Returns:
            Rows `global_step, layer_identifier, original_metric_name, metric_type, metric_value`. `mean_activation` and
            `std_activation` are single values of the whole tensor, `full_activation_map` describes the map kept.
        """
        rows: list[dict[str, Any]] = []
        for name, wanted in metrics.items():
            if name not in self.names:
                continue
            moments = self.of(name)
            for metric in wanted:
                for kind, value in self._described(name, metric, moments):
                    rows.append(
                        {
                            "global_step": self.step,
                            "layer_identifier": name,
                            "original_metric_name": metric,
                            "metric_type": kind,
                            "metric_value": value,
                        }
                    )
        return rows

    def _described(self, name: str, metric: str, moments: ChannelMoments) -> list[tuple[str, Any]]:
        if metric == "full_activation_map":
            if name not in self.maps:
                return []
            full = self.maps[name].double()
            return [
                ("full_map_shape", "x".join(str(side) for side in full.shape)),
                *((f"full_map_{kind}", value) for kind, value in _spread(full.flatten())),
            ]
        if metric in ("mean_activation", "std_activation"):
            return [("scalar", _whole(moments)[metric == "std_activation"])]
        values = STATS[stat_name(metric)](moments)
        return [(f"per_channel_overall_{kind}", value) for kind, value in _spread(values)]


def _spread(values: Tensor) -> list[tuple[str, float]]:
    values = values.double()
    std = values.std(correction=0)
    found = {"mean": values.mean(), "std": std, "min": values.min(), "max": values.max()}
    return [(kind, float(value)) for kind, value in found.items()]


def _whole(moments: ChannelMoments) -> tuple[float, float]:
    """Mean and standard deviation (over n - 1) of all values of a tensor."""
    total = moments.count.sum()
    mean = (moments.mean * moments.count).sum() / total
    m2 = moments.m2.sum() + (moments.count * (moments.mean - mean).square()).sum()
    return float(mean), float(torch.sqrt(m2 / (total - 1)))
