"""`norm_affine` against torch's own norms followed by `affine_shift`, and rows that the table leaves alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import CPU_VARIANTS, active_mask, bits
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, get
from pysteer.ops.affine_shift import affine_shift
from pysteer.ops.norm_affine import norm_affine

KINDS = {"rms": "tokens", "gemma": "tokens", "layer": "channels_last", "bare": "rows", "group": "channels_first"}


def inputs_of(variant: str, layout: str | None = None, **more: Any) -> dict[str, Any]:
    spec = get("norm_affine")
    layout = layout or KINDS[variant]
    tokens = 1 if layout == "rows" else 70
    return spec.make_inputs(Case(5, tokens, 66, layout=layout, span=True, options=spec.variants[variant], **more))


def norm_of(i: dict[str, Any]) -> Tensor:
    """Torch's norm, in fp32."""
    x, weight, shape = i["x"].float(), i.get("weight"), i["x"].shape
    if i["kind"] == "group":
        moved = x.movedim(i["channel_dim"], 1)
        return F.group_norm(moved, i["groups"], weight, i["norm_bias"]).movedim(1, i["channel_dim"])
    x = x.movedim(i["channel_dim"], -1)
    if i["kind"] == "rms":
        weight = weight + 1 if i.get("plus_one") else weight
        y = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    else:
        y = F.layer_norm(x, x.shape[-1:], weight, i.get("norm_bias"))
    return y.movedim(-1, i["channel_dim"]).reshape(shape)


@pytest.mark.parametrize("variant", list(KINDS))
@pytest.mark.parametrize("layout", ["tokens", "channels_first", "channels_last"])
def test_is_the_norm_then_the_shift(variant: str, layout: str) -> None:
    i = inputs_of(variant, layout)
    table = {name: i[name] for name in ("gain", "bias", "slot", "strength", "clock", "span", "channel_dim")}
    plain = norm_of(i)
    expected = affine_shift(plain, **table)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(norm_affine(**i), expected, rtol=1e-4, atol=1e-5)
    off = norm_affine(**{**i, "strength": torch.zeros_like(i["strength"])})
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("variant", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_left_alone_has_the_bits_of_an_empty_table(name: str, variant: str, dtype: torch.dtype) -> None:
    i = inputs_of(variant, dtype=dtype)
    active = active_mask(i)
    with backend(name):
        y = norm_affine(**i)
        empty = norm_affine(**{**i, "slot": torch.zeros_like(i["slot"])})
        off = norm_affine(**{**i, "strength": torch.zeros_like(i["strength"])})
        alone = norm_affine(**{**i, "x": i["x"][1:2], "slot": i["slot"][:, 1:2].contiguous(),
                               "strength": i["strength"][:, 1:2].contiguous(), "span": i["span"][1:2]})  # fmt: skip
    assert 0.1 < active.float().mean() < 0.9
    assert torch.equal(bits(y)[~active], bits(empty)[~active])
    assert torch.equal(bits(off), bits(empty))
    assert (y != empty)[active].float().mean() > 0.8
    assert torch.equal(alone[0], y[1])


@pytest.mark.parametrize("variant", ["layer", "group"])
def test_large_means_cost_no_precision(variant: str) -> None:
    i = inputs_of(variant)
    i["x"].add_(1000.0)
    truth = get("norm_affine").reference(**{**i, "x": i["x"].double()})
    torch.testing.assert_close(norm_affine(**i).double(), truth, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("variant", ["rms", "layer", "group"])
def test_large_results_past_the_caches(variant: str) -> None:
    spec = get("norm_affine")
    layout = "channels_first" if variant == "group" else "tokens"
    i = spec.make_inputs(Case(2, 9000, 1024, torch.bfloat16, layout, "one", options=spec.variants[variant]))
    y = norm_affine(**i)
    norm_affine(**i, out=i["x"])
    assert torch.equal(y, i["x"])


def test_images_keep_their_memory_format() -> None:
    i = inputs_of("group")
    flat = norm_affine(**i)
    for memory in (torch.contiguous_format, torch.channels_last):
        image = i["x"].reshape(5, 66, 7, 10).to(memory_format=memory)
        y = norm_affine(**{**i, "x": image})
        assert y.is_contiguous(memory_format=memory)
        torch.testing.assert_close(y.reshape(5, 66, 70), flat, rtol=1e-5, atol=1e-5)


def test_gradient_in_the_parameters() -> None:
    i = inputs_of("layer")
    for name in ("weight", "norm_bias", "gain", "bias", "strength"):
        leaf = i[name].clone().requires_grad_()
        norm_affine(**{**i, name: leaf}).square().sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad != 0).any()


@pytest.mark.parametrize("variant", list(KINDS))
def test_second_derivative(variant: str) -> None:
    spec = get("norm_affine")
    i = spec.make_inputs(
        Case(2, 1 if variant == "bare" else 3, 4, layout=KINDS[variant], options=spec.variants[variant])
    )
    x = i.pop("x").double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: norm_affine(x, **i), (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "batch"}, "kind: got 'batch'; allowed: rms, layer, group"),
        ({"kind": "group", "groups": 5}, "groups: got 5; allowed: a divisor of the width 66"),
        ({"kind": "group", "groups": 0}, "groups: got 0"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"weight": torch.ones(65)}, r"weight: got 'float32 \[65\] on cpu'; allowed: floating point \[66\]"),
        ({"norm_bias": torch.ones(66, dtype=torch.int32)}, "norm_bias: got 'int32"),
        ({"gain": torch.zeros(4, 65)}, "gain: got"),
        ({"x": torch.zeros(5, 70, 66, dtype=torch.int32)}, "dtype of x"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        norm_affine(**{**inputs_of("rms"), **change})


def test_out_with_gradient_is_refused() -> None:
    i = inputs_of("rms")
    i["x"].requires_grad_()
    with pytest.raises(InputError, match="out"):
        norm_affine(**i, out=torch.empty_like(i["x"]))
