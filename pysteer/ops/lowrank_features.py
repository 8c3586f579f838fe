"""`lowrank_features`: what there is to know about dW = s B A from its thin factors, without forming it.

Sums, norms and singular values follow in closed form from the Gram matrices B'B and A A' (r x r, in fp64). Order
statistics need every element once or more: on a CPU the elements are made tile by tile and only counted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.launch import addresses
from pysteer.ops.registry import Case, OpSpec

_SCHEMA = "(Tensor up, Tensor down, Tensor scale, float[] quantiles) -> (Tensor, Tensor, Tensor)"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LowRankFeatures(NamedTuple):
    """Features of N products; all fp64.

    Attributes:
        summary: [N, 7]: sum, mean, standard deviation (population), Frobenius norm, spectral norm, nuclear norm,
            effective rank: exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), 0
            for a product of zeros.
        singular_values: [N, r], descending.
        quantiles: [N, Q], interpolated linearly between neighbours as `torch.quantile` does.
    """

    summary: Tensor
    singular_values: Tensor
    quantiles: Tensor


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values [N, r] from B'B and A A', fp64, descending; good to 1e-8 of the largest one."""
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # left = root root'
    return torch.linalg.eigvalsh(root.mT @ right @ root).clamp_min(0).sqrt().flip(-1)


def _summary(total: Tensor, left: Tensor, right: Tensor, singular: Tensor, elements: int) -> Tensor:
    square = (left * right).sum((-2, -1)).clamp_min(0)
    mean = total / elements
    deviation = (square / elements - mean.square()).clamp_min(0).sqrt()
    nuclear = singular.sum(-1)
    share = singular / nuclear.clamp_min(torch.finfo(singular.dtype).tiny).unsqueeze(-1)
    rank = torch.exp(torch.special.entr(share).sum(-1)) * (nuclear > 0)
    return torch.stack([total, mean, deviation, square.sqrt(), singular[..., 0], nuclear, rank], -1)


class _Places(NamedTuple):
    """Ranks to look up, and for every quantile its two neighbours among them and the share of the upper one."""

    ranks: list[int]
    low: list[int]
    high: list[int]
    shares: list[float]


def _places(quantiles: Sequence[float], elements: int) -> _Places:
    exact = [q * (elements - 1) for q in quantiles]
    low = [math.floor(place) for place in exact]
    high = [min(place + 1, elements - 1) for place in low]
    ranks = sorted({*low, *high})
    index = {rank: at for at, rank in enumerate(ranks)}
    shares = [place - below for place, below in zip(exact, low, strict=True)]
    return _Places(ranks, [index[each] for each in low], [index[each] for each in high], shares)


def _interpolated(found: Tensor, places: _Places) -> Tensor:
    """Quantiles [N, Q] from the elements [N, ranks]."""
    quantiles = []
    for low, high, share in zip(places.low, places.high, places.shares, strict=True):
        below, above = found[:, low].double(), found[:, high].double()
        quantiles.append(below + (above - below) * share)
    return torch.stack(quantiles, 1) if quantiles else found.new_empty(found.shape[0], 0, dtype=torch.float64)


