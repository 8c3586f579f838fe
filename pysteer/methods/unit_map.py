"""What methods share that move every unit by a map of its own: `y = x + s ((gain - 1) x + bias)`."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_pair, tokens_of
from pysteer.ops.channel_moments import ChannelMoments

ALL = "all"


class UnitMap(Method):
    """A method that fits a gain and a bias per unit (op `affine_shift`), with or without a support.

    Attributes:
        support: range of source values that is moved, "all" or percentages of the source such as "1-99".
        least: samples that source and target need at least.
    """

    support: str = ALL
    least: ClassVar[int] = 1

    @property
    def op(self) -> str:
        return "affine_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        bounds = {} if self.support == ALL else {"low": ("D",), "high": ("D",)}
        return {"gain": ("D",), "bias": ("D",), **bounds}

    @abstractmethod
    def fit_units(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and bias `[D]` fp32 from samples `[n, D]` and `[m, D]` fp32."""

    def options(self) -> dict[str, bool]:
        """Options of the op."""
        return {}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; the result does not depend on `paired` beyond the check, nor on `seed`."""
        if negatives is not None:
            raise InputError(
                f"negatives with {self.name}",
                value=f"{list(negatives.shape)}",
                allowed="none: one map for all tokens cannot leave some of them alone",
                fix="use the prototype method, or a row gate",
            )
        source = tokens_of(source, "source", pooled=self.pooled)
        target = tokens_of(target, "target", pooled=self.pooled)
        check_pair(source, target, None, paired)
        if min(len(source), len(target)) < self.least:
            given = f"{len(source)} and {len(target)}"
            raise InputError(f"samples of {self.name}", value=given, allowed=f"at least {self.least}")
        gain, bias = self.fit_units(source, target)
        return SiteFit({"gain": gain, "bias": bias, **support_of(source, self.support)}, dict(self.options()))


def check_moments(method: UnitMap, source: ChannelMoments, target: ChannelMoments) -> None:
    """Raise an InputError unless both have the same width, enough samples and finite values."""
    if source.mean.shape != target.mean.shape:
        raise InputError("width of the target moments", value=len(target.mean), allowed=f"{len(source.mean)}")
    least = int(torch.minimum(source.count, target.count).min())
    if least < method.least:
        raise InputError(f"samples of {method.name}", value=least, allowed=f"at least {method.least}")
    for what, moments in (("source", source), ("target", target)):
        if not bool((torch.isfinite(moments.mean) & torch.isfinite(moments.m2)).all()):
            raise InputError(f"{what} moments", value="NaN or infinity", allowed="finite values")


def range_of(source: ChannelMoments, support: str) -> dict[str, Tensor]:
    """The bounds of every unit from its smallest and largest value, or nothing for the support "all".

    Raises:
        InputError: percentages other than 0-100, which moments do not tell.
    """
    edges = _edges(support)
    if edges is None:
        return {}
    if edges != (0.0, 1.0):
        raise InputError("support of a fit from moments", value=support, allowed="all or 0-100")
    return {"low": source.minimum.float(), "high": source.maximum.float()}


def check_support(support: str) -> None:
    """Raise an InputError unless `support` is "all" or two percentages such as "0-100" or "0.5-99.5"."""
    _edges(support)


def check_std_eps(std_eps: float) -> None:
    """Raise an InputError unless `std_eps` is a number from 0."""
    if not std_eps >= 0:
        raise InputError("std_eps", value=std_eps, allowed="0 or more")


def _edges(support: str) -> tuple[float, float] | None:
    if support == ALL:
        return None
    low, _, high = str(support).partition("-")
    try:
        first, last = float(low), float(high)
    except ValueError:
        first, last = 0.0, 0.0
    if not 0 <= first < last <= 100:
        raise InputError("support", value=support, allowed="all, or percentages low-high such as 0-100 or 1-99")
    return first / 100, last / 100


def support_of(source: Tensor, support: str) -> dict[str, Tensor]:
    """The bounds of every unit as banks of `affine_shift`: `low` and `high` `[D]` fp32, or nothing for "all".

    Args:
        source: activations the map was fitted on, `[n, D]`.
        support: percentages of their distribution, linearly interpolated; values are inside when strictly between.
    """
    edges = _edges(support)
    if edges is None:
        return {}
    ordered = source.double().sort(dim=0).values
    places = [edge * (len(ordered) - 1) for edge in edges]
    values = [torch.lerp(ordered[int(p)], ordered[min(int(p) + 1, len(ordered) - 1)], p - int(p)) for p in places]
    return {"low": values[0].float(), "high": values[1].float()}
