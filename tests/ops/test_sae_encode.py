"""`sae_encode` against its definition: exact ties, modes, memory, gradients of single arguments, errors."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.latents import largest
from pysteer.ops.sae_encode import sae_encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole_numbers(tokens: int, width: int, latents: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Small whole numbers: every sum is exact in any order, and many pre-activations are equal."""
    generator = torch.Generator().manual_seed(tokens + width + latents)
    sizes = ((1, tokens, width), (latents, width), (latents,), (width,))
    x, weight, bias, pre_bias = (torch.randint(-2, 3, size, generator=generator).float() for size in sizes)
    return x.to(dtype), weight.to(dtype), bias, pre_bias


def by_hand(a: Tensor, k: int) -> Tensor:
    """Indices of the k largest of [N, M], ties to the lowest index."""
    return a.sort(dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("latents", "k"), [(7, 7), (50, 1), (4000, 9), (300, 200)])
@pytest.mark.parametrize("with_pre_bias", [False, True])
def test_the_lowest_index_wins_ties(name: str, dtype: torch.dtype, latents: int, k: int, with_pre_bias: bool) -> None:
    x, weight, bias, pre_bias = whole_numbers(29, 33, latents, dtype)
    a = (x[0].double() - (pre_bias if with_pre_bias else 0)) @ weight.double().T + bias
    with backend(name):
        values, indices = sae_encode(x, weight, bias, pre_bias if with_pre_bias else None, k=k, relu=False)
    assert torch.equal(indices[0].long(), by_hand(a, k))
    assert torch.equal(values[0].double(), a.gather(1, by_hand(a, k)).to(dtype).double())


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_pre_activations_everywhere(name: str, dtype: torch.dtype) -> None:
    x, weight, _, _ = whole_numbers(11, 16, 3000, dtype)
    x[0, :6] = 0
    weight[1:] = weight[:1]
    with backend(name):
        _, indices = sae_encode(x, weight, k=5)
        _, shifted = sae_encode(x, weight, torch.zeros(3000), x[0, 0].float() + 1, k=5)
    assert torch.equal(indices[0].long(), torch.arange(5).expand(11, 5))
    assert torch.equal(shifted, indices)


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_batch_and_sample_modes(name: str) -> None:
    i = get("sae_encode").make_inputs(Case(3, 20, 24, sizes={"latents": 2000, "k": 4}))
    a = (i["x"].double() - i["pre_bias"]) @ i["weight"].double().T + i["bias"]
    for mode, groups in (("batch_topk", 1), ("sample_topk", 3)):
        flat = a.reshape(groups, -1)
        expected = torch.zeros_like(flat, dtype=torch.bool)
        expected.scatter_(1, flat.topk(4 * flat.shape[1] // 2000).indices, True)
        with backend(name):
            values, indices = sae_encode(**{**i, "mode": mode, "capacity": 200})
        chosen = torch.zeros(60, 2001, dtype=torch.bool)
        chosen.scatter_(1, torch.where(indices < 0, 2000, indices).reshape(60, -1).long(), True)
        assert torch.equal(chosen[:, :2000].reshape(groups, -1), expected)
        counts = (indices >= 0).sum(-1)
        assert counts.min() < 4 < counts.max()
        assert torch.equal(indices >= 0, values > 0)
        with backend(name):
            few = sae_encode(**{**i, "mode": mode, "capacity": 5})[1]
        assert (few >= 0).sum() == 240
        assert (few[..., -1] >= 0).any()


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thresholds(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, pre_bias = whole_numbers(40, 12, 2100, dtype)
    a = (x[0].double() - pre_bias) @ weight.double().T + bias
    each = torch.arange(2100) % 5 + 14.0
    for threshold in (torch.tensor(15.0), each):
        above = a > threshold.double()
        with backend(name):
            arguments = (x, weight, bias, pre_bias)
            values, indices = sae_encode(*arguments, mode="threshold", threshold=threshold, capacity=30)
        for token in range(40):
            order = by_hand(a[token].masked_fill(~above[token], -torch.inf)[None], 30)[0]
            order = order[above[token, order]]
            assert torch.equal(indices[0, token, : len(order)].long(), order)
            assert torch.equal(values[0, token, : len(order)].double(), a[token, order].to(dtype).double())
            assert (indices[0, token, len(order) :] == -1).all()
        assert (above.sum(1) > 30).any() or (above.sum(1) < 30).any()


def test_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for latents in (1, 5, 300):
        a = torch.randint(-3, 4, (60, latents), generator=generator).float()
        a[:, -1] = a[:, -1].masked_fill(torch.arange(60) % 3 == 0, torch.nan)
        for k in {1, 3, latents} - ({3} if latents < 3 else set()):
            assert torch.equal(largest(a, k), by_hand(a, k))


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_what_is_not_finite(name: str) -> None:
    x, weight, bias, pre_bias = whole_numbers(4, 8, 900, torch.float32)
    x[0, 1], x[0, 2, 0] = torch.nan, torch.inf
    bias[7], bias[8] = torch.inf, -torch.inf
    with backend(name):
        values, indices = sae_encode(x, weight, bias, pre_bias, k=3)
        _, everything = sae_encode(x[:, 3:], weight, bias, pre_bias, k=900)
    assert indices[0, 0, 0] == indices[0, 3, 0] == 7
    assert values[0, 1].isnan().all()
    assert torch.equal(indices[0, 1], torch.arange(3, dtype=torch.int32))
    assert everything[0, 0, -1] == 8


@pytest.mark.skipif("cpu" not in CPU_VARIANTS, reason="the compiled extension is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    i = get("sae_encode").make_inputs(Case(2, 75, 130, dtype, sizes={"latents": 3000, "k": 8}))
    values, indices = sae_encode(**i)
    for part in (slice(0, 1), slice(3, 20), slice(40, 75)):
        alone = sae_encode(**{**i, "x": i["x"][:, part]})
        assert torch.equal(alone[0], values[:, part])
        assert torch.equal(alone[1], indices[:, part])


def test_weights_as_they_come() -> None:
    spec = get("sae_encode")
    i = spec.make_inputs(Case(2, 9, 40, torch.bfloat16, sizes={"latents": 1200, "k": 6}))
    limit = type("Limit", (), {"absolute": 1e-5, "relative": 2**-8 * 1.01})
    turned = i["weight"].T.contiguous().T
    for weight in (turned, i["weight"].float(), i["weight"].half(), torch.randn(2400, 80)[::2, ::2]):
        given = {**i, "weight": weight}
        spec.compare(sae_encode(**given), spec.reference(**given), given, limit)
    values, indices = sae_encode(i["x"], i["weight"], k=6)
    zero = {"bias": torch.zeros(1200), "pre_bias": torch.zeros(40)}
    same = sae_encode(i["x"], i["weight"], **zero, k=6)
    assert torch.equal(indices, same[1])
    assert torch.equal(values, same[0])


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias", "pre_bias"), ("x", "weight", "bias", "pre_bias")])
@pytest.mark.parametrize("mode", ["topk", "batch_topk"])
def test_gradients_of_some_arguments(wanted: tuple[str, ...], mode: str) -> None:
    i = get("sae_encode").make_inputs(Case(3, 6, 20, sizes={"latents": 500, "k": 4}, options={"mode": mode}))
    leaves = {name: i[name].clone().requires_grad_() for name in wanted}
    found = []
    for call in (sae_encode, get("sae_encode").reference):
        values, indices = call(**{**i, **leaves})
        assert not indices.requires_grad
        found.append(torch.autograd.grad(values.square().sum(), list(leaves.values())))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_gradients_without_biases() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    threshold = torch.full((12,), 1.0)
    for options in ({"k": 3}, {"mode": "threshold", "threshold": threshold, "capacity": 5}):
        assert torch.autograd.gradcheck(lambda x, w, o=options: sae_encode(x, w, **o)[0], (x, weight))


def test_in_a_compiled_training_step() -> None:
    i = get("sae_encode").make_inputs(Case(2, 6, 16, sizes={"latents": 90, "k": 4}))

    def step(weight: Tensor) -> Tensor:
        return sae_encode(**{**i, "weight": weight})[0].sum()

    plain, traced = (i["weight"].clone().requires_grad_() for _ in range(2))
    step(plain).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(traced).backward()
    assert plain.grad is not None
    assert plain.grad.abs().sum() > 0
    assert torch.equal(plain.grad, traced.grad)


def test_autocast_does_not_lower_the_precision() -> None:
    i = get("sae_encode").make_inputs(Case(2, 6, 64, sizes={"latents": 90, "k": 4}))
    for name in CPU_VARIANTS:
        with backend(name):
            plain = sae_encode(**i)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values, indices = sae_encode(**i)
        assert torch.equal(plain[0], values)
        assert torch.equal(plain[1], indices)


MEASURE = textwrap.dedent("""
    import resource, sys, torch
    from pysteer.ops.sae_encode import sae_encode
    tokens, latents, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    x, weight = torch.randn(1, tokens, 64).to(dtype), (torch.randn(latents, 64) / 8).to(dtype)
    sae_encode(x[:, :8], weight, k=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sae_encode(x, weight, torch.zeros(latents), torch.zeros(64), k=8)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
""")


@pytest.mark.skipif(not backend_status()["cpu"].live, reason="the compiled extension is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pre_activations_never_reach_memory(dtype: str) -> None:
    tokens, latents = 4096, 40000  # 655 MB of fp32 pre-activations
    command = [sys.executable, "-P", "-c", MEASURE, str(tokens), str(latents), dtype]
    extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert extra < 40 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: got 0; allowed: 1 to 96"),
        ({"k": 97}, "k: got 97; allowed: 1 to 96"),
        ({"k": None}, "k: got None"),
        ({"mode": "top"}, "mode: got 'top'; allowed: topk, batch_topk, sample_topk, threshold"),
        ({"mode": "batch_topk", "capacity": 3}, "capacity: got 3; allowed: 4 to 96"),
        ({"mode": "batch_topk", "capacity": 97}, "capacity: got 97; allowed: 4 to 96"),
        ({"capacity": 9}, "capacity: got 9; allowed: None with mode='topk'"),
        ({"mode": "threshold"}, "threshold: got 'None'"),
        ({"threshold": torch.tensor(1.0)}, "threshold: got 'a tensor'; allowed: None, unless"),
        ({"mode": "threshold", "threshold": torch.tensor(1.0)}, "k: got 4; allowed: None with mode='threshold'"),
        ({"mode": "threshold", "threshold": torch.tensor(1.0), "k": None}, "capacity: got None; allowed: 1 to 96"),
        (
            {"mode": "threshold", "threshold": torch.zeros(9), "k": None, "capacity": 4},
            r"threshold: got 'float32 \[9\]",
        ),
        ({"weight": torch.zeros(96, 5)}, r"weight: got 'float32 \[96, 5\] on cpu'; allowed: floats \[M, 6\] on cpu"),
        ({"weight": torch.zeros(96, 6, dtype=torch.int32)}, "weight: got 'int32"),
        ({"weight": torch.zeros(96, 6, device="meta")}, "weight: got .* on meta"),
        ({"bias": torch.zeros(95)}, r"bias: got 'float32 \[95\]"),
        ({"pre_bias": torch.zeros(5)}, r"pre_bias: got 'float32 \[5\]"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, "dtype of x: got 'torch.int64'"),
        ({"channel_dim": 0}, "channel_dim: got 0"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("sae_encode").make_inputs(Case(3, 8, 6, sizes={"latents": 96, "k": 4}))
    with pytest.raises(InputError, match=message):
        sae_encode(**{**i, **change})
