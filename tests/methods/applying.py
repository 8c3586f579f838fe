"""Fitted parameters applied to activations through their op, at one strength for all rows."""

from typing import Any

import torch
from torch import Tensor

from pysteer.methods import SiteFit
from pysteer.ops import get


def apply(op: str, fit: SiteFit, x: Tensor, strength: float = 1.0, **options: Any) -> Tensor:
    """`x` `[R, ...]` steered by set 1 of a bank, all rows with the same strength."""
    banks = {name: torch.stack((torch.zeros_like(tensor), tensor)) for name, tensor in fit.tensors.items()}
    table = {
        "slot": torch.ones(1, len(x), dtype=torch.int32),
        "strength": torch.full((1, len(x)), strength),
        "clock": torch.tensor(0),
    }
    return get(op).function(x, **banks, **table, **fit.options, **options)


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
