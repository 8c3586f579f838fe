"""`linear_shift` against a linear layer followed by `affine_shift`, its epilogue, and what the table leaves alone."""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import bits

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.affine_shift import affine_shift
from pysteer.ops.linear_shift import linear_shift

INTERPRETED = backend_status()["triton"].live and os.environ.get("TRITON_INTERPRET") == "1"
TABLE = ("gain", "bias", "slot", "strength", "clock", "span")


def inputs_of(**more: Any) -> dict[str, Any]:
    return get("linear_shift").make_inputs(Case(5, 9, 40, span=True, **more))


def test_is_the_layer_then_the_shift() -> None:
    i = inputs_of()
    for extra in (i["linear_bias"], None):
        plain = F.linear(i["x"], i["weight"], extra)
        expected = affine_shift(plain, **{name: i[name] for name in TABLE})
        assert not torch.equal(expected, plain)
        assert torch.equal(linear_shift(**{**i, "linear_bias": extra}), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 64), (3, 70, 96), (2, 20, 50)], ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    i = get("linear_shift").make_inputs(Case(*shape, dtype, span=True, sizes={"outputs": 75}))
    table = {name: i[name] for name in TABLE}
    wide = {name: i[name].double() for name in ("x", "weight", "linear_bias")}
    right = affine_shift(F.linear(wide["x"], wide["weight"], wide["linear_bias"]), **table).to(dtype)
    twice = affine_shift(F.linear(i["x"], i["weight"], i["linear_bias"]), **table)
    y = linear_shift(**i)
    assert (y == right).float().mean() > 0.995  # fp32 sums next to a tie
    assert (twice == right).float().mean() < 0.95
    out = torch.empty(*shape[:2], 75, dtype=dtype)
    assert torch.equal(linear_shift(**i, out=out), y)
    alone = {**i, "x": i["x"][1:2], **{name: i[name][:, 1:2] for name in ("slot", "strength")}, "span": i["span"][1:2]}
    torch.testing.assert_close(linear_shift(**alone), y[1:2])


def test_what_is_left_alone_has_the_bits_of_an_empty_table() -> None:
    for name in [None, "reference", *(["triton"] if INTERPRETED else [])]:
        i = inputs_of()
        step = int(i["clock"])
        with backend(name):
            y = linear_shift(**i)
            empty = linear_shift(**{**i, "slot": torch.zeros_like(i["slot"])})
            off = linear_shift(**{**i, "strength": torch.zeros_like(i["strength"])})
        active = (i["slot"][step, :5] != 0) & (i["strength"][step, :5] != 0)
        assert active.tolist() == [True, True, False, False, True]
        assert torch.equal(bits(y)[~active], bits(empty)[~active])
        assert torch.equal(bits(off), bits(empty))
        tokens = torch.arange(9)
        inside = (tokens >= i["span"][:5, :1]) & (tokens < i["span"][:5, 1:])
        assert torch.equal(bits(y)[~inside], bits(empty)[~inside])
        assert (y != empty)[active[:, None] & inside].float().mean() > 0.9


@pytest.mark.skipif(not INTERPRETED, reason="the Triton interpreter is for machines without a GPU")
def test_epilogue_of_tiles_that_hold_several_rows() -> None:
    spec = get("linear_shift")
    for tokens, width, outputs in ((1, 20, 70), (30, 70, 5), (90, 33, 65)):
        i = spec.make_inputs(Case(5, tokens, width, span=True, sizes={"outputs": outputs}))
        with backend("triton"):
            assert spec.implementation(**i) == "triton"
            y = linear_shift(**i)
            i["slot"][:, 1] = 99
            assert linear_shift(**i)[1].isnan().any()
        i["slot"][:, 1] = 1
        with backend("triton"):
            y = linear_shift(**i)
        torch.testing.assert_close(y, spec.reference(**i), rtol=1e-5, atol=1e-5)


def test_into_another_tensor() -> None:
    i = inputs_of()
    y = linear_shift(**i)
    for out in (torch.full((5, 9, 72), torch.nan), torch.full((5, 72, 9), torch.nan).transpose(1, 2)):
        assert linear_shift(**i, out=out) is out
        torch.testing.assert_close(out, y)


def test_autocast_does_not_lower_the_precision() -> None:
    i = inputs_of()
    plain = linear_shift(**i)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_shift(**i), plain)


def test_gradient_in_the_parameters_of_the_shift() -> None:
    i = inputs_of()
    for name in ("gain", "bias", "strength"):
        leaf = i[name].clone().requires_grad_()
        linear_shift(**{**i, name: leaf}).square().sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad != 0).any()


def test_gradient_of_a_frozen_layer() -> None:
    i = inputs_of()
    i["x"].requires_grad_()
    linear_shift(**i).sum().backward()
    assert i["x"].grad is not None
    assert i["weight"].grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(72, 41)}, r"weight: got 'float32 \[72, 41\] on cpu'; allowed: float32 \['N', 40\]"),
        ({"weight": torch.zeros(72, 40, dtype=torch.bfloat16)}, "weight: got 'bfloat16"),
        ({"linear_bias": torch.zeros(40)}, r"linear_bias: got 'float32 \[40\]"),
        ({"gain": torch.zeros(4, 40)}, r"gain: got 'float32 \[4, 40\] on cpu'; allowed: .*72"),
        ({"out": torch.zeros(5, 9, 40)}, r"out: got 'float32 \[5, 9, 40\]"),
        ({"slot": torch.zeros(3, 4, dtype=torch.int32), "strength": torch.zeros(3, 4)}, "rows of x: got 5"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_shift(**{**inputs_of(), **change})


def test_out_with_gradient_is_refused() -> None:
    i = inputs_of()
    i["weight"].requires_grad_()
    with pytest.raises(InputError, match="out"):
        linear_shift(**i, out=torch.empty(5, 9, 72))
