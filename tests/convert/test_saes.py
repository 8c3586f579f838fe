"""Published autoencoders give the same latents and reconstructions as their own formulas; wrong ones are named."""

import json
from collections.abc import Callable
from pathlib import Path

import autoencoders as given
import pytest
import torch
from autoencoders import BIAS, LATENTS, WIDTH, K, affine, draw, gated, jump, rebuilt, top
from safetensors.torch import load_file, save_file
from torch import Tensor

from pysteer.convert import load_dictionary, load_saelens, load_sparsify, load_unbox
from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder

X = draw(20, 7, 6, WIDTH)
LENGTH = given.decoder().norm(dim=1)


def check(sae: SparseAutoencoder, latents: Tensor, out: Tensor | None = None) -> None:
    torch.testing.assert_close(sae.dense(X), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(X), rebuilt(latents) if out is None else out, rtol=1e-4, atol=1e-4)
    assert 0 < int((latents > 0).sum()) < latents.numel()


def test_sparsify(tmp_path: Path) -> None:
    check(load_sparsify(given.sparsify(tmp_path)), top(affine(X)))
    check(load_sparsify(given.sparsify(tmp_path, num_latents=0)), top(affine(X)))
    # SAeUron trains over batches, and loads what it trained as top k of every token
    folder = given.sparsify(tmp_path, batch_topk=True, sample_topk=False, input_unit_norm=False)
    check(load_sparsify(folder), top(affine(X)))
    assert load_sparsify(folder).meta["trained_as"] == "batch_topk"
    flat = affine(X).reshape(1, -1)
    shared = top(flat, K * 42).reshape(7, 6, LATENTS)
    check(load_sparsify(folder, as_trained=True), shared)
    per_row = top(affine(X).reshape(7, -1), K * 6).reshape(7, 6, LATENTS)
    check(load_sparsify(given.sparsify(tmp_path, sample_topk=True), as_trained=True), per_row)


def test_saeuron_with_normalised_input(tmp_path: Path) -> None:
    sae = load_sparsify(given.sparsify(tmp_path, input_unit_norm=True))
    mean = X.mean(-1, keepdim=True)
    std = (X - mean).std(-1, keepdim=True)
    latents = top(affine((X - mean) / (std + 1e-5)))
    check(sae, latents, rebuilt(latents) * std + mean)


LENS: dict[str, Callable[[Tensor], Tensor]] = {
    "standard": lambda x: affine(x).relu(),
    "topk": lambda x: top(affine(x)),
    "jumprelu": jump,
    "gated": gated,
}


@pytest.mark.parametrize("architecture", LENS)
def test_saelens(architecture: str, tmp_path: Path) -> None:
    sae = load_saelens(given.saelens(tmp_path, architecture))
    check(sae, LENS[architecture](X))
    assert sae.meta["hook_name"] == "blocks.3.hook_resid_post"
    sae.save_pretrained(tmp_path / "ours")
    check(SparseAutoencoder.from_pretrained(tmp_path / "ours"), LENS[architecture](X))


def test_saelens_options(tmp_path: Path) -> None:
    check(load_saelens(given.saelens(tmp_path, "jumprelu", apply_b_dec_to_input=False)), jump(X, centred=False))
    folder = given.saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    latents = top(affine(X) * LENGTH)
    check(load_saelens(folder), latents, rebuilt(latents / LENGTH))
    factor = draw(30, LATENTS).abs() + 0.5
    folder = given.saelens(tmp_path, "standard", {"scaling_factor": factor})
    check(load_saelens(folder), affine(X).relu(), rebuilt(affine(X).relu() * factor))
    folder = given.saelens(tmp_path, "standard", normalize_activations="layer_norm")
    mean = X.mean(-1, keepdim=True)
    std = X.std(-1, keepdim=True)
    latents = affine((X - mean) / (std + 1e-5)).relu()
    check(load_saelens(folder), latents, rebuilt(latents) * std + mean)
    folder = given.saelens(tmp_path, "jumprelu", normalize_activations="constant_norm_rescale")
    scale = WIDTH**0.5 / X.norm(dim=-1, keepdim=True)
    check(load_saelens(folder), jump(X * scale), rebuilt(jump(X * scale)) / scale)


