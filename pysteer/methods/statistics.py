"""Second-order statistics of activations: the ridge precision used by the Mahalanobis distance and the row gates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.ops.gram_accumulate import gram_accumulate


@dataclass(frozen=True)
class BayesPrecision:
    """`P = d [(n - 1) cov + tr(cov) I]^-1` of centred data, in fp64.

    With `S = (n - 1) cov` and `t = tr(cov)`. Either dense, `matrix` `[D, D]`, or when there are fewer samples than
    dimensions the exact form `P = (d / t) (I - Z' Z)` with `factor` `Z = diag(sqrt(l / (l + t))) V'` `[r, D]`, where
    `l` and `V` are the non-zero eigenvalues and eigenvectors of `S`; it costs `2 D r` per vector instead of `D^2`.

    Attributes:
        scale: `d / t`.
        trace: `t`, the total variance per sample; 0 when all residuals are zero, and then `P = I`.
        samples: `n`.
    """

    dim: int
    scale: float
    trace: float
    samples: int
    factor: Tensor | None
    matrix: Tensor | None

    @classmethod
    def fit(cls, residuals: Tensor) -> "BayesPrecision":
        """Precision of `residuals` `[n, D]`: samples minus the mean of their own class or cluster."""
        n, dim = residuals.shape
        trace = float(residuals.double().square().sum()) / max(n - 1, 1)
        if trace == 0.0:
            return cls(dim, 1.0, 0.0, n, residuals.new_zeros(0, dim, dtype=torch.float64), None)
        if n < dim:
            return cls(dim, dim / trace, trace, n, _low_rank_factor(residuals.double(), trace), None)
        scatter = gram_accumulate(residuals).second_moment()  # blocks in the precision given, their sum in fp64
        scatter.diagonal().add_(trace)
        matrix = torch.cholesky_inverse(torch.linalg.cholesky(scatter)) * dim
        return cls(dim, dim / trace, trace, n, None, matrix)

    def apply(self, vectors: Tensor) -> Tensor:
        """`vectors @ P` for `vectors` `[..., D]`, in fp64."""
        vectors = vectors.double()
        if self.matrix is not None:
            return vectors @ self.matrix
        assert self.factor is not None
        return self.scale * (vectors - (vectors @ self.factor.T) @ self.factor)

    def dense(self) -> Tensor:
        """The matrix `P` `[D, D]` in fp64."""
        device = (self.factor if self.matrix is None else self.matrix).device  # type: ignore[union-attr]
        return self.apply(torch.eye(self.dim, dtype=torch.float64, device=device))

    def low_rank(self) -> Tensor:
        """`Z` `[r, D]` in fp64 with `P = scale (I - Z' Z)`, also when the dense form is held."""
        if self.factor is not None:
            return self.factor
        assert self.matrix is not None
        # P = scale (I - W) has eigenvalues scale * t / (l + t), so W's are l / (l + t)
        values, vectors = torch.linalg.eigh(self.matrix / self.scale)
        return (1 - values).clamp_min(0).sqrt()[:, None] * vectors.T

    def squared_distance(self, x: Tensor, centre: Tensor) -> Tensor:
        """`(x - c)' P (x - c)` for `x` `[..., D]`, fp64."""
        difference = x.double() - centre.double()
        return (self.apply(difference) * difference).sum(-1)


def _low_rank_factor(residuals: Tensor, trace: float) -> Tensor:
    """`Z` from the `n x n` Gram matrix of `residuals` `[n, D]` fp64; directions without variance are dropped."""
    values, vectors = torch.linalg.eigh(residuals @ residuals.T)
    keep = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    values, vectors = values[keep], vectors[:, keep]
    directions = (vectors / values.sqrt()).T @ residuals
    return (values / (values + trace)).sqrt()[:, None] * directions
