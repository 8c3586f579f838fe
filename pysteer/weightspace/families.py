"""Feature families: what a classifier gets to see of an adapter.

flat            the factors as they are in the file, one long vector
canonical       the same in canonical factors, which do not depend on how a change was factorised
delta           the changes themselves, through their inner products (never formed), each layer counting alike
output, input   the directions that changes write to and read from, without their signs, likewise
stats-flat      5 statistics of the flat vector; stats7-flat: 7
stats           5 statistics of every factor, side by side; stats7: 7
delta-stats     5 statistics of every change B A, exact, the median included
spectral        of every change: singular values, norms, effective rank, entropy of the spectrum
quantiles       12 quantiles of every factor
norms           7 norms of every factor
entropy         2 entropies of every factor
coupling        how the factors of a layer relate: cosines and ratios of norms
fourier         shape of the spectrum of every factor read as a signal
ensemble        statistics, spectra, norms, quantiles, coupling, entropies and Fourier shapes together
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.lowrank_features import lowrank_features
from pysteer.weightspace import statistics as st
from pysteer.weightspace.canonical import canonical_set, delta_gram
from pysteer.weightspace.loraset import LoraSet


@dataclass(frozen=True)
class Features:
    """One family of features of N adapters.

    Attributes:
        family: its name.
        values: fp32 `[N, F]`, or None where only inner products are known.
        products: fp64 `[N, N]` inner products, of families that have no values.
        size: F, the number of features; without values, the elements of the matrices that are compared.
    """

    family: str
    values: Tensor | None
    products: Tensor | None
    size: int


def _of_factors(function: Callable[[Tensor], Tensor]) -> Callable[[LoraSet], Tensor]:
    def compute(adapters: LoraSet) -> Tensor:
        segments = adapters.layout.segments
        return torch.cat([function(adapters.part(each.layer, each.role).flatten(1)) for each in segments], 1)

    return compute


def _flat(adapters: LoraSet) -> Tensor:
    return torch.from_numpy(adapters.rows.copy() if not adapters.rows.flags.writeable else adapters.rows)


def _blocked(function: Callable[[Tensor], Tensor]) -> Callable[[LoraSet], Tensor]:
    def compute(adapters: LoraSet) -> Tensor:
        step = max(1, 2**25 // max(1, adapters.layout.width))
        blocks = (adapters.rows[i : i + step].copy() for i in range(0, len(adapters), step))
        return torch.cat([function(torch.from_numpy(block)) for block in blocks])

    return compute


def _delta_stats(adapters: LoraSet) -> Tensor:
    """mean, std, median, min, max of every change."""
    parts = []
    for layer in adapters.layers:
        found = lowrank_features(*adapters.factors(layer), quantiles=(0.0, 0.5, 1.0))
        order = found.quantiles[:, [1, 0, 2]]
        parts.append(torch.cat([found.summary[:, 1:3], order], 1))
    return torch.cat(parts, 1).float()


def _spectral(adapters: LoraSet) -> Tensor:
    parts = []
    for layer in adapters.layers:
        found = lowrank_features(*adapters.factors(layer), quantiles=())
        s = found.singular_values
        share = s.square() / s.square().sum(1, keepdim=True).clamp_min(1e-300)
        entropy = torch.special.entr(share).sum(1, keepdim=True)
        parts.append(torch.cat([s, s.clamp_min(1e-12).log(), found.summary[:, 3:], entropy], 1))
    return torch.cat(parts, 1).float()


def _coupling(adapters: LoraSet) -> Tensor:
    """Per layer: ratio of the factors' norms, their product over the norm of the change, and how parallel rows are."""
    parts = []
    for layer in adapters.layers:
        up, down, scale = adapters.factors(layer)
        left, right = up.flatten(1).norm(dim=1), down.flatten(1).norm(dim=1)
        gram = ((up.mT @ up) * (down @ down.mT)).sum((1, 2)).clamp_min(0).sqrt()
        size = min(up.shape[1], down.shape[2])
        first, second = up.mean(2)[:, :size], down.mean(1)[:, :size]
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=1)
        ratio = (left.clamp_min(1e-12) / right.clamp_min(1e-12)).log()
        parts.append(torch.stack([ratio, gram / (left * right).clamp_min(1e-12), cosine, scale * gram], 1))
    return torch.cat(parts, 1)


def _ensemble(adapters: LoraSet) -> Tensor:
    names = ("stats7", "delta-stats", "spectral", "quantiles", "norms", "entropy", "coupling", "fourier")
    return torch.cat([_VALUES[name](adapters) for name in names], 1)


_VALUES: dict[str, Callable[[LoraSet], Tensor]] = {
    "flat": _flat,
    "canonical": lambda adapters: _flat(canonical_set(adapters)),
    "stats-flat": _blocked(lambda x: st.statistics(x, 5)),
    "stats7-flat": _blocked(lambda x: st.statistics(x, 7)),
    "stats": _of_factors(lambda x: st.statistics(x, 5)),
    "stats7": _of_factors(lambda x: st.statistics(x, 7)),
    "delta-stats": _delta_stats,
    "spectral": _spectral,
    "quantiles": _of_factors(st.quantiles),
    "norms": _of_factors(st.norms),
    "entropy": _of_factors(st.entropies),
    "coupling": _coupling,
    "fourier": _of_factors(st.fourier),
    "ensemble": _ensemble,
}
_PRODUCTS = {"delta": "change", "output": "output", "input": "input"}
FAMILIES = ("flat", "canonical", *_PRODUCTS, *list(_VALUES)[2:])


def features(adapters: LoraSet, family: str) -> Features:
    """The features of a family, computed from the factors of all adapters.

    Raises:
        InputError: unknown family.
    """
    if family not in FAMILIES:
        raise InputError("feature family", value=family, allowed=", ".join(FAMILIES))
    if family in _PRODUCTS:
        products = delta_gram(adapters, normalise=True, side=_PRODUCTS[family])
        return Features(family, None, products, sum(_elements(adapters, layer, family) for layer in adapters.layers))
    values = _VALUES[family](adapters)
    return Features(family, values, None, values.shape[1])


def _elements(adapters: LoraSet, layer: str, family: str) -> int:
    """Elements of the matrices that inner products are taken of."""
    out, width = adapters.layout.place(layer, "up").shape[0], adapters.layout.place(layer, "down").shape[1]
    return {"delta": out * width, "output": out * out, "input": width * width}[family]
