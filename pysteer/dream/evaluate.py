"""How good an autoencoder is: what it leaves unexplained, how many latents it uses, which never fire."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pysteer.dream.sources import TokenSource
from pysteer.models.sae import SparseAutoencoder

_TOKENS = 8192  # at a time


@dataclass(frozen=True)
class Quality:
    """Over `tokens` tokens.

    Attributes:
        fvu: fraction of variance unexplained, `sum |x - y|^2 / sum |x - mean|^2`.
        l0: active latents per token.
        dead: share of the latents that no token activates.
        tokens: how many were looked at.
    """

    fvu: float
    l0: float
    dead: float
    tokens: int


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, source: TokenSource, most: int = 500_000) -> Quality:
    """Measure an autoencoder with the kernels it is used with.

    Args:
        sae: the autoencoder.
        source: tokens, not those it was trained on.
        most: tokens to look at, from the front.
    """
    total = torch.zeros(sae.width, dtype=torch.float64)
    square = error = active = 0.0
    fired = torch.zeros(sae.latents, dtype=torch.bool)
    count = 0
    for number in range(len(source.sizes)):
        for x in source.chunk(number).split(_TOKENS):
            x = x[: most - count]
            if not len(x):
                break
            values, indices = sae.encode(x)
            y = sae.reconstruct(x)
            error += float((x - y).double().square().sum())
            square += float(x.double().square().sum())
            total += x.double().sum(0)
            on = (values > 0) & (indices >= 0)
            active += float(on.sum())
            fired[indices[on].long()] = True
            count += len(x)
    variance = square - float((total / max(count, 1)).square().sum()) * count
    return Quality(error / max(variance, 1e-12), active / max(count, 1), float((~fired).float().mean()), count)
