"""The Bayes precision against its definition, in fp64."""

import pytest
import torch

from pysteer.methods import BayesPrecision


def definition(residuals: torch.Tensor) -> torch.Tensor:
    n, dim = residuals.shape
    cov = residuals.T @ residuals / (n - 1)
    return dim * torch.linalg.inv((n - 1) * cov + cov.trace() * torch.eye(dim, dtype=residuals.dtype))


@pytest.mark.parametrize(("samples", "dim"), [(200, 12), (13, 12), (12, 12), (5, 12), (2, 7), (40, 64)])
def test_precision_is_its_definition_in_both_forms(samples, dim):
    x = torch.randn(samples, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    residuals = x - x.mean(0)
    precision = BayesPrecision.fit(residuals)
    expected = definition(residuals)
    assert (precision.factor is None) == (samples >= dim)
    assert torch.allclose(precision.dense(), expected, rtol=1e-9, atol=1e-12)
    factor = precision.low_rank()
    rebuilt = precision.scale * (torch.eye(dim, dtype=torch.float64) - factor.T @ factor)
    assert torch.allclose(rebuilt, expected, rtol=1e-9, atol=1e-9)
    y, centre = torch.randn(4, dim), torch.randn(dim)
    difference = (y - centre).double()
    slow = torch.stack([d @ expected @ d for d in difference])
    assert torch.allclose(precision.squared_distance(y, centre), slow, rtol=1e-6)


def test_low_rank_form_has_no_more_directions_than_the_data():
    x = torch.randn(6, 50, dtype=torch.float64)
    assert BayesPrecision.fit(x - x.mean(0)).low_rank().shape == (5, 50)


def test_without_variance_the_precision_is_the_identity():
    precision = BayesPrecision.fit(torch.zeros(10, 4))
    assert torch.equal(precision.dense(), torch.eye(4, dtype=torch.float64))
