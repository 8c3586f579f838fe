"""The change of a layer free of the choice of its factors: canonical factors, and inner products of changes.

`up @ down` does not change when `up` is multiplied by an invertible matrix and `down` by its inverse, so that raw
factors of equal adapters can differ in everything. The canonical factors `U sqrt(S)` and `sqrt(S) V'` come from the
singular value decomposition of the product, by QR of the thin factors (as in W2T, arXiv 2603.15990).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.lowrank_features import lowrank_products
from pysteer.weightspace.layout import Layout
from pysteer.weightspace.loraset import LoraSet


def thin_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[N, m, r]`, S `[N, r]` and V' `[N, r, n]` of N products up `[N, m, r]` @ down `[N, r, n]`, never formed.

    Two QR decompositions and the SVD of an r x r matrix; the largest entry of every column of U is positive.
    """
    left, a = torch.linalg.qr(up)
    right, b = torch.linalg.qr(down.mT)
    u, s, vt = torch.linalg.svd(a @ b.mT)
    u, vt = left @ u, vt @ right.mT
    sign = torch.gather(u, 1, u.abs().argmax(1, keepdim=True)).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return u * sign, s, vt * sign.mT


def canonical_set(adapters: LoraSet) -> LoraSet:
    """The same adapters in canonical factors, with scales of 1 and singular values in descending order.

    Equal changes have equal rows, up to rounding, whatever their factors, alphas and unused ranks.
    """
    rows = np.zeros(adapters.rows.shape, np.float32)
    layout: Layout = adapters.layout
    for layer in adapters.layers:
        up, down, scale = adapters.factors(layer)
        u, s, vt = thin_svd(up * scale.view(-1, 1, 1), down)
        root = s.sqrt()
        for role, value in (("up", u * root[:, None, :]), ("down", root[:, :, None] * vt)):
            place = layout.place(layer, role)
            flat = value.new_zeros(len(value), *place.shape)
            flat[:, : value.shape[1], : value.shape[2]] = value
            rows[:, place.start : place.stop] = flat.flatten(1).numpy()
    return LoraSet(rows, layout, [replace(e, scales=(1.0,)) for e in adapters.entries], adapters.skipped)


SIDES = ("change", "output", "input")


def layer_products(adapters: LoraSet, layer: str, side: str = "change") -> Tensor:
    """Inner products `[N, N]` fp64 of what adapters do to one layer.

    With the singular value decomposition dW = U S V', `change` compares dW itself, `output` the matrices U S U' and
    `input` V S V'. These two know which directions a layer writes (or reads), and how strongly, but not their signs.
    A LoRA whose `down` starts from noise of its own and hardly moves is dW = (G a) a' with a gradient G that all
    adapters of a class share: for rank 1 the inner product of two changes is (Ga, Gb)(a, b), whose sign is that of two
    unrelated draws, while (Ga, Gb)^2 / |Ga||Gb| of `output` is not affected by it.

    Raises:
        InputError: an unknown layer or side.
    """
    if side not in SIDES:
        raise InputError("side", value=side, allowed=", ".join(SIDES))
    up, down, scale = adapters.factors(layer)
    if side == "change":
        return lowrank_products(up, down, scale)
    u, s, vt = thin_svd(up * scale.view(-1, 1, 1), down)
    root = s.sqrt()
    left = u * root[:, None, :] if side == "output" else vt.mT * root[:, None, :]
    return lowrank_products(left, left.mT, torch.ones(len(left)))


def delta_gram(
    adapters: LoraSet, layers: Sequence[str] | None = None, *, normalise: bool = False, side: str = "change"
) -> Tensor:
    """Inner products `[N, N]` fp64 of the changes of all adapters, summed over layers.

    Args:
        adapters: the set.
        layers: which; all when None.
        normalise: divide the products of every layer by their mean square norm over the set, so that each counts alike.
        side: change, output or input, see `layer_products`.

    Raises:
        InputError: an unknown layer or side.
    """
    chosen = adapters.layers if layers is None else tuple(layers)
    unknown = set(chosen) - set(adapters.layers)
    if unknown or not chosen:
        raise InputError("layers", value=", ".join(sorted(unknown)), allowed=", ".join(adapters.layers[:4]) + " ...")
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for layer in chosen:
        products = layer_products(adapters, layer, side)
        size = products.diagonal().mean() if normalise else products.new_ones(())
        total += products / size.clamp_min(1e-300)
    return total


def similarity(adapters: LoraSet) -> Tensor:
    """Cosines `[N, N]` fp64 between the changes of all adapters; 0 beside an adapter that changes nothing."""
    gram = delta_gram(adapters)
    length = gram.diagonal().clamp_min(0).sqrt()
    both = length[:, None] * length[None, :]
    return torch.where(both > 0, gram / both.clamp_min(1e-300), torch.zeros_like(gram))


def nearest(adapters: LoraSet, count: int = 5) -> tuple[Tensor, Tensor]:
    """The `count` most similar other adapters of each: cosines and indices `[N, count]`, most similar first."""
    cosines = similarity(adapters).fill_diagonal_(-torch.inf)
    found = cosines.topk(min(count, len(adapters) - 1), dim=1)
    return found.values, found.indices
