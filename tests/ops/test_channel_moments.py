"""`channel_moments`: every statistic by its formula, large means, odd values, merging, memory."""

import math
from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS

from pysteer.errors import InputError
from pysteer.ops import backend
from pysteer.ops.channel_moments import ChannelMoments, channel_moments, empty_moments, merge_moments

NAMES = pytest.mark.parametrize("name", CPU_VARIANTS)


@NAMES
def test_formula(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 40, generator=generator).relu()
    with backend(name):
        found = ChannelMoments.of(channel_moments(x, eps=0.1, channel_dim=1))
    values = x.transpose(0, 1).reshape(5, 120).double()
    assert torch.equal(found.count, torch.full((5,), 120.0, dtype=torch.float64))
    torch.testing.assert_close(found.mean, values.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.variance(), values.var(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.std(0), values.std(1, correction=0), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.minimum, values.amin(1))
    assert torch.equal(found.maximum, values.amax(1))
    torch.testing.assert_close(found.mean_abs, values.abs().mean(1), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.near_zero, (values.abs() < 0.1).sum(1).double())
    assert torch.equal(found.zero_fraction(), (values == 0).double().mean(1))
    assert (found.near_zero > found.zero).any()


@NAMES
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("mean", [1e4, -300.0])
def test_variance_of_values_far_from_zero(name: str, channel_dim: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 33, 1700, generator=generator) + mean
    x = x if channel_dim == 1 else x.transpose(1, 2).contiguous()
    with backend(name):
        found = ChannelMoments.of(channel_moments(x, channel_dim=channel_dim))
    values = x.double().movedim(channel_dim, 0).flatten(1)
    torch.testing.assert_close(found.variance(), values.var(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.mean, values.mean(1), rtol=1e-7, atol=0)


@NAMES
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_one_sign_and_outliers(name: str, channel_dim: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(2, 70, 70, generator=generator) + 0.5
    x.select(channel_dim, 1).neg_()
    x.select(channel_dim, 2).fill_(-0.0)
    x[0, 0, 0] = 1e5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.clamp_max(6e4).to(dtype)
        with backend(name):
            found = ChannelMoments.of(channel_moments(y, channel_dim=channel_dim))
        values = y.double().movedim(channel_dim, 0).flatten(1)
        assert torch.equal(found.minimum, values.amin(1))
        assert torch.equal(found.maximum, values.amax(1))
        torch.testing.assert_close(found.m2, values.var(1, correction=0) * values.shape[1], rtol=1e-5, atol=1e-9)
        assert found.zero.tolist()[:4] == [0, 0, values.shape[1], 0]


@NAMES
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_values(name: str, channel_dim: int, dtype: torch.dtype) -> None:
    x = torch.ones(2, 50, 50, dtype=dtype)
    place = (lambda d: (1, d, 45)) if channel_dim == 1 else (lambda d: (1, 45, d))
    for d, value in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        x[place(d)] = value
    x[place(4)], x[place(5)] = 3e38, 1e-40
    with backend(name):
        found = ChannelMoments.of(channel_moments(x, channel_dim=channel_dim, eps=1e-6))
    assert found.count.eq(100).all()
    for row in (found.mean, found.m2, found.minimum, found.maximum, found.mean_abs):
        assert row[:2].isnan().all()
        assert row[6:].isfinite().all()
    assert found.mean[2:4].tolist() == [math.inf, -math.inf]
    assert found.m2[2:4].isnan().all()
    assert (found.minimum[3], found.maximum[2], found.mean_abs[3]) == (-math.inf, math.inf, math.inf)
    assert float(found.maximum[4]) == float(x[place(4)])
    assert found.near_zero[:7].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert found.zero.sum() == 0
    if name == "cpu":
        assert float(found.mean[4]) == pytest.approx(3e36, rel=1e-2)
        assert math.isfinite(found.m2[4])


@NAMES
def test_merging_is_seeing_all_at_once(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 12, 30, generator=generator) * 3 + 5
    total = empty_moments(12)
    with backend(name):
        whole = channel_moments(x, channel_dim=1, eps=0.5)
        parts = [channel_moments(part, channel_dim=1, eps=0.5) for part in x.split([1, 3, 2])]
        for part in x.split([1, 3, 2]):
            assert channel_moments(part, channel_dim=1, eps=0.5, into=total) is total
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(merge_moments(merge_moments(parts[0], parts[1]), parts[2]), whole, rtol=1e-6, atol=1e-9)
    assert torch.equal(merge_moments(empty_moments(12), whole), whole)
    assert torch.equal(merge_moments(whole, empty_moments(12)), whole)
    assert torch.equal(merge_moments(empty_moments(3), empty_moments(3)), empty_moments(3))


def test_accumulating_in_a_compiled_graph() -> None:
    x = torch.randn(4, 6, 50)
    total, eager = empty_moments(6), empty_moments(6)

    def step(x: torch.Tensor) -> torch.Tensor:
        channel_moments(x, channel_dim=1, into=total)
        return x * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(x)
        channel_moments(x, channel_dim=1, into=eager)
    torch.testing.assert_close(total, eager)
    assert total[0].eq(3 * 4 * 50).all()


def test_activations_that_need_a_gradient() -> None:
    x = torch.randn(2, 6, 50, requires_grad=True)
    total = empty_moments(6)
    channel_moments(x, channel_dim=1, into=total)
    assert not total.requires_grad
    assert torch.equal(total, channel_moments(x, channel_dim=1))


def test_no_values() -> None:
    assert torch.equal(channel_moments(torch.zeros(0, 4, 7)), empty_moments(7))
    assert torch.equal(channel_moments(torch.zeros(3, 0, 7)), empty_moments(7))
    found = ChannelMoments.of(channel_moments(torch.zeros(1, 1, 7)))
    assert found.variance().isnan().all()
    assert found.variance(0).eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"eps": math.nan}, "eps: got nan"),
        ({"x": torch.zeros(3)}, r"shape of x: got \[3\]"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "dtype of x"),
        ({"into": torch.zeros(8, 5, dtype=torch.float64)}, r"into: got 'torch.float64 \[8, 5\]"),
        ({"into": torch.zeros(8, 6)}, r"into: got 'torch.float32 \[8, 6\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        channel_moments(**{"x": torch.zeros(2, 3, 6), **change})
