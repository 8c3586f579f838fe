"""`quadratic_distance` against the Bayes precision, near its centres, and its errors."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.statistics import BayesPrecision
from pysteer.ops import Case, get
from pysteer.ops.quadratic_distance import quadratic_distance


def test_both_forms_of_a_bayes_precision() -> None:
    residuals = torch.randn(20, 48, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 48)
    precision = BayesPrecision.fit(residuals)
    x, centre = torch.randn(3, 9, 48), torch.randn(4, 48)
    expected = torch.stack([precision.squared_distance(x, m) for m in centre], -1)
    factor, scale = precision.low_rank().float(), torch.tensor([precision.scale])
    thin = quadratic_distance(x, centre, factor, scale)
    dense = quadratic_distance(x, centre, precision=precision.dense().float())
    torch.testing.assert_close(thin.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-4, atol=1e-5)
    own = quadratic_distance(x, centre, factor.expand(4, -1, -1).contiguous(), scale.expand(4).contiguous())
    torch.testing.assert_close(own, thin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["low-rank", "per-cluster", "dense", "euclid"])
def test_a_large_common_part_costs_no_precision(kind: str) -> None:
    i = get("quadratic_distance").make_inputs(Case(2, 30, 64, options={"kind": kind}))
    near = quadratic_distance(**i)
    common = 512.0 + torch.arange(64)
    far = quadratic_distance(**{**i, "x": i["x"] + common, "centre": i["centre"] + common})
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


def test_a_token_on_its_centre() -> None:
    i = get("quadratic_distance").make_inputs(Case(2, 5, 64))
    i["x"] = i["centre"].unsqueeze(0).clone()
    squares = quadratic_distance(**i)[0]
    assert (squares.diagonal() >= 0).all()
    assert (squares.diagonal() < 1e-3).all()
    assert (squares + 9 * torch.eye(5) > 1).all()


@pytest.mark.parametrize("kind", ["low-rank", "per-cluster"])
def test_many_tokens_are_done_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:

    i = get("quadratic_distance").make_inputs(Case(3, 50, 32, torch.bfloat16, "channels_first", options={"kind": kind}))
    whole = quadratic_distance(**i)
    monkeypatch.setattr(sys.modules["pysteer.ops.quadratic_distance"], "_CHUNK", 32 * 7)
    torch.testing.assert_close(quadratic_distance(**i), whole)


def test_gradient_in_the_banks() -> None:
    i = get("quadratic_distance").make_inputs(Case(2, 5, 6))
    banks: dict[str, Tensor] = {name: i[name].clone().requires_grad_() for name in ("centre", "factor", "scale")}
    quadratic_distance(**{**i, **banks}).sum().backward()
    assert all(bank.grad is not None and (bank.grad != 0).any() for bank in banks.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centre": torch.zeros(5, 4)}, r"centre: got 'float32 \[5, 4\] on cpu'; allowed: float32 \[5, 6\]"),
        ({"centre": torch.zeros(0, 6)}, "centre: got"),
        ({"centre": torch.zeros(5, 6).double()}, "centre: got 'float64"),
        ({"factor": torch.zeros(3, 5)}, "factor: got"),
        ({"factor": torch.zeros(4, 3, 6)}, r"factor: got 'float32 \[4, 3, 6\] on cpu'; allowed: float32 \[3, 6\] or"),
        ({"scale": torch.zeros(3)}, r"scale: got .* allowed: float32 \[1\] or \[5\]"),
        ({"precision": torch.zeros(6, 6)}, "precision: got 'given with factor'"),
        ({"factor": None, "precision": torch.zeros(6, 5)}, "precision: got"),
        ({"x": torch.zeros(2, 3, 6, dtype=torch.int32)}, "dtype of x"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("quadratic_distance").make_inputs(Case(2, 3, 6))
    with pytest.raises(InputError, match=message):
        quadratic_distance(**{**i, **change})
