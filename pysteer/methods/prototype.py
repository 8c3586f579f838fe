"""Token prototypes: every token is moved by the shift that belongs to its nearest prototype."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_choice, check_pair, register, tokens_of
from pysteer.methods.kmeans import assign, cluster_sums, kmeans, optimal_assignment
from pysteer.methods.statistics import BayesPrecision

DISTANCES = ("euclid", "mahalanobis")
DIRECTIONS = ("pair", "diff", "toward", "grad")
WEIGHTS = ("one", "gate", "soft")
NORMALIZE = ("none", "unit", "input")
NEGATIVES = ("join", "own")
_COMMON = 0.25  # part of its share of tokens that a cluster must keep in the other class to count as common


class _Classes(NamedTuple):
    """Centres `[K, D]` and shifts `[K, D]` of `groups` sets of prototypes, and the residuals of all tokens `[n, D]`."""

    centres: Tensor
    shifts: Tensor
    residuals: Tensor
    groups: int = 1


@register
@dataclass(frozen=True)
class Prototype(Method):
    """`y = x + s w(x) u(x)`: `u` by the nearest prototype `k*`, `w` by the classes of the prototypes around `x`.

    Prototypes are K-means centres of tokens. With centres `m_k`, source mean `a` and target mean `b`:

    - direction `pair` (default): `u = d_k*`, the mean of (target token - source token) over the source tokens of the
      cluster when the data are paired; for unpaired data the difference to the cluster of the target class that an
      optimal assignment (least squared distance) gives it, where clusters that the classes share start alike.
    - `diff`: `u = b - a` everywhere.
    - `toward`: `u = m_k* - x`, the nearest target prototype.
    - `grad`: `u = P (b - x)`, minus half the gradient of the squared distance to the target mean; with the Euclidean
      distance `P = I`. The length of `P (b - x)` has no natural scale, so `normalize` is advised with Mahalanobis.

    Weight `one`: `w = 1`. `gate`: `w = 1` where the nearest of all prototypes is not one of the target class, else 0.
    `soft`: `w` is the probability that `x` does not belong to the target class, and shifts are averaged, under
    `softmax(-d_k^2 / (2 temperature))` over the prototypes.

    The Mahalanobis distance uses one precision for all clusters, `P = d [(n - 1) cov + tr(cov) I]^-1` with the
    covariance of the residuals around the tokens' own centres; `x' P x` then cancels and the op needs `P m_k` only.
    Centres are counted from their mean, which changes no distance comparison and loses less to rounding.

    Args:
        clusters: prototypes per class (fewer when there are fewer tokens).
        distance: "euclid" or "mahalanobis".
        direction: "pair", "diff", "toward" or "grad".
        weight: "one", "gate" or "soft".
        temperature: of the soft weights, > 0 with "soft".
        normalize: "none", "unit" (`u / |u|`) or "input" (`u |x| / |u|`).
        pooled: fit on the mean of each row's tokens.
        negatives: "join": tokens of other classes are clustered with the source tokens and pull their clusters' shifts
            towards zero; "own": they get prototypes of their own with a zero shift.
        iterations: the most K-means iterations.
    """

    name: ClassVar[str] = "prototype"

    clusters: int = 64
    distance: str = "euclid"
    direction: str = "pair"
    weight: str = "one"
    temperature: float = 1.0
    normalize: str = "none"
    pooled: bool = False
    negatives: str = "join"
    iterations: int = 25

    def __post_init__(self) -> None:
        check_choice("distance of method prototype", self.distance, DISTANCES)
        check_choice("direction of method prototype", self.direction, DIRECTIONS)
        check_choice("weight of method prototype", self.weight, WEIGHTS)
        check_choice("normalize of method prototype", self.normalize, NORMALIZE)
        check_choice("negatives of method prototype", self.negatives, NEGATIVES)
        if type(self.clusters) is not int or not 1 <= self.clusters <= 1024:
            raise InputError("clusters of method prototype", value=self.clusters, allowed="a whole number, 1 to 1024")
        if self.weight == "soft" and not self.temperature > 0:
            raise InputError("temperature of soft weights", value=self.temperature, allowed="a number above 0")

    @property
    def op(self) -> str:
        """`prototype_shift`, which has fast kernels, wherever it can express the shift; else `gradient_shift`."""
        pulls = self.direction in ("toward", "grad")
        precise = self.direction == "grad" and self.distance == "mahalanobis"
        return "gradient_shift" if pulls and (self.weight != "one" or precise) else "prototype_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        if self.op == "prototype_shift":
            return {"weight": ("K", "D"), "offset": ("K",), "delta": ("K", "D")}
        scores: dict[str, tuple[str, ...]] = {"weight": ("K", "D"), "offset": ("K",), "target": ("K",)}
        return {**scores, "centre": ("K", "D"), "factor": ("r", "D"), "scale": ("1",)}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`."""
        source = tokens_of(source, "source", pooled=self.pooled)
        target = tokens_of(target, "target", pooled=self.pooled)
        others = None if negatives is None else tokens_of(negatives, "negative", pooled=self.pooled)
        check_pair(source, target, others, paired)
        if self.direction in ("toward", "grad"):
            if others is not None:
                raise InputError(
                    f"negatives with direction {self.direction}", allowed="none", fix="direction=pair or a row gate"
                )
            return self._fit_pull(source, target, seed)
        classes = self._source_classes(source, target, others, paired, seed)
        if self.weight != "one":
            centres, labels = kmeans(target, self.clusters, seed, self.iterations)
            classes = _join(classes, _Classes(centres, torch.zeros_like(centres), _residuals(target, centres, labels)))
        weight, offset = self._scores(classes.centres, self._precision(classes.residuals))
        tensors = {"weight": weight, "offset": offset, "delta": classes.shifts}
        return SiteFit(_pad(tensors, self.clusters * classes.groups), self._options())

    def _source_classes(
        self, source: Tensor, target: Tensor, others: Tensor | None, paired: bool, seed: int
    ) -> _Classes:
        join = others is not None and self.negatives == "join"
        tokens = torch.cat((source, others)) if join and others is not None else source
        centres, labels = kmeans(tokens, self.clusters, seed, self.iterations)
        residuals = _residuals(tokens, centres, labels)
        if self.distance == "mahalanobis":  # shifts belong to the tokens the op will send to the prototype
            weight, offset = self._scores(centres, self._precision(residuals))
            labels = (tokens @ weight.T + offset).argmax(1)
        shifts = self._shifts(source, target, labels, len(centres), paired, seed)
        classes = _Classes(centres, shifts, residuals)
        if others is not None and not join:
            own, own_labels = kmeans(others, self.clusters, seed, self.iterations)
            classes = _join(classes, _Classes(own, torch.zeros_like(own), _residuals(others, own, own_labels)))
        return classes

    def _shifts(self, source: Tensor, target: Tensor, labels: Tensor, clusters: int, paired: bool, seed: int) -> Tensor:
        """Shift `[K, D]` of every cluster; joined negatives, the labels after the source's, count as zero shifts."""
        total = torch.nn.functional.one_hot(labels, clusters).sum(0)
        labels = labels[: len(source)]
        sums, counts = cluster_sums(source, labels, clusters)
        share = counts / total.clamp_min(1)
        if self.direction == "diff":
            return share[:, None] * (target.double().mean(0) - source.double().mean(0)).float()
        if paired:
            return cluster_sums(target - source, labels, clusters)[0] / total.clamp_min(1)[:, None]
        used = counts > 0
        means = sums[used] / counts[used, None]
        # What both classes have in common should be cut up alike, or it would be moved between the pieces: the target's
        # clusters start from those of the source that hold their share of target tokens.
        share_of_target = torch.bincount(assign(target, means), minlength=len(means)) / len(target)
        common = means[share_of_target >= _COMMON * counts[used] / len(source)]
        target_centres, _ = kmeans(target, self.clusters, seed, self.iterations, start=common)
        shifts = torch.zeros_like(sums)
        shifts[used] = share[used, None] * (target_centres[_match(means, target_centres)] - means)
        return shifts

    def _fit_pull(self, source: Tensor, target: Tensor, seed: int) -> SiteFit:
        """Parameters of the directions `toward` and `grad`, which aim at points."""
        own, own_labels = kmeans(source, self.clusters, seed, self.iterations)
        centres, labels = kmeans(target, self.clusters, seed, self.iterations)
        both = (_residuals(source, own, own_labels), _residuals(target, centres, labels))
        precision = self._precision(torch.cat(both))
        aims = centres if self.direction == "toward" else target.mean(0).expand_as(centres)
        if self.op == "prototype_shift":
            weight, offset = self._scores(centres, precision)
            return SiteFit(_pad({"weight": weight, "offset": offset, "delta": aims}, self.clusters), self._options())
        weight, offset = self._scores(torch.cat((own, centres)), precision)
        tensors = {"weight": weight, "offset": offset, "centre": torch.cat((own, aims))}
        tensors["target"] = torch.arange(len(weight), device=weight.device).ge(len(own)).float()
        padded = _pad(tensors, 2 * self.clusters)
        if precision is None or self.direction == "toward":
            padded |= {"factor": source.new_zeros(0, source.shape[1]), "scale": source.new_ones(1)}
        else:
            padded |= {"factor": precision.low_rank().float(), "scale": source.new_full((1,), precision.scale)}
        return SiteFit(padded, self._options())

    def _options(self) -> dict[str, Any]:
        temperature = float(self.temperature) if self.weight == "soft" else 0.0
        common = {"temperature": temperature, "normalize": self.normalize}
        if self.op == "gradient_shift":
            return {"gate": self.weight != "one", **common}
        return {"pull": self.direction in ("toward", "grad"), **common}

    def _precision(self, residuals: Tensor) -> BayesPrecision | None:
        return BayesPrecision.fit(residuals) if self.distance == "mahalanobis" else None

    def _scores(self, centres: Tensor, precision: BayesPrecision | None) -> tuple[Tensor, Tensor]:
        """`weight` and `offset` with `x . weight_k + offset_k = -d^2(x, m_k) / 2 +` a term that all k share."""
        middle = centres.double().mean(0)
        relative = centres.double() - middle
        weight = relative if precision is None else precision.apply(relative)
        offset = -(weight @ middle) - (weight * relative).sum(1) / 2
        return weight.float(), offset.float()


def _residuals(tokens: Tensor, centres: Tensor, labels: Tensor) -> Tensor:
    """Tokens `[n, D]` minus their centres; what is only rounding is 0, or its precision would be huge."""
    found = tokens - centres[labels]
    return torch.where(found.abs() <= 8 * torch.finfo(found.dtype).eps * tokens.abs().amax(0), 0, found)


def _pad(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Fill up to `size` prototypes, which depends on the configuration alone, so that sites and steps stack."""
    filled = {}
    for name, tensor in tensors.items():
        room = tensor.new_full((size, *tensor.shape[1:]), float("-inf") if name == "offset" else 0.0)
        room[: len(tensor)] = tensor
        filled[name] = room
    return filled


def _join(first: _Classes, second: _Classes) -> _Classes:
    parts = [torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True)]
    return _Classes(parts[0], parts[1], parts[2], first.groups + second.groups)


def _match(source: Tensor, target: Tensor) -> Tensor:
    """For each source centre the index of its target centre; targets repeat only when there are too few."""
    repeats = -(-len(source) // len(target))
    cost = torch.cdist(source.double(), target.double()).square().repeat(1, repeats)
    return torch.from_numpy(optimal_assignment(cost.cpu().numpy()) % len(target)).to(target.device)
