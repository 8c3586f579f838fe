"""`sae_decode` against its formula written out: padding, repeated latents, mixed dtypes, gradients, errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.sae_decode import sae_decode

ALL = [*CPU_VARIANTS, *(["triton"] if backend_status()["triton"].live and not torch.cuda.is_available() else [])]
each_backend = pytest.mark.parametrize("name", ALL)


def inputs(**sizes: int) -> dict[str, Any]:
    return get("sae_decode").make_inputs(Case(3, 7, 48, sizes={"latents": 11, "k": 5, **sizes}))


@each_backend
def test_is_the_dense_product(name: str) -> None:
    i = inputs()
    dense = torch.zeros(3, 7, 12).scatter_add_(-1, i["indices"].long() % 12, i["values"])[..., :11]  # -1 goes to 11
    with backend(name):
        torch.testing.assert_close(sae_decode(**i), dense @ i["decoder"] + i["bias"] + i["residual"])
        i["bias"] = i["residual"] = None
        torch.testing.assert_close(sae_decode(**i), dense @ i["decoder"])


@each_backend
def test_padding_is_never_looked_at(name: str) -> None:
    i = inputs()
    i["values"][i["indices"] < 0] = torch.nan
    i["decoder"][0] = torch.inf
    i["indices"][i["indices"] == 0] = 1
    with backend(name):
        assert sae_decode(**i).isfinite().all()
        i["indices"].fill_(-1)
        assert torch.equal(sae_decode(**i), i["bias"] + i["residual"])
        assert (sae_decode(i["values"], i["indices"], i["decoder"]) == 0).all()


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_dtypes_may_differ(name: str) -> None:
    i = inputs(k=9)
    with backend(name):
        right = sae_decode(**i)
        mixed = {**i, "decoder": i["decoder"].bfloat16(), "bias": i["bias"].half()}
        wide = {key: value.float() if value.is_floating_point() else value for key, value in mixed.items()}
        assert sae_decode(**mixed).dtype is torch.float32
        torch.testing.assert_close(sae_decode(**mixed), sae_decode(**wide))
        mixed["residual"] = None
        assert sae_decode(**mixed).dtype is torch.bfloat16
        del i["residual"]
        i["values"] = i["values"].half()
        torch.testing.assert_close(sae_decode(**i), right - inputs()["residual"], rtol=1e-2, atol=1e-2)


@each_backend
def test_gradients_of_a_step_of_training(name: str) -> None:
    i = inputs(k=6)
    names = ("values", "decoder", "bias", "residual")
    weights = torch.randn(3, 7, 48)
    found = []
    for chosen in (name, "reference"):
        leaves = {each: i[each].clone().requires_grad_() for each in names}
        with backend(chosen):
            y = sae_decode(**{**i, **leaves})
            found.append(torch.autograd.grad((y.square() * weights).sum(), list(leaves.values())))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    unused = torch.ones(11, dtype=torch.bool)
    unused[i["indices"][i["indices"] >= 0].long()] = False
    assert (found[0][1][unused] == 0).all()


def test_second_derivative() -> None:
    i = {key: value.double() if value.is_floating_point() else value for key, value in inputs().items()}
    leaves = [i[name][..., :2].contiguous().requires_grad_() for name in ("values", "decoder")]
    indices = i["indices"][..., :2].contiguous()
    assert torch.autograd.gradgradcheck(lambda v, w: sae_decode(v, indices, w).square(), leaves)


@pytest.mark.skipif("cpu" not in ALL, reason="the compiled extension is not built")
def test_the_gradient_of_the_decoder_does_not_depend_on_threads() -> None:
    i = get("sae_decode").make_inputs(Case(4, 500, 64, torch.bfloat16, sizes={"latents": 50, "k": 8}))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaves = [i[name].clone().requires_grad_() for name in ("values", "decoder")]
        y = sae_decode(leaves[0], i["indices"], leaves[1])
        found.append(torch.autograd.grad(y.float().square().sum(), leaves))
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("wrong", [-2, 11, 2**31 - 1])
def test_an_index_outside_is_named(name: str, wrong: int) -> None:
    i = inputs()
    i["indices"][1, 2, 3] = wrong
    with backend(name), pytest.raises(InputError, match=f"indices: got {wrong}; allowed: 0 to 10, or -1 for nothing"):
        sae_decode(**i)


@pytest.mark.skipif("triton" not in ALL, reason="the Triton interpreter is for machines without a GPU")
def test_an_index_outside_is_nan_on_a_gpu() -> None:
    i = inputs()
    i["indices"][1, 2, 3], i["indices"][2, 0, 0] = 11, -2
    with backend("triton"):
        y = sae_decode(**i)
    assert y[1, 2].isnan().all()
    assert y[2, 0].isnan().all()
    assert y.isnan().any(-1).sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3, 7, 5, dtype=torch.int32)}, r"values: got 'int32 \[3, 7, 5\]"),
        ({"values": torch.zeros(3, 7, 0)}, r"values: got 'float32 \[3, 7, 0\]"),
        ({"indices": torch.zeros(3, 7, 5, dtype=torch.int64)}, r"indices: got 'int64 \[3, 7, 5\]"),
        ({"indices": torch.zeros(3, 7, 4, dtype=torch.int32)}, r"allowed: int32 \[3, 7, 5\]"),
        ({"decoder": torch.zeros(48)}, "decoder: got"),
        ({"decoder": torch.zeros(0, 48)}, "decoder: got"),
        ({"bias": torch.zeros(47)}, r"bias: got 'float32 \[47\]"),
        ({"residual": torch.zeros(3, 48)}, r"residual: got 'float32 \[3, 48\].*allowed: a float dtype, \[3, 7, 48\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sae_decode(**{**inputs(), **change})
