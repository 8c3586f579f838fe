"""The Triton kernels of `sae_encode` in the interpreter: exact ties, several tiles of tokens, what is not finite."""

import os

import pytest
import torch

from pysteer.ops import backend, backend_status, backends, get
from pysteer.ops.sae_encode import sae_encode
from pysteer.ops.sae_encode_mean import sae_encode_mean

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not backend_status()["triton"].live or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the Triton interpreter is for machines without a GPU",
)


@pytest.mark.parametrize(("latents", "k"), [(7, 7), (50, 1), (900, 9), (140, 100)])
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_the_lowest_index_wins_ties(latents: int, k: int, channel_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load_kernels("sae_encode"), "TILE_BYTES", 1)  # 128 tokens at a time
    generator = torch.Generator().manual_seed(latents)
    # Small whole numbers: every sum is exact in any order, and many pre-activations are equal.
    x, weight = (torch.randint(-2, 3, size, generator=generator).float() for size in ((2, 75, 20), (latents, 20)))
    bias, pre_bias = (torch.randint(-2, 3, (size,), generator=generator).float() for size in (latents, 20))
    a = (x - pre_bias) @ weight.T + bias
    order = a.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    given = x if channel_dim == -1 else x.transpose(1, 2).contiguous()
    with backend("triton"):
        values, indices = sae_encode(given, weight, bias, pre_bias, k=k, relu=False, channel_dim=channel_dim)
        mean = sae_encode_mean(given, weight, bias, pre_bias, channel_dim=channel_dim)
    assert torch.equal(indices.long(), order)
    assert torch.equal(values, a.gather(-1, order))
    torch.testing.assert_close(mean, a.relu().mean(1))


def test_what_is_not_finite() -> None:
    x, weight, bias = torch.randn(1, 3, 8), torch.randn(90, 8), torch.zeros(90)
    x[0, 1, 0] = torch.nan
    bias[7], bias[8] = torch.inf, -torch.inf
    with backend("triton"):
        values, indices = sae_encode(x, weight, bias, k=3)
        _, everything = sae_encode(x[:, 2:], weight, bias, k=90)
        mean = sae_encode_mean(x, weight, bias)
    assert indices[0, 0, 0] == indices[0, 2, 0] == 7
    assert values[0, 1].isnan().all()
    assert torch.equal(indices[0, 1], torch.arange(3, dtype=torch.int32))
    assert everything[0, 0, -1] == 8
    assert mean.isnan().all()


def test_more_than_the_kernels_take() -> None:
    x, weight = torch.randn(1, 3, 8), torch.randn(200, 8)
    with backend("triton"):
        assert get("sae_encode").implementation(x, weight, k=128) == "triton"
        assert get("sae_encode").implementation(x, weight, k=129) == "reference"
