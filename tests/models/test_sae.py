"""The autoencoder container: encode, decode and reconstruct held against dense formulas; saved and loaded unchanged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder

LATENTS, WIDTH = 24, 10


def make(activation: str = "topk", **given: object) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(3)
    encoder, decoder = (torch.randn(LATENTS, WIDTH, generator=generator) for _ in range(2))
    encoder_bias, bias = torch.randn(LATENTS, generator=generator), torch.randn(WIDTH, generator=generator)
    if activation == "jumprelu":
        given.setdefault("threshold", torch.rand(LATENTS, generator=generator) * 2)
    elif activation != "relu":
        given.setdefault("k", 3)
    return SparseAutoencoder(encoder, encoder_bias, decoder, bias, activation, **given)  # type: ignore[arg-type]


def normalised(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero, one = torch.zeros(1), torch.ones(1)
    if sae.normalise == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), mean, std
    if sae.normalise == "unit_norm":
        scale = x.norm(dim=-1, keepdim=True) / WIDTH**0.5
        return x / scale, zero, scale
    return x, zero, one


def dense(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Values of all latents [R, L, M], from the definition."""
    x, _, _ = normalised(sae, x)
    a = (x - sae.bias if sae.centred else x) @ sae.encoder.T + sae.encoder_bias
    if sae.activation == "relu":
        return a.relu()
    if sae.threshold is not None:
        return torch.where(a > sae.threshold, a.relu(), 0.0)
    groups = {"topk": a.flatten(0, 1), "batch_topk": a.reshape(1, -1), "sample_topk": a.flatten(1)}[sae.activation]
    count = sae.k * groups.shape[1] // LATENTS  # type: ignore[operator]
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(count).indices, 1.0).reshape(a.shape)
    return a.relu() * kept


CASES = {
    "topk": {},
    "batch_topk": {},
    "sample_topk": {},
    "jumprelu": {},
    "relu": {},
    "not centred": {"activation": "jumprelu", "centred": False},
    "layer norm": {"normalise": "layer_norm"},
    "unit norm": {"activation": "relu", "normalise": "unit_norm"},
}


@pytest.mark.parametrize("name", CASES)
def test_latents_and_reconstruction_follow_the_definition(name: str) -> None:
    sae = make(**{"activation": name if " " not in name else "topk", **CASES[name]})  # type: ignore[arg-type]
    x = torch.randn(4, 6, WIDTH)
    wanted = dense(sae, x)
    _, mean, scale = normalised(sae, x)
    torch.testing.assert_close(sae.dense(x), wanted)
    torch.testing.assert_close(sae.dense(x, [7, 2]), wanted[..., [7, 2]])
    torch.testing.assert_close(sae.reconstruct(x), (wanted @ sae.decoder + sae.bias) * scale + mean)
    values, indices = sae.encode(x)
    assert int((indices >= 0).sum()) >= int((wanted > 0).sum()) > 0
    torch.testing.assert_close(sae.decode(values, indices), wanted @ sae.decoder + sae.bias)


def test_maps_are_read_along_their_channels() -> None:
    sae, x = make("relu", normalise="layer_norm"), torch.randn(2, WIDTH, 3, 4)
    wanted = sae.reconstruct(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(sae.reconstruct(x, channel_dim=1), wanted)
    torch.testing.assert_close(sae.dense(x, [5], channel_dim=1), sae.dense(x.movedim(1, -1), [5]))


def test_an_open_number_of_latents_finds_room_for_all() -> None:
    generator = torch.Generator().manual_seed(1)
    encoder = torch.rand(700, 4, generator=generator)
    sae = SparseAutoencoder(encoder, torch.ones(700), encoder, torch.zeros(4), "relu")
    x = torch.rand(3, 4, generator=generator)
    assert (sae.encode(x)[1] >= 0).sum() == 3 * 700
    assert sae.encode(x, capacity=5)[1].shape == (3, 5)


def test_unit_directions_are_the_same_function() -> None:
    x = torch.randn(5, 3, WIDTH)
    for activation in ("relu", "jumprelu"):
        sae = make(activation)
        scaled = sae.with_unit_decoder()
        torch.testing.assert_close(scaled.decoder.norm(dim=1), torch.ones(LATENTS))
        torch.testing.assert_close(scaled.reconstruct(x), sae.reconstruct(x))
        torch.testing.assert_close(scaled.dense(x), sae.dense(x) * sae.decoder.norm(dim=1))
    with pytest.raises(InputError, match="unit directions"):
        make().with_unit_decoder()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_and_loaded_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    statistics = {"latent_mean": torch.rand(LATENTS), "latent_std": torch.rand(LATENTS)}
    sae = make("jumprelu", centred=False, normalise="unit_norm", meta={"reads": "delta", "n": [1]}, **statistics)
    sae = sae.to(dtype=dtype)
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert sae.tensors().keys() == loaded.tensors().keys()
    assert all(torch.equal(t, loaded.tensors()[name]) for name, t in sae.tensors().items())
    assert all(tensor.dtype == dtype for tensor in loaded.tensors().values())
    for name in ("activation", "k", "centred", "normalise", "meta", "reads"):
        assert getattr(loaded, name) == getattr(sae, name)
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(loaded.reconstruct(x), sae.reconstruct(x))


def test_gradients_reach_the_activation() -> None:
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    make("relu", normalise="layer_norm").reconstruct(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_bias": torch.zeros(3)}, "shape of encoder_bias"),
        ({"decoder": torch.zeros(WIDTH, LATENTS)}, "shape of decoder"),
        ({"bias": torch.zeros(WIDTH, dtype=torch.float64)}, "dtype of bias"),
        ({"encoder": torch.zeros(WIDTH)}, "shape of encoder"),
        ({"activation": "gated"}, "activation"),
        ({"k": None}, "k of topk"),
        ({"k": LATENTS + 1}, "k of topk"),
        ({"k": True}, "k of topk"),
        ({"activation": "relu"}, "k of relu"),
        ({"activation": "jumprelu", "k": None}, "threshold of jumprelu"),
        ({"normalise": "rms"}, "normalisation"),
        ({"centred": 1}, "centred"),
        ({"meta": {"reads": "input"}}, "reads"),
    ],
)
def test_what_does_not_fit_together_is_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(make(), **change)


def test_an_activation_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match=f"width of the activations: got 11; allowed: {WIDTH}"):
        make().encode(torch.randn(2, 3, 11))
    with pytest.raises(InputError, match="latent: got 24"):
        make().dense(torch.randn(2, WIDTH), [24])


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tensors, _ = files.read_safetensors(tmp_path / "sae.safetensors")
    for change, message in (
        ({"extra": torch.zeros(1)}, "unexpected tensor"),
        ({"bias": torch.full((WIDTH,), torch.nan)}, "NaN"),
        ({"bias": torch.zeros(3)}, "shape of bias"),
    ):
        files.write_safetensors(tmp_path / "sae.safetensors", {**tensors, **change})
        with pytest.raises(InputError, match=message):
            SparseAutoencoder.from_pretrained(tmp_path)
    files.write_safetensors(tmp_path / "sae.safetensors", {"encoder": tensors["encoder"]})
    with pytest.raises(InputError, match="lacks a tensor: got 'encoder_bias'"):
        SparseAutoencoder.from_pretrained(tmp_path)
    files.write_json(tmp_path / "config.json", {"format": "other"})
    with pytest.raises(InputError, match="format of the autoencoder"):
        SparseAutoencoder.from_pretrained(tmp_path)