@pytest.mark.parametrize("asked", ["expected_average_only_in", True])
def test_saelens_with_scaled_activations(asked: object, tmp_path: Path) -> None:
    folder = given.saelens(tmp_path, "jumprelu", normalize_activations=asked)
    check(load_saelens(folder, scale=2.5), jump(2.5 * X), rebuilt(jump(2.5 * X)) / 2.5)
    with pytest.raises(InputError, match=r"normalize_activations: .*fix: give scale"):
        load_saelens(folder)
    with pytest.raises(InputError, match=r"scale: got 2.0; allowed: none"):
        load_saelens(given.saelens(tmp_path, "jumprelu"), scale=2.0)


def test_older_saelens_configurations(tmp_path: Path) -> None:
    folder = given.saelens(tmp_path, "standard", activation_fn_str="topk", activation_fn_kwargs={"k": K})
    check(load_saelens(folder), top(affine(X)))
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: config[name] for name in ("d_in", "d_sae")}))  # all else has a default
    check(load_saelens(folder), affine(X).relu())


DICTIONARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "AutoEncoderNew": lambda x: affine(x, centred=False).relu(),
    "GatedAutoEncoder": gated,
    "JumpReluAutoEncoder": lambda x: jump(x, centred=False),
    "AutoEncoderTopK": lambda x: top(affine(x)),
    "BatchTopKSAE": lambda x: affine(x).relu() * (affine(x) > 0.4),
    "MatryoshkaBatchTopKSAE": lambda x: affine(x).relu() * (affine(x) > 0.4),
}


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionaries(kind: str, tmp_path: Path) -> None:
    check(load_dictionary(given.dictionary(tmp_path, kind)), DICTIONARIES[kind](X))


def test_dictionary_options(tmp_path: Path) -> None:
    folder = given.dictionary(tmp_path, "AutoEncoder")
    check(load_dictionary(folder, unit_decoder=False), affine(X).relu())
    check(load_dictionary(folder), affine(X).relu() * LENGTH, rebuilt(affine(X).relu()))
    # a threshold that was never learned
    sae = load_dictionary(given.dictionary(tmp_path, "BatchTopKSAE", {"threshold": torch.tensor(-1.0)}))
    check(sae, top(affine(X).reshape(1, -1), K * 42).reshape(7, 6, LATENTS))


def test_unbox(tmp_path: Path) -> None:
    sae = load_unbox(given.unbox(tmp_path))
    check(sae, top(affine(X)))
    assert sae.reads == "delta"
    assert torch.equal(sae.latent_mean, draw(9, LATENTS).abs())  # type: ignore[arg-type]
    assert torch.equal(sae.latent_std, draw(10, LATENTS).abs())  # type: ignore[arg-type]
    (tmp_path / "mean.pt").unlink()
    assert load_unbox(tmp_path).latent_mean is None


