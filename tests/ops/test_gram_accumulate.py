"""`gram_accumulate` and `row_gram` against the covariance itself: large means, streams, panels, errors."""

from typing import Any

import pytest
import torch

from pysteer.errors import InputError
from pysteer.ops.gram_accumulate import Gram, empty_gram, gram_accumulate, merge_grams, row_gram


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("shape", [(3, 1700, 20), (40, 300, 20), (2, 9000, 3), (50, 20)])
def test_covariance_of_values_far_from_zero(shape: tuple[int, ...], channel_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) + 1e4
    vectors = x.flatten(0, -2).double()
    given = x if channel_dim == -1 or x.dim() == 2 else x.transpose(1, 2).contiguous()
    found = gram_accumulate(given, channel_dim=channel_dim)
    assert float(found.number) == len(vectors)
    torch.testing.assert_close(found.mean, vectors.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance(), vectors.T.cov(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.second_moment(), vectors.T @ vectors, rtol=1e-9, atol=0)


@pytest.mark.parametrize("width", [767, 768, 1600])
def test_panels_of_wide_matrices(width: int) -> None:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(1))
    found = gram_accumulate(x).scatter
    torch.testing.assert_close(found, x.double().T.cov() * 49, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_a_stream_is_one_set() -> None:
    x = torch.randn(9, 31, 12, generator=torch.Generator().manual_seed(2)) + torch.arange(9.0).reshape(9, 1, 1)
    whole, total = gram_accumulate(x), empty_gram(12)
    for part in x.split([2, 4, 3]):
        assert gram_accumulate(part, into=total) is total
    merged = merge_grams(merge_grams(empty_gram(12), gram_accumulate(x[:4])), gram_accumulate(x[4:]))
    for each in (total, merged):
        torch.testing.assert_close(tuple(each), tuple(whole), rtol=1e-6, atol=1e-4)
    assert merge_grams(empty_gram(2), empty_gram(2)).mean.eq(0).all()


def test_accumulating_in_a_compiled_graph() -> None:
    x, total = torch.randn(4, 6, 8), empty_gram(8)

    def step(x: torch.Tensor) -> torch.Tensor:
        gram_accumulate(x, into=total)
        return x * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x)
    expected = gram_accumulate(torch.cat([x, x]))
    torch.testing.assert_close(tuple(total), tuple(expected), rtol=1e-5, atol=1e-4)


def test_autocast_does_not_lower_the_precision() -> None:
    x = torch.randn(4, 60, 8)
    plain = gram_accumulate(x).scatter
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_accumulate(x).scatter, plain)


@pytest.mark.parametrize("standardise", [False, True])
def test_rows_in_blocks_of_columns(standardise: bool) -> None:
    x = torch.randn(30, 500, generator=torch.Generator().manual_seed(3)) + 100
    x[:, 7] = 3.0
    total = torch.zeros(30, 30, dtype=torch.float64)
    for part in x.split([100, 150, 250], 1):
        row_gram(part, into=total, standardise=standardise)
    centred = x.double() - x.double().mean(0)
    if standardise:
        centred = centred / centred.square().mean(0).sqrt().clamp_min(1e-30)
    torch.testing.assert_close(total, centred @ centred.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(row_gram(x, centre=False), x.double() @ x.double().T, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, "shape of x"),
        ({"into": empty_gram(5)}, r"mean of into: got 'torch.float64 \[5\]"),
        ({"into": Gram(*(each.float() for each in empty_gram(6)))}, "number of into: got 'torch.float32"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gram_accumulate(**{"x": torch.zeros(2, 3, 6), **change})
    with pytest.raises(InputError, match=r"x: got \[2, 3, 6\]"):
        row_gram(torch.zeros(2, 3, 6))
    with pytest.raises(InputError, match="into: got"):
        row_gram(torch.zeros(2, 3), into=torch.zeros(3, 3, dtype=torch.float64))
