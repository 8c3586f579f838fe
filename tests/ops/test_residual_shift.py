"""`residual_shift` against the steps it replaces, and rows that the table leaves alone."""

from typing import Any

import pytest
import torch
from checking import active_mask, bits

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.affine_shift import affine_shift
from pysteer.ops.residual_shift import residual_shift

LAYOUTS = ["tokens", "channels_first", "channels_last"]
BACKENDS = ["cpu", "reference"] if backend_status()["cpu"].live else ["reference"]


def inputs_of(**more: Any) -> dict[str, Any]:
    return get("residual_shift").make_inputs(Case(5, 70, 67, span=True, **more))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_shift_then_the_residual(layout: str) -> None:
    i = inputs_of(layout=layout)
    table = {name: i[name] for name in ("gain", "bias", "slot", "strength", "clock", "span", "channel_dim")}
    shape = [1] * i["x"].dim()
    shape[0], shape[i["channel_dim"]] = 5, 67
    shifted = affine_shift(i["f"], **table)
    assert not torch.equal(shifted, i["f"])
    torch.testing.assert_close(residual_shift(**i), i["x"] + i["gate"].reshape(shape) * shifted)
    torch.testing.assert_close(residual_shift(**{**i, "gate": None}), i["x"] + shifted)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_left_alone_has_the_bits_of_an_empty_table(name: str, layout: str, dtype: torch.dtype) -> None:
    i = inputs_of(layout=layout, dtype=dtype)
    i["f"][0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])[:, *[None] * (i["f"].dim() - 2)].to(dtype)
    active = active_mask(i)
    with backend(name):
        y = residual_shift(**i)
        empty = residual_shift(**{**i, "slot": torch.zeros_like(i["slot"])})
        off = residual_shift(**{**i, "strength": torch.zeros_like(i["strength"])})
    assert 0.1 < active.float().mean() < 0.9
    assert torch.equal(bits(y)[~active], bits(empty)[~active])
    assert torch.equal(bits(off), bits(empty))
    assert (y != empty)[active].float().mean() > 0.8


def test_one_rounding_of_the_fp32_sum() -> None:
    i = inputs_of(dtype=torch.bfloat16, strength="zero")
    y = residual_shift(**{**i, "gate": None})
    assert torch.equal(y, (i["x"].float() + i["f"].float()).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_and_into_another_tensor(layout: str) -> None:
    i = inputs_of(layout=layout)
    y = residual_shift(**i)
    out = torch.full_like(i["x"], torch.nan)
    assert residual_shift(**i, out=out) is out
    assert torch.equal(out, y)
    residual_shift(**i, out=i["x"])
    assert torch.equal(i["x"], y)


def test_gates_of_other_types_and_strides() -> None:
    i = inputs_of()
    six = torch.randn(5, 6, 67, dtype=torch.float64)
    i["gate"] = six[:, 2]
    torch.testing.assert_close(residual_shift(**i), get("residual_shift").reference(**{**i, "gate": six[:, 2].float()}))


def test_large_results_past_the_caches() -> None:
    for layout in ("tokens", "channels_first"):
        case = Case(2, 9000, 1024, torch.bfloat16, layout, "one")
        i = get("residual_shift").make_inputs(case)
        y = residual_shift(**i)
        residual_shift(**i, out=i["x"])
        assert torch.equal(y, i["x"])


def test_gradient_in_the_gate_and_the_parameters() -> None:
    i = inputs_of()
    for name in ("gate", "gain", "bias", "strength"):
        leaf = i[name].clone().requires_grad_()
        residual_shift(**{**i, name: leaf}).square().sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad != 0).any()


def test_16_bit_branches_get_16_bit_gradients() -> None:
    i = inputs_of()
    x, f = i["x"].requires_grad_(), i["f"].bfloat16().requires_grad_()
    residual_shift(**{**i, "x": x, "f": f}).sum().backward()
    assert f.grad is not None
    assert f.grad.dtype is torch.bfloat16
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f": torch.zeros(5, 70, 66)}, r"f: got 'float32 \[5, 70, 66\]"),
        ({"f": torch.zeros(5, 70, 67, dtype=torch.int32)}, "f: got 'int32"),
        ({"gate": torch.zeros(5, 66)}, r"gate: got 'float32 \[5, 66\] on cpu'; allowed: floating point \[5, 67\]"),
        ({"gate": torch.zeros(5, 1, 67)}, "gate: got"),
        ({"gain": torch.zeros(4, 66)}, "gain: got"),
        ({"out": torch.zeros(5, 70, 66)}, "out: got"),
        ({"clock": torch.tensor(9)}, "clock: got 9"),
        ({"slot": torch.full((3, 7), 4, dtype=torch.int32)}, "slot: got 4; allowed: 0 to 3"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    fast = get("residual_shift").implementation(**inputs_of()) != "reference"
    if not fast and {"clock", "slot"} & set(change):
        pytest.skip("plain torch has its own words for what is outside the table")
    with pytest.raises(InputError, match=message):
        residual_shift(**{**inputs_of(), **change})


def test_out_with_gradient_is_refused() -> None:
    i = inputs_of()
    i["f"].requires_grad_()
    with pytest.raises(InputError, match="out"):
        residual_shift(**i, out=torch.empty_like(i["x"]))
