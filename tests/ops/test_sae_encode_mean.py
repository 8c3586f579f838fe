"""`sae_encode_mean` against its formula: exact sums, thresholds, the k largest, memory, errors."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.sae_encode_mean import sae_encode_mean


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("with_pre_bias", "latents"), [(False, 100), (True, 100), (True, 500)])
def test_formula(name: str, dtype: torch.dtype, with_pre_bias: bool, latents: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small whole numbers: every sum is exact in any order.
    x = torch.randint(-3, 4, (3, 64, 37), generator=generator).to(dtype)
    weight = torch.randint(-3, 4, (latents, 37), generator=generator).to(dtype)
    bias = torch.randint(-3, 4, (latents,), generator=generator).float()
    pre_bias = torch.randint(-3, 4, (37,), generator=generator).float() if with_pre_bias else None
    a = (x.double() - (0 if pre_bias is None else pre_bias)) @ weight.double().T + bias
    each = torch.arange(latents) % 7 - 2.0
    with backend(name):
        assert torch.equal(sae_encode_mean(x, weight, bias, pre_bias).double(), a.relu().mean(1))
        for threshold in (torch.tensor(5.0), torch.tensor(-1.0), each):
            expected = (a * (a > threshold)).mean(1)
            assert torch.equal(sae_encode_mean(x, weight, bias, pre_bias, threshold=threshold).double(), expected)
        order = a.sort(dim=-1, descending=True, stable=True).indices[..., :4]
        expected = torch.zeros_like(a).scatter_(-1, order, a.gather(-1, order).relu()).mean(1)
        assert torch.equal(sae_encode_mean(x, weight, bias, pre_bias, k=4).double(), expected)
        without = sae_encode_mean(x, weight)
    assert torch.equal(without.double(), (x.double() @ weight.double().T).relu().mean(1))
    assert not torch.equal(without, torch.zeros_like(without))


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_nan_stays_in_its_row(name: str) -> None:
    x, weight = torch.randn(3, 20, 8), torch.randn(60, 8)
    x[1, 7, 2] = torch.nan
    with backend(name):
        mean = sae_encode_mean(x, weight)
    assert mean[1].isnan().all()
    assert mean[[0, 2]].isfinite().all()


MEASURE = textwrap.dedent("""
    import resource, torch
    from pysteer.ops.sae_encode_mean import sae_encode_mean
    x, weight = torch.randn(4, 1024, 64), torch.randn(40000, 64)
    sae_encode_mean(x[:1, :8], weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sae_encode_mean(x, weight)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
""")


@pytest.mark.skipif(not backend_status()["cpu"].live, reason="the compiled extension is not built")
def test_the_activations_never_reach_memory() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 20  # of 655 MB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: got 0; allowed: 1 to 96"),
        ({"k": 97}, "k: got 97; allowed: 1 to 96"),
        ({"k": 3, "threshold": torch.tensor(1.0)}, "threshold: got 'a tensor'; allowed: None, where k is given"),
        ({"threshold": torch.zeros(5)}, r"threshold: got 'float32 \[5\]"),
        ({"weight": torch.zeros(96, 5)}, r"weight: got 'float32 \[96, 5\]"),
        ({"bias": torch.zeros(95)}, r"bias: got 'float32 \[95\]"),
        ({"pre_bias": torch.zeros(5)}, r"pre_bias: got 'float32 \[5\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("sae_encode_mean").make_inputs(Case(3, 8, 6, sizes={"latents": 96}))
    with pytest.raises(InputError, match=message):
        sae_encode_mean(**{**i, **change})