def test_types_are_kept(tmp_path: Path) -> None:
    folder = given.sparsify(tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "sae.safetensors").items()}
    save_file(tensors, folder / "sae.safetensors")
    assert {tensor.dtype for tensor in load_sparsify(folder).tensors().values()} == {torch.float16}
    wide = {name: t.double() for name, t in given.DICTIONARIES["AutoEncoderTopK"]().items() if name != "k"}
    folder = given.dictionary(tmp_path, "AutoEncoderTopK", wide)
    assert {tensor.dtype for tensor in load_dictionary(folder).tensors().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcode of the sparsify autoencoder: got True; allowed: False"),
        ({"skip_connection": True}, "skip_connection"),
        ({"activation": "groupmax"}, "activation of the sparsify autoencoder: got 'groupmax'; allowed: topk"),
        ({"d_in": 6}, "d_in: got 6; allowed: 5, as the weights have"),
        ({"num_latents": 13}, "num_latents: got 13"),
        ({"k": 0}, "k of the sparsify autoencoder: got 0; allowed: a whole number from 1 to 12"),
        ({"k": 13}, "k of the sparsify autoencoder"),
        ({"k": "3"}, "k of the sparsify autoencoder"),
    ],
)
def test_sparsify_configurations_that_do_not_fit(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sparsify(given.sparsify(tmp_path, **config))


def test_other_architectures_are_named(tmp_path: Path) -> None:
    for architecture in ("transcoder", "matryoshka", ["topk"], None):
        folder = given.saelens(tmp_path, "standard", architecture=architecture)
        with pytest.raises(InputError, match=r"architecture of the SAELens autoencoder.*allowed: standard, topk"):
            load_saelens(folder)
    with pytest.raises(InputError, match="activation of the SAELens autoencoder: got 'tanh-relu'"):
        load_saelens(given.saelens(tmp_path, "standard", activation_fn="tanh-relu"))
    with pytest.raises(InputError, match="normalize_activations of the SAELens"):
        load_saelens(given.saelens(tmp_path, "standard", normalize_activations={"a": 1}))
    with pytest.raises(InputError, match="dict_class of the dictionary: got 'IdentityDict'"):
        load_dictionary(given.dictionary(tmp_path, "AutoEncoder", dict_class="IdentityDict"))
    with pytest.raises(InputError, match=r"dictionary lacks encoder.weight: got 'W_enc"):
        load_dictionary(given.dictionary(tmp_path, "JumpReluAutoEncoder", dict_class="AutoEncoder"))
    with pytest.raises(InputError, match="holds an unknown tensor: got 'threshold'"):
        load_saelens(given.saelens(tmp_path, "jumprelu", architecture="standard"))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for tensors, message in (
        ({"bias": BIAS[:3]}, r"shape of dictionary, bias: got \[3\]; allowed: \[5\]"),
        ({"decoder.weight": torch.zeros(WIDTH, 3)}, "dictionary, decoder"),
        ({"encoder.weight": torch.zeros(LATENTS)}, "dictionary, encoder"),
        ({"encoder.weight": torch.zeros(0, WIDTH)}, "no empty dimension"),
        ({"encoder.bias": torch.full((LATENTS,), torch.inf)}, "NaN or infinity"),
        ({"encoder.bias": torch.full((LATENTS,), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ({"encoder.bias": "x"}, "encoder.bias: got 'str'"),
        ({"encoder.weight": torch.zeros(LATENTS, WIDTH, dtype=torch.complex64)}, "more than tensors|floating point"),
    ):
        with pytest.raises(InputError, match=message):
            load_dictionary(given.dictionary(tmp_path, "AutoEncoder", tensors))
    with pytest.raises(InputError, match="r_mag of the gated"):
        load_saelens(given.saelens(tmp_path, "gated", {"r_mag": torch.full((LATENTS,), 1e4)}))
    with pytest.raises(InputError, match="configuration of the sdxl-unbox autoencoder not found"):
        load_unbox(tmp_path / "none")
    given.unbox(tmp_path, n_dirs_local=7)
    with pytest.raises(InputError, match="n_dirs_local: got 7"):
        load_unbox(tmp_path)
    given.unbox(tmp_path)
    torch.save(torch.ones(3), tmp_path / "mean.pt")
    with pytest.raises(InputError, match=r"mean.pt: got \[3\]; allowed: \[12\]"):
        load_unbox(tmp_path)


def test_a_threshold_is_the_last_value_that_is_off() -> None:
    sae = SparseAutoencoder(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), "jumprelu", None, torch.ones(2))
    assert torch.equal(sae.dense(torch.tensor([[1.0, 1.5]])), torch.tensor([[0.0, 1.5]]))
