"""Optimal transport between two Gaussians per unit, and its shift alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_pair, register, tokens_of
from pysteer.methods.linear_act import refuse_negatives
from pysteer.methods.support import ALL, check_support, support_of


@register
@dataclass(frozen=True)
class GaussianTransport(Method):
    """`y = x + s (T(x) - x)` with `T(x) = (sigma_t / sigma_s) (x - mu_s) + mu_t` per unit.

    The optimal transport map between the Gaussians that have the means and unbiased standard deviations of source and
    target. Units of which either does not vary are left alone.

    Args:
        only_mean: shift by `mu_t - mu_s` and leave the scale ("mean transport").
        support: range of source values that is moved, "all" (as published) or percentages such as "0-100".
        pooled: fit on the mean over the tokens of each row, as published.
        std_eps: units whose source or target has a standard deviation of at most this are left alone.
    """

    name: ClassVar[str] = "gaussian_transport"

    only_mean: bool = False
    support: str = ALL
    pooled: bool = True
    std_eps: float = 1e-4

    def __post_init__(self) -> None:
        check_support(self.support)
        if not self.std_eps >= 0:
            raise InputError("std_eps", value=self.std_eps, allowed="0 or more")

    @property
    def op(self) -> str:
        return "affine_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        bounds = {} if self.support == ALL else {"low": ("D",), "high": ("D",)}
        return {"gain": ("D",), "bias": ("D",), **bounds}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; needs two rows (or tokens) on either side."""
        refuse_negatives(self.name, negatives)
        source = tokens_of(source, "source", pooled=self.pooled)
        target = tokens_of(target, "target", pooled=self.pooled)
        check_pair(source, target, None, paired)
        if min(len(source), len(target)) < 2:
            raise InputError("samples of gaussian_transport", value=(len(source), len(target)), allowed="at least 2")
        x, y = source.double(), target.double()
        alive = (x.std(0) > self.std_eps) & (y.std(0) > self.std_eps)
        one = torch.ones_like(x[0])
        gain = one if self.only_mean else torch.where(alive, y.std(0) / torch.where(alive, x.std(0), one), one)
        bias = torch.where(alive, y.mean(0) - gain * x.mean(0), 0.0)
        return SiteFit({"gain": gain.float(), "bias": bias.float(), **support_of(source, self.support)}, {})
