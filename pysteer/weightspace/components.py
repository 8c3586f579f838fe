"""Principal components of many rows, by the route that suits their number.

    gram         n <= d and n not too large: eigenvectors of the n x n matrix of inner products; exact
    covariance   d small: eigenvectors of the d x d matrix; exact
    streaming    both large: block power iterations over the rows, read in blocks; memory does not grow with n

Rows may be mapped from the disk. Products are fp32 by block, sums fp64; rows are centred block by block, so that no
sum cancels. The singular values of the first two routes agree with a full decomposition to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysteer.errors import InputError

GRAM_LIMIT = 16384  # rows up to which an n x n matrix of fp64 (2 GiB) and its eigenvectors are fine
COVARIANCE_LIMIT = 4096
_COLUMNS = 8192
_TILE = 256  # rows of a tile of the Gram matrix; only tiles on and below the diagonal are computed
_SUMMED = 64  # rows that are summed in fp32 before fp64 takes over


@dataclass(frozen=True)
class Pca:
    """Principal components.

    Attributes:
        mean: fp32 `[d]`; scale: fp32 `[d]`, what columns were divided by (ones without `standardise`).
        components: fp32 `[k, d]`, orthonormal.
        singular_values: fp64 `[k]`, of the centred and scaled rows.
        total: sum of all squared singular values, so that shares of variance are `singular_values**2 / total`.
        method, reason: the route taken, and why.
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    singular_values: Tensor
    total: float
    method: str
    reason: str

    def transform(self, rows: Any) -> Tensor:
        """Coordinates fp32 `[N, k]` of rows `[N, d]`."""
        values = torch.as_tensor(np.asarray(rows))
        return ((values - self.mean) / self.scale) @ self.components.T


def choose(n: int, d: int) -> tuple[str, str]:
    """The route for n rows of d values, and why."""
    if n <= d and n <= GRAM_LIMIT:
        return "gram", f"{n} rows of {d} values: the {n} x {n} matrix of inner products is the smaller problem"
    if d <= COVARIANCE_LIMIT:
        return "covariance", f"{n} rows of {d} values: the {d} x {d} covariance is the smaller problem"
    return "streaming", f"{n} rows of {d} values: neither {n} x {n} nor {d} x {d} fits, rows are read in blocks"


def pca(
    rows: Any, k: int, *, index: Sequence[int] | None = None, method: str = "auto", standardise: bool = False,
    iterations: int = 4, seed: int = 0,
) -> Pca:  # fmt: skip
    """The first k principal components of rows.

    Args:
        rows: fp32 `[N, d]`, a tensor or an array, possibly mapped from the disk.
        k: 1 to min(n - 1, d).
        index: the rows to use, for example those of the training part; all when None.
        method: auto, gram, covariance or streaming.
        standardise: divide columns by their standard deviation; constant ones are left alone.
        iterations: passes over the rows of the streaming route, beside the first.
        seed: of its start.

    Raises:
        InputError: k out of range, or an unknown method.
    """
    x = rows.numpy() if isinstance(rows, Tensor) else rows
    chosen = np.arange(len(x)) if index is None else np.asarray(index)
    n, d = len(chosen), x.shape[1]
    if not 1 <= k <= min(n - 1, d):
        raise InputError("k", value=k, allowed=f"1 to {min(n - 1, d)} for {n} rows of {d} values")
    if method not in ("auto", "gram", "covariance", "streaming"):
        raise InputError("method of PCA", value=method, allowed="auto, gram, covariance, streaming")
    route, reason = choose(n, d) if method == "auto" else (method, "as asked")
    function = {"gram": _gram, "covariance": _covariance, "streaming": _streaming}[route]
    mean, scale, components, singular, total = function(_Rows(x, chosen, index is None), k, standardise,
                                                        iterations, seed)  # fmt: skip
    return Pca(mean, scale, components, singular, total, route, reason)


_Found = tuple[Tensor, Tensor, Tensor, Tensor, float]


