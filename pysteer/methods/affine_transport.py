"""Affine transport: a matrix and a bias that carry source tokens to target tokens, in full or of low rank."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_pair, register, tokens_of


@register
@dataclass(frozen=True)
class AffineTransport(Method):
    """`y = x + s (B'(x - m) + d)`, of rank r or in full (op `low_rank_shift`).

    Paired: ridge regression of the shift target - source on the source, in closed form; of all maps of rank r the one
    with the smallest error on the (ridge-augmented) data (reduced-rank regression, Izenman 1975).

    Unpaired: the optimal transport map between Gaussians, `B = A - I` with `A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2` of
    the covariances S and T; of rank r the part that moves source tokens most. Both covariances get the same ridge, so
    that directions in which neither varies are left alone.

    The ridge is that of the Bayes precision, `tr(cov) / (n - 1) I`, which fades as samples come in: held-out shifts of
    the bundled generator are predicted best within a factor of three around it, from 4 prompts to 48.

    The full map has rank D at most and costs 4 D^2 operations per token, twice a dense one.

    Args:
        rank: r, None for the full map.
        ridge: factor on the ridge; 0 for none.
        pooled: fit on the mean over the tokens of each row.
        of_mean: shift all tokens of a row by what their mean is shifted by.
        negatives_weight: weight of a negative token, which should be shifted by zero, against a source token.
    """

    name: ClassVar[str] = "affine_transport"

    rank: int | None = 8
    ridge: float = 1.0
    pooled: bool = False
    of_mean: bool = False
    negatives_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise InputError("rank of affine transport", value=self.rank, allowed="a whole number above 0, or nothing")
        for what, value in (("ridge", self.ridge), ("negatives_weight", self.negatives_weight)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{what} of affine transport", value=value, allowed="0 or more")

    @property
    def op(self) -> str:
        return "low_rank_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return {"read": ("r", "D"), "write": ("r", "D"), "bias": ("D",)}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; the result does not depend on `seed`."""
        source = tokens_of(source, "source", pooled=self.pooled)
        target = tokens_of(target, "target", pooled=self.pooled)
        others = None if negatives is None else tokens_of(negatives, "negative", pooled=self.pooled)
        check_pair(source, target, others, paired)
        x, y = source.double(), target.double()
        weight = x.new_ones(len(x))
        shift = y - x if paired else None
        if shift is None:
            middle, away = x.mean(0), y.mean(0) - x.mean(0)
            slope, spread = gaussian_slope(x, y, self.ridge)
            if others is None:
                return self._factored(slope, spread @ slope, middle, away)
            shift = (x - middle) @ slope + away
        if others is not None:
            x = torch.cat((x, others.double()))
            shift = torch.cat((shift, shift.new_zeros(len(others), shift.shape[1])))
            weight = torch.cat((weight, weight.new_full((len(others),), self.negatives_weight)))
        middle, away = (weight @ each / weight.sum() for each in (x, shift))
        root = weight.sqrt()[:, None]
        return self._factored(*ridge_slope(root * (x - middle), root * (shift - away), self.ridge), middle, away)

    def _factored(self, slope: Tensor, seen: Tensor, middle: Tensor, away: Tensor) -> SiteFit:
        """Parameters of `x -> slope'(x - middle) + away`; `seen'seen` is the covariance of the shifts."""
        values, vectors = torch.linalg.eigh(seen @ seen.T)
        rank = min(len(values), len(middle) if self.rank is None else self.rank)
        values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
        kept = values > values[0] * len(values) * torch.finfo(values.dtype).eps
        root = torch.where(kept, values, 1.0).sqrt()
        write = torch.where(kept[:, None], (vectors / root).T @ seen, 0.0)
        read = write @ slope.T
        bias = away - (read @ middle) @ write
        tensors: dict[str, Tensor] = {"read": read.float(), "write": write.float(), "bias": bias.float()}
        options: dict[str, Any] = {"of_mean": True} if self.of_mean else {}
        if self.rank is not None and rank < self.rank:  # so that sites and steps have the same shapes
            room = self.rank - rank
            tensors |= {name: torch.nn.functional.pad(tensors[name], (0, 0, 0, room)) for name in ("read", "write")}
        return SiteFit(tensors, options)


def ridge_slope(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of centred `y` `[n, D]` on centred `x` `[n, D]`, fp64.

    Returns:
        `slope` `[D, D]` with `y ~ x @ slope`, and `seen` with `seen'seen = slope'(x'x + ridge tr(cov) I) slope`.
        Directions in which `x` does not vary have slope 0.
    """
    few = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if few else x.T @ x)
    values = values.clamp_min(0)
    alive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    total = values + ridge * values.sum() / max(len(x) - 1, 1)
    inverse = torch.where(alive, 1 / torch.where(alive, total, 1.0), 0.0)[:, None]
    if few:
        along = vectors.T @ y
        return x.T @ (vectors @ (inverse * along)), (values[:, None] * inverse).sqrt() * along
    along = vectors.T @ (x.T @ y)
    return vectors @ (inverse * along), inverse.sqrt() * along


def gaussian_slope(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Optimal transport between the Gaussians of `x` `[n, D]` and `y` `[m, D]`, fp64.

    Returns:
        `slope` `[D, D]`, the map minus the identity, and the root of the covariance of `x` with its ridge. Directions
        in which `x` does not vary, ridge included, have slope 0.
    """
    first, second = (_covariance(each) for each in (x, y))
    extra = ridge * float(first.trace() + second.trace()) / (2 * max(min(len(x), len(y)) - 1, 1))
    for each in (first, second):
        each.diagonal().add_(extra)
    root, inverse = _roots(first)
    middle, _ = _roots(root @ second @ root)
    return inverse @ middle @ inverse - inverse @ root, root


def _covariance(x: Tensor) -> Tensor:
    away = x - x.mean(0)
    return away.T @ away / max(len(x) - 1, 1)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix, and the inverse of that root where it is not zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(0)
    alive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root = torch.where(alive, values, 0.0).sqrt()
    inverse = torch.where(alive, 1 / torch.where(alive, root, 1.0), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
