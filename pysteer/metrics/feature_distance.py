"""Distances between two sets of images through the features of a classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pysteer.errors import InputError


def _check(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, x in (("first features", a), ("second features", b)):
        if x.dim() != 2 or x.shape[0] < least:
            raise InputError(
                name, value=list(x.shape), allowed=f"[N, D] with N >= {least}", fix="pass more images, one row each"
            )
        if not torch.isfinite(x).all():
            raise InputError(name, value="NaN or Inf", allowed="finite features", fix="check the images")
    if a.shape[1] != b.shape[1]:
        raise InputError(
            "feature width", value=f"{a.shape[1]} and {b.shape[1]}", allowed="the same", fix="use one classifier"
        )
    return a.detach().double().cpu(), b.detach().double().cpu()


def _factor(x: Tensor) -> Tensor:
    """R with R'R = covariance of x [N, D]; at most D rows."""
    centred = (x - x.mean(0)) / math.sqrt(x.shape[0] - 1)
    return torch.linalg.qr(centred, mode="r").R if centred.shape[0] > centred.shape[1] else centred


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features `a` [N, D] and `b` [M, D].

    d² = |m_a - m_b|² + tr(C_a + C_b - 2 (C_a^½ C_b C_a^½)^½) (Dowson and Landau 1982; FID of Heusel et al. 2017 with
    another feature extractor). With C = R'R the last trace is the nuclear norm of R_a R_b', so neither a covariance nor
    a matrix square root is formed and rank-deficient sets (N < D) are exact. Computed in fp64. Biased upwards for
    small sets: compare only sets of equal size. Raises `InputError` on fewer than 2 rows, another width, NaN or Inf.
    """
    a, b = _check(a, b, 2)
    ra, rb = _factor(a), _factor(b)
    cross = torch.linalg.svdvals(ra @ rb.T).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    spread = ra.square().sum() + rb.square().sum()
    distance = float(mean + spread - 2 * cross)
    # Equal sets cancel to rounding errors, which are not a distance.
    return distance if distance > 1e-12 * float(mean + spread) else 0.0


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y/D + 1)³ (KID, Binkowski et al. 2018) of `a` [N, D] and `b` [M, D].

    Unbiased at any sample size, so it can be slightly negative for equal distributions. Computed in fp64. Raises
    `InputError` as `frechet_distance`.
    """
    a, b = _check(a, b, 2)
    n, m, d = a.shape[0], b.shape[0], a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1).pow(3)

    kaa, kbb = kernel(a, a), kernel(b, b)
    within = (kaa.sum() - kaa.diagonal().sum()) / (n * (n - 1)) + (kbb.sum() - kbb.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())
