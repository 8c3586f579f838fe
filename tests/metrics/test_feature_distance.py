import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from pysteer.errors import InputError
from pysteer.metrics import frechet_distance, kernel_distance


def draw(n, d, seed, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99)) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix * scale + shift


def textbook(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)


def test_frechet_equals_the_textbook_formula():
    a, b = draw(400, 24, 0), draw(300, 24, 1, shift=0.3, scale=1.4)
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-8)


def test_frechet_of_one_dimension_has_a_closed_form():
    a, b = draw(50, 1, 0), draw(70, 1, 1, shift=2.0, scale=3.0)
    want = (a.double().mean() - b.double().mean()) ** 2 + (a.double().std() - b.double().std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-10)


def test_frechet_is_exact_with_fewer_rows_than_features():
    a = draw(20, 64, 0)
    assert frechet_distance(a, a) == 0.0
    # The same deviations about another mean: only the mean term is left.
    assert frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)


def test_kernel_distance_equals_the_double_sum():
    a, b = draw(9, 5, 0).double(), draw(7, 5, 1, shift=0.5).double()

    def k(x, y):
        return float((x @ y / 5 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(9) for j in range(9) if i != j) / 72
    within_b = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(k(x, y) for x in a for y in b) / 63
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-10)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [kernel_distance(draw(30, 8, s), draw(30, 8, s + 500)) for s in range(200)]
    moved = [kernel_distance(draw(30, 8, s), draw(30, 8, s + 500, shift=0.5)) for s in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5
    assert min(same) < 0 < np.mean(moved)
    assert np.mean(moved) > 10 * abs(np.mean(same))


@pytest.mark.parametrize("bad", [torch.zeros(1, 4), torch.zeros(5), torch.zeros(5, 3), torch.full((5, 4), torch.nan)])
def test_bad_features_are_named(bad):
    with pytest.raises(InputError):
        frechet_distance(torch.randn(6, 4), bad)
