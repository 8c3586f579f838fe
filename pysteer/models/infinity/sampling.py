"""Bit sampling with one counter-based random stream per row.

The uniform number behind a bit depends only on (row seed, scale, token, bit), so a picture does not depend on its
batch mates, on its position in the batch or on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """SplitMix64 finaliser (Steele, Lea, Flood 2014) of int64 counters, wrapping arithmetic."""
    x = x * 1 + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def row_uniform(seeds: Tensor, scale: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) ``[B, count]`` fp32 for int64 ``seeds [B]`` at scale index ``scale``."""
    stream = splitmix64(splitmix64(seeds.to(torch.int64)) + scale)
    counter = torch.arange(count, dtype=torch.int64, device=seeds.device)
    mixed = splitmix64(stream[:, None] + counter[None, :] * _GOLDEN)
    return _shift_right(mixed, 40).float() * (1.0 / (1 << 24))


def sample_bits(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Bits ``[B, L, d]`` int64 from logits ``[B, L, 2 d]`` (pairs zero, one; temperature already applied).

    Nucleus sampling over two classes: the less likely value is dropped when its probability is at most ``1 - top_p``.
    ``top_p = 0`` means greedy here only through the caller; 1.0 samples freely.
    """
    pair = logits.unflatten(-1, (-1, 2))
    one = torch.sigmoid(pair[..., 1] - pair[..., 0])
    if top_p < 1.0:
        certain = torch.minimum(one, 1 - one) <= 1 - top_p
        one = torch.where(certain, (one > 0.5).to(one.dtype), one)
    return (uniform.view_as(one) < one).to(torch.int64)


def greedy_bits(logits: Tensor) -> Tensor:
    """The likelier value of every bit, ``[B, L, d]`` int64."""
    pair = logits.unflatten(-1, (-1, 2))
    return (pair[..., 1] > pair[..., 0]).to(torch.int64)
