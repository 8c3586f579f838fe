"""Chosen channels: nudged by a constant, scaled, or set to a value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_choice, register, tokens_of

MODES = ("add", "scale", "set")
UNITS = ("one", "sigma")


@register
@dataclass(frozen=True)
class ChannelSteering(Method):
    """`y_c = x_c + s v` (add), `x_c + s (v - 1) x_c` (scale) or `x_c + s (v - x_c)` (set) in a few channels c.

    Without data: `pysteer.steering.channels(site, width, ...)`. A fit looks at the source alone, for its width and,
    with the unit "sigma", for the spread of the channels.

    Args:
        channels: which.
        values: v, one for all channels or one for each.
        mode: "add", "scale" or "set".
        unit: of "add": "one", or "sigma" for standard deviations of the channel in the source.
        pooled: take the spread from the means over the tokens of each row.
    """

    name: ClassVar[str] = "channel_steering"

    channels: tuple[int, ...] = (0,)
    values: tuple[float, ...] = (1.0,)
    mode: str = "add"
    unit: str = "one"
    pooled: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "values"):
            given = getattr(self, name)
            object.__setattr__(self, name, tuple(given) if isinstance(given, Sequence) else (given,))
        check_choice("mode of channel_steering", self.mode, MODES)
        check_choice("unit of channel_steering", self.unit, UNITS)
        if not self.channels or len(set(self.channels)) != len(self.channels) or min(self.channels) < 0:
            raise InputError("channels to steer", value=list(self.channels), allowed="at least one, each once, from 0")
        if len(self.values) not in (1, len(self.channels)):
            allowed = f"1 or {len(self.channels)}, one per channel"
            raise InputError("values of channel_steering", value=len(self.values), allowed=allowed)
        if not all(abs(value) < float("inf") for value in self.values):
            raise InputError("values of channel_steering", value=list(self.values), allowed="finite numbers")
        if self.unit == "sigma" and self.mode != "add":
            raise InputError("unit of channel_steering", value="sigma", allowed=f"one, with mode {self.mode}")

    @property
    def op(self) -> str:
        return "affine_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return {"gain": ("D",), "bias": ("D",)}

    def given(self, width: int, spread: Tensor | None = None) -> SiteFit:
        """Parameters for activations of `width` channels; `spread` `[width]` multiplies the values."""
        if max(self.channels) >= width:
            raise InputError("channel to steer", value=max(self.channels), allowed=f"0 to {width - 1}")
        chosen = torch.tensor(self.channels)
        values = torch.tensor(self.values, dtype=torch.float32).expand(len(chosen)).clone()
        if spread is not None:
            values = values * spread.cpu().float()[chosen]
        gain, bias = torch.ones(width), torch.zeros(width)
        if self.mode == "scale":
            gain[chosen] = values
        else:
            bias[chosen] = values
            gain[chosen] = 0.0 if self.mode == "set" else 1.0
        return SiteFit({"gain": gain, "bias": bias}, {})

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; only the source is looked at."""
        x = tokens_of(source, "source", pooled=self.pooled).double()
        if self.unit != "sigma":
            return self.given(x.shape[1])
        if len(x) < 2:
            raise InputError("samples of channel_steering in units of sigma", value=len(x), allowed="at least 2")
        return self.given(x.shape[1], x.std(0))
