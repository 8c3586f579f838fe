"""Affine and linear transport: exact on affine data, least squares otherwise, optimal transport between Gaussians."""

import pytest
import torch
from applying import apply, normal
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.affine_transport import AffineTransport
from pysteer.methods.linear_transport import LinearTransport

WIDTH = 6


def moved(method: AffineTransport, fit, x: Tensor, strength: float = 1.0) -> Tensor:
    return apply(method.op, fit, x, strength)


@pytest.mark.parametrize("count", [4, 50])
def test_an_affine_map_of_low_rank_is_found(count: int) -> None:
    x = 3 * normal(count, WIDTH, 0) + 5
    u, v = normal(2, WIDTH, 1), normal(2, WIDTH, 2)
    y = x + (x @ v.T) @ u + normal(1, WIDTH, 3)
    method = AffineTransport(rank=2, ridge=0.0)
    fit = method.fit_site(x, y)
    assert fit.tensors["read"].shape == (2, WIDTH)
    torch.testing.assert_close(moved(method, fit, x), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved(method, fit, x, 0.5), (x + y) / 2, rtol=1e-4, atol=1e-4)


def slow_ridge(x: Tensor, shift: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the weighted ridge regression, from its normal equations."""
    share = weight / weight.sum()
    middle, away = share @ x, share @ shift
    xc, sc = x - middle, shift - away
    scatter = xc.T @ (weight[:, None] * xc)
    extra = ridge * scatter.trace() / (len(x) - 1)
    slope = torch.linalg.solve(scatter + extra * torch.eye(x.shape[1]).double(), xc.T @ (weight[:, None] * sc))
    return slope, away - middle @ slope


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_the_full_map_is_the_ridge_regression(count: int, weight: float | None) -> None:
    x, y = normal(count, WIDTH, 0) + 2, normal(count, WIDTH, 1).exp()
    others = None if weight is None else normal(3, WIDTH, 2) - 1
    method = AffineTransport(rank=None, ridge=0.7, negatives_weight=weight or 1.0)
    fit = method.fit_site(x, y, negatives=others)
    source, shift, weights = x.double(), (y - x).double(), torch.ones(count).double()
    if others is not None:
        source, shift = torch.cat((source, others.double())), torch.cat((shift, torch.zeros(3, WIDTH).double()))
        weights = torch.cat((weights, torch.full((3,), weight).double()))
    slope, bias = slow_ridge(source, shift, weights, 0.7)
    found = fit.tensors["read"].T.double() @ fit.tensors["write"].double()
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.tensors["bias"].double(), bias, rtol=1e-4, atol=1e-5)


def test_no_map_of_the_same_rank_fits_better() -> None:
    x, y = normal(60, WIDTH, 0), normal(60, WIDTH, 0) @ normal(WIDTH, WIDTH, 4) + normal(60, WIDTH, 5)
    method = AffineTransport(rank=2, ridge=0.0)
    best = (moved(method, method.fit_site(x, y), x) - y).square().sum()
    full = AffineTransport(rank=None, ridge=0.0).fit_site(x, y).tensors
    slope = full["read"].T @ full["write"]
    u, s, v = torch.linalg.svd(slope)  # truncated in the wrong metric: the slope instead of the shifts
    rough = x + (x - x.mean(0)) @ (u[:, :2] * s[:2] @ v[:2]) + (y - x).mean(0)
    assert best < (rough - y).square().sum()
    generator = torch.Generator().manual_seed(6)
    fit = method.fit_site(x, y)
    for _ in range(20):
        other = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in fit.tensors.items()}
        assert (moved(method, fit._replace(tensors=other), x) - y).square().sum() >= best - 1e-3


def test_unpaired_data_are_moved_to_the_target_gaussian() -> None:
    mix = normal(WIDTH, WIDTH, 7)
    x, y = normal(4000, WIDTH, 8) @ normal(WIDTH, WIDTH, 9), normal(3000, WIDTH, 10) @ mix + 4
    method = AffineTransport(rank=None, ridge=0.0)
    fit = method.fit_site(x, y, paired=False)
    z = moved(method, fit, x)
    torch.testing.assert_close(z.mean(0), y.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z.T.cov(), y.T.cov(), rtol=1e-3, atol=1e-3)
    slope = fit.tensors["read"].T @ fit.tensors["write"]
    torch.testing.assert_close(slope, slope.T, rtol=1e-3, atol=1e-4)  # the optimal one of all such maps
    assert torch.linalg.eigvalsh((slope + slope.T) / 2 + torch.eye(WIDTH))[0] > 0
    few = AffineTransport(rank=None).fit_site(x[:3], y[:3], paired=False)
    assert moved(method, few, x).std(0).max() < 2 * max(x.std(0).max(), y.std(0).max())  # three samples stretch nothing


def test_negatives_of_unpaired_data_stay() -> None:
    x, y = normal(300, WIDTH, 11), normal(300, WIDTH, 12) + 2
    others = normal(300, WIDTH, 13) + 6 * torch.eye(WIDTH)[0]
    fits = [AffineTransport(rank=None).fit_site(x, y, negatives=each, paired=False) for each in (None, others)]
    away = [(moved(AffineTransport(), fit, others) - others).norm(dim=1).mean() for fit in fits]
    assert away[1] < 0.5 * away[0]


def test_the_shift_of_the_mean() -> None:
    x = normal(5, 4 * WIDTH, 14).view(5, 4, WIDTH)
    y = x + x.mean(1, keepdim=True) * 0.5 + 1
    method = AffineTransport(rank=None, ridge=0.0, pooled=True, of_mean=True)
    fit = method.fit_site(torch.cat((x, 2 * x)), torch.cat((y, 2 * x + x.mean(1, keepdim=True) + 1)))
    torch.testing.assert_close(moved(method, fit, x), y, rtol=1e-4, atol=1e-4)


def test_linear_transport_has_the_slope_of_the_pairs() -> None:
    x = normal(30, WIDTH, 15)
    fit = LinearTransport().fit_site(x, 2 * x + 1)
    torch.testing.assert_close(apply("affine_shift", fit, x), 2 * x + 1, rtol=1e-5, atol=1e-5)
    published = LinearTransport(published_slope=True).fit_site(x, 2 * x + 1)
    torch.testing.assert_close(published.tensors["gain"], torch.full((WIDTH,), 0.5))
    y = x + normal(30, WIDTH, 16)
    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    gain = float((xc * yc).sum() / xc.square().sum())
    assert LinearTransport().fit_site(x, y).tensors["gain"][0].item() == pytest.approx(gain, rel=1e-5)
    with pytest.raises(InputError, match="unpaired"):
        LinearTransport().fit_site(x, y, paired=False)


def test_bad_options() -> None:
    for bad in ({"rank": 0}, {"rank": 1.5}, {"ridge": -1.0}, {"negatives_weight": float("nan")}):
        with pytest.raises(InputError, match="affine transport"):
            AffineTransport(**bad)
