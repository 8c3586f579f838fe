"""What the ops that promise little memory take at their peak."""

import sys
from pathlib import Path

import pytest
import torch

from pysteer.ops import Case, backend_status, get

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.memory import peak

pytestmark = [
    pytest.mark.skipif(not backend_status()["cpu"].live, reason="the compiled extension is not built"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the high-water mark of Linux"),
]
MIB = 1 << 20


def test_peak_is_seen() -> None:
    assert 0.9 * 64 * MIB < peak(lambda: torch.ones(16 * MIB)) < 1.2 * 64 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["topk", "batch"])
def test_sae_encode_never_holds_all_pre_activations(variant: str, dtype: torch.dtype) -> None:
    spec = get("sae_encode")
    tokens, latents = 512, 16384
    sizes = {"latents": latents, "k": 16}
    case = Case(2, tokens // 2, 64, dtype, options=spec.variants[variant], sizes=sizes)
    inputs = spec.make_inputs(case)
    assert spec.implementation(**inputs) == "cpu"
    everything = tokens * latents * dtype.itemsize
    assert peak(lambda: spec.function(**inputs)) < everything / 2
    assert peak(lambda: spec.reference(**inputs)) > everything


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_channel_moments_need_no_copy_of_the_activation(layout: str) -> None:
    spec = get("channel_moments")
    inputs = spec.make_inputs(Case(8, 4096, 256, layout=layout))
    assert spec.implementation(**inputs) == "cpu"
    assert peak(lambda: spec.function(**inputs)) < 2 * MIB
    assert peak(lambda: spec.reference(**inputs)) > inputs["x"].nbytes