@dataclass(frozen=True)
class _Rows:
    """Rows of a matrix, in blocks of columns or of rows."""

    x: Any
    chosen: Any
    every: bool

    def columns(self, start: int, stop: int, into: Tensor) -> Tensor:
        """Columns, copied into the front of `into` [n * columns]; fresh memory for each block takes longer."""
        block = into[: len(self.chosen) * (stop - start)].view(len(self.chosen), stop - start)
        source = self.x[:, start:stop]
        if self.every:
            np.copyto(block.numpy(), source)
        else:
            np.copyto(block.numpy(), source[self.chosen])
        return block

    def rows(self, start: int, stop: int) -> Tensor:
        block = self.x[start:stop] if self.every else self.x[self.chosen[start:stop]]
        return torch.from_numpy(np.array(block, np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.chosen), self.x.shape[1]


def _column_means(block: Tensor) -> Tensor:
    """Means fp32 of columns; fp32 over a few rows, fp64 over those sums."""
    sums = torch.stack([part.sum(0) for part in block.split(_SUMMED)])
    return (sums.sum(0, dtype=torch.float64) / len(block)).float()


def _normal(block: Tensor, standardise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A block of columns, centred in place and scaled; mean and scale."""
    mean = _column_means(block)
    block -= mean
    scale = torch.ones_like(mean)
    if standardise:
        scale = _column_means(block.square()).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        block /= scale
    return block, mean, scale


def _gram(x: _Rows, k: int, standardise: bool, iterations: int, seed: int) -> _Found:
    n, d = x.shape
    gram = torch.zeros(n, n, dtype=torch.float64)
    mean, scale = torch.empty(d), torch.empty(d)
    held = torch.empty(n * min(d, _COLUMNS))
    for start in range(0, d, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, d))
        block, mean[part], scale[part] = _normal(x.columns(part.start, part.stop, held), standardise)
        for top in range(0, n, _TILE):
            bottom = min(top + _TILE, n)
            gram[top:bottom, :bottom] += block[top:bottom] @ block[:bottom].T
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    singular = values.clamp_min(0).sqrt().flip(0)[:k]
    u = vectors.flip(1)[:, :k]
    weights = (u / singular.clamp_min(1e-30)).float().T.contiguous()
    components = torch.empty(k, d)
    for start in range(0, d, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, d))
        block = x.columns(part.start, part.stop, held)
        block -= mean[part]
        if standardise:
            block /= scale[part]
        components[:, part] = weights @ block
    return mean, scale, components, singular, float(gram.trace())


def _moments(x: _Rows, standardise: bool) -> tuple[Tensor, Tensor, int]:
    """Mean and scale over blocks of rows, and rows per block."""
    n, d = x.shape
    step = max(16, 2**24 // d)
    total, square = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    for start in range(0, n, step):
        total += x.rows(start, start + step).sum(0, dtype=torch.float64)
    mean = (total / n).float()
    scale = torch.ones(d)
    if standardise:
        for start in range(0, n, step):
            square += (x.rows(start, start + step) - mean).square_().sum(0, dtype=torch.float64)
        scale = (square / n).sqrt().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return mean, scale, step


def _covariance(x: _Rows, k: int, standardise: bool, iterations: int, seed: int) -> _Found:
    n, d = x.shape
    mean, scale, step = _moments(x, standardise)
    cov = torch.zeros(d, d, dtype=torch.float64)
    for start in range(0, n, step):
        block = (x.rows(start, start + step) - mean) / scale
        cov += block.T @ block
    values, vectors = torch.linalg.eigh(cov)
    singular = values.clamp_min(0).sqrt().flip(0)[:k]
    return mean, scale, vectors.flip(1)[:, :k].T.float().contiguous(), singular, float(cov.trace())


def _streaming(x: _Rows, k: int, standardise: bool, iterations: int, seed: int) -> _Found:
    """Block Krylov: orthonormal bases of the spaces reached by X'X, then Rayleigh-Ritz (Musco and Musco 2015)."""
    n, d = x.shape
    mean, scale, step = _moments(x, standardise)
    width = min(d, k + max(8, k // 4))
    basis = torch.linalg.qr(torch.randn(d, width, generator=torch.Generator().manual_seed(seed))).Q
    krylov, total = [basis], 0.0
    for turn in range(iterations):
        reached = torch.zeros(d, width, dtype=torch.float64)
        for start in range(0, n, step):
            block = (x.rows(start, start + step) - mean) / scale
            reached += (block.T @ (block @ krylov[-1])).double()
            total += float(block.square().sum(dtype=torch.float64)) if turn == 0 else 0.0
        following = reached.float()
        for before in krylov * 2:  # twice, because once leaves what rounding put back
            following -= before @ (before.T @ following)
        if following.norm() <= 1e-7 * float(reached.norm()):
            break  # the space is already invariant
        krylov.append(torch.linalg.qr(following).Q)
    space = torch.linalg.qr(torch.cat(krylov, 1)[:, : min(d, n + width)]).Q
    small = torch.zeros(space.shape[1], space.shape[1], dtype=torch.float64)
    for start in range(0, n, step):
        reached_rows = ((x.rows(start, start + step) - mean) / scale) @ space
        small += reached_rows.T @ reached_rows
    values, vectors = torch.linalg.eigh(small)
    singular = values.clamp_min(0).sqrt().flip(0)[:k]
    components = (space @ vectors.flip(1)[:, :k].float()).T.contiguous()
    return mean, scale, components, singular, total
