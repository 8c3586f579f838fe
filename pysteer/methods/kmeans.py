"""K-means for tokens and optimal matching of clusters; deterministic for a seed, on every device."""

import numpy as np
import torch
from torch import Tensor

_SEED_SAMPLE = 2048  # seeding on a sample of this size (or 16 per cluster) costs little and loses nothing measurable
_CANDIDATES = 4  # draws per k-means++ step, of which the best is kept


def kmeans(
    x: Tensor, clusters: int, seed: int = 0, iterations: int = 25, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm with greedy k-means++ seeding (Arthur and Vassilvitskii 2007).

    Args:
        x: `[n, D]` tokens.
        clusters: the number of clusters wanted; fewer come back when there are fewer distinct tokens.
        seed: seed of the initial centres; same seed, same result.
        iterations: the most Lloyd iterations; it stops earlier when no token changes its cluster.
        start: `[at most clusters, D]` centres to begin with; k-means++ adds the rest.

    Returns:
        centres `[K, D]` fp32 and labels `[n]` int64; no cluster is empty.
    """
    mean = x.float().mean(dim=0)
    x = x.float() - mean  # distances of centred data lose less to rounding
    centres = _seed_centres(x, min(clusters, len(x)), seed, None if start is None else start.float() - mean)
    labels = assign(x, centres)
    for _ in range(iterations):
        sums, counts = cluster_sums(x, labels, len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        previous, labels = labels, assign(x, centres)
        if torch.equal(previous, labels):
            break
    used, labels = labels.unique(return_inverse=True)
    sums, counts = cluster_sums(x, labels, len(used))
    return sums / counts[:, None] + mean, labels


def assign(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the Euclidean-nearest centre of every token; the lowest index wins a tie."""
    return (x @ centres.T - centres.square().sum(1) / 2).argmax(dim=1)


def cluster_sums(values: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sum of `values` `[n, D]` per label `[clusters, D]` and the counts `[clusters]`, both fp32.

    On a GPU a matrix product with the one-hot labels, since scattered adds would not be reproducible there.
    """
    if values.device.type == "cpu":
        sums = values.new_zeros(clusters, values.shape[1]).index_add_(0, labels, values)
        return sums, torch.bincount(labels, minlength=clusters).to(values.dtype)
    member = torch.nn.functional.one_hot(labels, clusters).to(values.dtype)
    return member.T @ values, member.sum(0)


def _seed_centres(x: Tensor, clusters: int, seed: int, start: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = min(len(x), max(_SEED_SAMPLE, 16 * clusters))
    sample = x[torch.randperm(len(x), generator=generator)[:size].sort().values.to(x.device)]
    norms = sample.square().sum(1)
    if start is None or not len(start):
        start = sample[torch.randint(size, (1,), generator=generator).to(x.device)]
    squared = norms[:, None] - 2 * sample @ start.T + start.square().sum(1)
    nearest = squared.min(dim=1).values.clamp_min(0)
    chosen = []
    for _ in range(clusters - len(start)):
        cumulative = nearest.double().cumsum(0)
        draws = torch.rand(_CANDIDATES, generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_max(size - 1)
        distances = (norms - 2 * sample[candidates] @ sample.T + norms[candidates, None]).clamp_min(0)
        distances = torch.minimum(distances, nearest)
        best = int(distances.sum(1).argmin())
        chosen.append(int(candidates[best]))
        nearest = distances[best]
    return torch.cat((start, sample[torch.tensor(chosen, dtype=torch.int64, device=x.device)]))


def optimal_assignment(cost: np.ndarray) -> np.ndarray:
    """Column for each row that minimises the total cost, each column used once (Hungarian algorithm, O(n^2 m)).

    Args:
        cost: `[n, m]` finite numbers, n <= m.

    Returns:
        `[n]` column indices.
    """
    rows, columns = cost.shape
    padded = np.zeros((rows + 1, columns + 1))
    padded[1:, 1:] = cost
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    match = np.zeros(columns + 1, dtype=np.int64)  # row matched to each column; index 0 is the row being placed
    for row in range(1, rows + 1):
        match[0], column = row, 0
        slack, came_from = np.full(columns + 1, np.inf), np.zeros(columns + 1, dtype=np.int64)
        done = np.zeros(columns + 1, dtype=bool)
        while match[column] != 0:
            done[column] = True
            current = match[column]
            reduced = padded[current] - row_price[current] - column_price
            better = ~done & (reduced < slack)
            slack[better], came_from[better] = reduced[better], column
            following = int(np.where(done, np.inf, slack)[1:].argmin()) + 1
            step = slack[following]
            row_price[match[done]] += step
            column_price[done] -= step
            slack[~done] -= step
            column = following
        while column != 0:
            match[column] = match[came_from[column]]
            column = int(came_from[column])
    result = np.zeros(rows, dtype=np.int64)
    result[match[1:][match[1:] > 0] - 1] = np.flatnonzero(match[1:] > 0)
    return result