def _grams(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B'B, A A' and the sum of the elements of every B A, fp64."""
    b, a = up.double(), down.double()
    return b.mT @ b, a @ a.mT, (b.sum(-2) * a.sum(-1)).sum(-1)


def _compiled_grams(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in C++, one pass over the factors."""
    b, a = (each.to(torch.float32).contiguous() for each in (up, down))
    count, m, rank = b.shape
    left, right = torch.empty(2, count, rank, rank, dtype=torch.float64)
    total = left.new_empty(count)
    sizes = (count, m, a.shape[-1], rank, torch.get_num_threads())
    backends.extension().lowrank_grams(*addresses(b, a, left, right, total), *sizes)
    return left, right, total


def _closed_form(
    grams: tuple[Tensor, Tensor, Tensor], up: Tensor, down: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    left, right, total = grams
    s = scale.double()
    left = left * s.square().reshape(-1, 1, 1)
    singular = _singular_values(left, right)
    return _summary(s * total, left, right, singular, up.shape[-2] * down.shape[-1]), singular


def lowrank_features_reference(
    up: Tensor, down: Tensor, scale: Tensor, *, quantiles: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> LowRankFeatures:
    """Return what `lowrank_features` computes, in plain torch: quantiles by sorting one product after the other."""
    summary, singular = _closed_form(_grams(up, down), up, down, scale)
    high = torch.promote_types(up.dtype, torch.float32)
    places = _places(quantiles, up.shape[-2] * down.shape[-1])
    b, a = up.to(high) * scale.to(high).reshape(-1, 1, 1), down.to(high)
    found = b.new_empty(up.shape[0], len(places.ranks))
    for i in range(up.shape[0] if quantiles else 0):
        ordered = (b[i] @ a[i]).flatten().sort().values
        found[i] = torch.stack([ordered[rank] for rank in places.ranks])
    return LowRankFeatures(summary, singular, _interpolated(found, places))


def _choose(up: Tensor, down: Tensor) -> str:
    kernel = "cpu" in backends.choices(up.device.type) and backends.provides("cpu", "lowrank_features")
    fits = up.dtype != torch.float64 and down.dtype != torch.float64 and up.numel() > 0 and down.numel() > 0
    return "cpu" if kernel and fits else "reference"


def _forward(up: Tensor, down: Tensor, scale: Tensor, quantiles: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    up, down, scale = up.detach(), down.detach(), scale.detach()
    if _choose(up, down) == "reference":
        return lowrank_features_reference(up, down, scale, quantiles=quantiles)
    summary, singular = _closed_form(_compiled_grams(up, down), up, down, scale)
    if not quantiles:
        return summary, singular, summary.new_empty(len(summary), 0)
    places = _places(quantiles, up.shape[-2] * down.shape[-1])
    wanted = torch.tensor(places.ranks)
    given = [each.to(torch.float32).contiguous() for each in (up, down, scale)]
    found = torch.empty(up.shape[0], len(places.ranks))
    sizes = (up.shape[0], up.shape[1], down.shape[2], up.shape[2], len(places.ranks), torch.get_num_threads())
    backends.extension().lowrank_features(*addresses(*given, wanted, found), *sizes)
    return summary, singular, _interpolated(found, places)


def _fake(up: Tensor, down: Tensor, scale: Tensor, quantiles: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    rows, sizes = up.shape[0], (7, up.shape[2], len(quantiles))
    summary, singular, order = (up.new_empty(rows, size, dtype=torch.float64) for size in sizes)
    return summary, singular, order


_plain, _ = declare("lowrank_features", _SCHEMA, _forward, fake=_fake)


def _check(up: Tensor, down: Tensor, scale: Tensor, quantiles: Sequence[float]) -> None:
    for name, factor in (("up", up), ("down", down), ("scale", scale)):
        if factor.dtype not in _FLOATS or factor.device != up.device:
            allowed = f"float32, bfloat16, float16 or float64 on {up.device}"
            raise InputError(name, value=f"{factor.dtype} on {factor.device}", allowed=allowed)
    if up.dim() != 3 or 0 in up.shape[1:]:
        raise InputError("up", value=list(up.shape), allowed="[N, m, r] with m and r of 1 or more")
    if down.dim() != 3 or down.shape[:2] != (up.shape[0], up.shape[2]) or down.shape[2] == 0:
        raise InputError("down", value=list(down.shape), allowed=f"{[up.shape[0], up.shape[2], 'n']}")
    if scale.shape != up.shape[:1]:
        raise InputError("scale", value=list(scale.shape), allowed=f"{list(up.shape[:1])}, one per product")
    for q in quantiles:
        if not 0 <= q <= 1:
            raise InputError("quantiles", value=q, allowed="0 to 1")


def lowrank_features(
    up: Tensor, down: Tensor, scale: Tensor, *, quantiles: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> LowRankFeatures:
    """Return statistics, norms, singular values and quantiles of N products dW = scale * up @ down.

    No product is formed, except for quantiles away from a CPU, where one at a time is. Closed forms are in fp64;
    singular values hold to 1e-8 of the largest one. The elements that quantiles are made of are fp32 sums, and each
    quantile is exact for them: nothing is sampled or binned. There is no gradient.

    Args:
        up: [N, m, r], "B" of a LoRA; fp32, bf16, fp16 or fp64.
        down: [N, r, n], "A" of a LoRA.
        scale: [N], alpha / r of a LoRA times any strength.
        quantiles: which, each from 0 (the minimum) to 1 (the maximum); 0.5 is the median.

    Raises:
        InputError: a shape, dtype, device or quantile does not fit.
    """
    _check(up, down, scale, quantiles)
    if plain_torch_needed():
        return lowrank_features_reference(up.detach(), down.detach(), scale.detach(), quantiles=quantiles)
    return LowRankFeatures(*_plain(up.detach(), down.detach(), scale.detach(), list(quantiles)))


def lowrank_products(up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """Return the Gram matrix [N, N] fp64 of Frobenius inner products <dW_i, dW_j> of N products of one shape.

    <dW_i, dW_j> = s_i s_j sum((B_i'B_j) * (A_i A_j')), so that similarities, distances and principal components of the
    products need no product.

    Args:
        up, down, scale: as for `lowrank_features`.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    _check(up, down, scale, ())
    count, _, rank = up.shape
    b = up.double() * scale.double().reshape(-1, 1, 1)
    columns, rows = b.transpose(0, 1).flatten(1), down.double().flatten(0, 1)  # [m, N r], [N r, n]
    found = b.new_empty(count, count)
    step = max(1, 4096 // rank)
    for first in range(0, count, step):
        part = slice(first * rank, (first + step) * rank)
        both = (columns[:, part].mT @ columns) * (rows[part] @ rows.mT)
        found[first : first + step] = both.reshape(-1, rank, count, rank).sum((1, 3))
    return found


def _make_inputs(case: Case) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(case.seed)
    rank = case.sizes.get("rank", 4)
    up = torch.randn(case.rows, case.tokens, rank, generator=generator)
    down = torch.randn(case.rows, rank, case.width, generator=generator)
    scale = torch.rand(case.rows, generator=generator) + 0.5
    given = {"up": up, "down": down, "scale": scale}
    return {**{name: each.to(case.device, case.dtype) for name, each in given.items()}, **case.options}


def _implementation(up: Tensor, down: Tensor, **_: Any) -> str:
    return _choose(up, down)


SPEC = OpSpec(
    name="lowrank_features",
    function=lowrank_features,
    reference=lowrank_features_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": "fp32, bf16 and fp16 factors; eigenvalues are torch's"},
    variants={"plain": {}, "median": {"quantiles": [0.5]}, "closed": {"quantiles": []}},
    sizes=({}, {"rank": 1}, {"rank": 16}),
    defaults={"quantiles": [0.0, 0.25, 0.5, 0.75, 1.0]},
    wide=("up", "down", "scale"),
    rowwise=("down", "scale"),
    layouts=("tokens",),
)
