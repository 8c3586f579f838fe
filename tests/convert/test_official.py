"""The published packages themselves, where they are installed, against what we make of their files."""

from pathlib import Path

import autoencoders as given
import numpy as np
import pytest
import torch
from autoencoders import LATENTS, WIDTH, K, draw

from pysteer.convert import (
    load_control_vector,
    load_dictionary,
    load_saelens,
    load_sparsify,
    save_control_vector,
)
from pysteer.models.sae import SparseAutoencoder

X = draw(20, 42, WIDTH)


def check(sae: SparseAutoencoder, latents: torch.Tensor, out: torch.Tensor) -> None:
    torch.testing.assert_close(sae.dense(X), latents.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(X), out.detach(), rtol=1e-4, atol=1e-4)
    assert 0 < int((latents > 0).sum()) < latents.numel()


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_saelens(architecture: str, normalisation: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    config = {"d_in": WIDTH, "d_sae": LATENTS, "architecture": architecture, "normalize_activations": normalisation}
    extra = {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = sae_lens.SAE.from_dict({**config, **extra, "metadata": {}})
    with torch.no_grad():
        for number, tensor in enumerate(theirs.parameters()):
            tensor.copy_(0.7 * draw(number, *tensor.shape))
        theirs.save_model(tmp_path)
        latents = theirs.encode(X)
        check(load_saelens(tmp_path), latents.to_dense(), theirs.decode(latents))


def test_sparsify(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=LATENTS, k=K)
    theirs = sparsify.SparseCoder(WIDTH, config)
    with torch.no_grad():
        for number, tensor in enumerate(theirs.parameters()):
            tensor.copy_(draw(number, *tensor.shape))
        theirs.save_to_disk(tmp_path)
        found = theirs.encode(X)
        latents = torch.zeros(len(X), LATENTS).scatter(-1, found.top_indices, found.top_acts)
        check(load_sparsify(tmp_path), latents, latents @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize("kind", given.DICTIONARIES)
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.utils import load_dictionary as official

    given.dictionary(tmp_path, kind)
    with torch.no_grad():
        theirs, _ = official(str(tmp_path), "cpu")
        latents = theirs.encode(X)
        check(load_dictionary(tmp_path), latents, theirs.decode(latents))


def test_repeng(tmp_path: Path) -> None:
    repeng = pytest.importorskip("repeng")
    directions = {layer: np.random.default_rng(layer).standard_normal(8).astype(np.float32) for layer in (3, 11)}
    theirs = repeng.ControlVector(model_type="llama", directions=directions)
    theirs.export_gguf(tmp_path / "theirs.gguf")
    fitted = load_control_vector(tmp_path / "theirs.gguf")
    assert [entry.site for entry in fitted.parameters] == ["block.3", "block.11"]
    for entry, vector in zip(fitted.parameters, directions.values(), strict=True):
        assert torch.equal(entry.tensors["bias"][0], torch.from_numpy(vector))
    save_control_vector(tmp_path / "ours.gguf", fitted)
    assert repeng.ControlVector.import_gguf(tmp_path / "ours.gguf") == theirs
