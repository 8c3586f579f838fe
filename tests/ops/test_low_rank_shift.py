"""`low_rank_shift` against its formula written out, the maps it stands for, large ranks, errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, get
from pysteer.ops.low_rank_shift import low_rank_shift

NAMES = pytest.mark.parametrize("name", CPU_VARIANTS)


def table(rows: int, strength: float = 1.0) -> dict[str, Tensor]:
    """A table that steers all rows with set 1."""
    return {
        "slot": torch.ones(1, rows, dtype=torch.int32),
        "strength": torch.full((1, rows), strength),
        "clock": torch.tensor(0),
    }


def bank(of_set_one: Tensor) -> Tensor:
    """A bank whose set 1 this is."""
    return torch.stack([torch.full_like(of_set_one, torch.nan), of_set_one])


@NAMES
def test_formula(name: str) -> None:
    i = get("low_rank_shift").make_inputs(Case(4, 5, 6, span=True))
    expected, step = i["x"].clone(), int(i["clock"])
    for row in range(4):
        which, s = int(i["slot"][step, row]), float(i["strength"][step, row])
        for token in range(*i["span"][row].tolist()):
            if which and s and token < 5:
                x = i["x"][row, token]
                shift = i["bias"][which].clone()
                for v, u in zip(i["read"][which], i["write"][which], strict=True):
                    shift += float(v @ x) * u
                expected[row, token] += s * shift
    assert not torch.equal(expected, i["x"])
    with backend(name):
        torch.testing.assert_close(low_rank_shift(**i), expected)


@NAMES
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_full_matrix_transport(name: str, channel_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    width = 40
    x = torch.randn(2, 77, width, generator=generator)
    matrix = torch.randn(width, width, generator=generator) / width**0.5
    target = torch.randn(width, generator=generator)
    u, values, v = torch.linalg.svd(matrix - torch.eye(width))
    given = x if channel_dim == -1 else x.transpose(1, 2).contiguous()
    with backend(name):
        y = low_rank_shift(given, bank(v), bank((u * values).T), bank(target), **table(2), channel_dim=channel_dim)
    y = y if channel_dim == -1 else y.transpose(1, 2)
    torch.testing.assert_close(y, x @ matrix.T + target, rtol=1e-4, atol=1e-5)


@NAMES
def test_erasing_projecting_and_replacing(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 50, 24, generator=generator)
    basis = torch.linalg.qr(torch.randn(24, 3, generator=generator)).Q.T.contiguous()
    none = bank(torch.zeros(24))
    with backend(name):
        erased = low_rank_shift(x, bank(basis), bank(-basis), none, **table(3))
        mirrored = low_rank_shift(x, bank(basis), bank(-basis), none, **table(3, 2.0))
        replaced = low_rank_shift(x, bank(basis[:1]), bank(basis[1:2] - basis[:1]), none, **table(3))
    torch.testing.assert_close(erased @ basis.T, torch.zeros(3, 50, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored @ basis.T, -(x @ basis.T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(replaced @ basis[0], torch.zeros(3, 50), rtol=0, atol=1e-5)
    torch.testing.assert_close(replaced @ basis[1], x @ (basis[0] + basis[1]), rtol=1e-4, atol=1e-5)


def test_ranks_above_those_of_the_kernels() -> None:
    spec = get("low_rank_shift")
    i = spec.make_inputs(Case(2, 5, 80, strength="one", sizes={"rank": 65}))
    assert spec.implementation(**i) == "reference"
    torch.testing.assert_close(low_rank_shift(**i), spec.reference(**i))


def test_second_derivative() -> None:
    i = get("low_rank_shift").make_inputs(Case(3, 4, 5))
    x = i.pop("x").double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: low_rank_shift(x, **i).square(), (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": torch.zeros(4, 4, 5)}, r"read: got 'float32 \[4, 4, 5\]"),
        ({"write": torch.zeros(4, 3, 6)}, r"write: got 'float32 \[4, 3, 6\]"),
        ({"bias": torch.zeros(4, 5)}, r"bias: got 'float32 \[4, 5\]"),
        ({"bias": torch.zeros(3, 6)}, "parameter sets in bias: got 3"),
        ({"read": torch.zeros(4, 6)}, "read: got"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("low_rank_shift").make_inputs(Case(3, 8, 6))
    with pytest.raises(InputError, match=message):
        low_rank_shift(**{**i, **change})
