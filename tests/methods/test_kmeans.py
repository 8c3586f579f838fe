"""K-means and the optimal assignment against planted data and brute force."""

from itertools import permutations

import numpy as np
import pytest
import torch

from pysteer.methods.kmeans import assign, kmeans, optimal_assignment


def planted(clusters: int, per_cluster: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(clusters, dim, generator=generator) * 5
    labels = torch.arange(clusters).repeat_interleave(per_cluster)
    return centres[labels] + 0.1 * torch.randn(len(labels), dim, generator=generator) + 100.0, labels


def test_planted_clusters_are_found():
    x, labels = planted(20, 30, 16)
    centres, found = kmeans(x, 20, seed=4)
    assert centres.shape == (20, 16)
    together = (labels[:, None] == labels[None, :]) == (found[:, None] == found[None, :])
    assert together.all()
    for cluster in range(20):
        assert torch.allclose(centres[cluster], x[found == cluster].mean(0), atol=1e-4)


def test_same_seed_same_clusters_and_another_seed_starts_elsewhere():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    first, again, other = (kmeans(x, 12, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_labels_are_the_nearest_centres_and_centres_are_means():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    centres, labels = kmeans(x, 9, iterations=200)
    assert torch.equal(labels, torch.cdist(x.double(), centres.double()).argmin(1))
    for cluster in range(9):
        assert torch.allclose(centres[cluster], x[labels == cluster].mean(0), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_tokens_than_clusters(rows):
    x = torch.randn(rows, 4).repeat(5, 1)
    centres, labels = kmeans(x, 16)
    assert len(centres) == rows
    assert torch.allclose(centres[labels], x, atol=1e-6)


def test_ties_go_to_the_lowest_index():
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert assign(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), centres).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_optimal(seed):
    cost = np.random.default_rng(seed).normal(size=(4, 6))
    columns = optimal_assignment(cost)
    best = min(sum(cost[i, c] for i, c in enumerate(choice)) for choice in permutations(range(6), 4))
    assert len(set(columns.tolist())) == 4
    assert cost[np.arange(4), columns].sum() == pytest.approx(best)
