"""The convolutional tokenizer without the published code: shapes, saving and bad input."""

from pathlib import Path

import pytest
import torch

from pysteer.errors import InputError
from pysteer.models.infinity.vae import InfinityVAE, VAEConfig


@pytest.fixture
def vae() -> InfinityVAE:
    return InfinityVAE(VAEConfig(6, 24, (1, 2))).eval()


def test_shapes_and_range(vae: InfinityVAE) -> None:
    with torch.no_grad():
        features = vae.encode(torch.rand(2, 3, 8, 12) * 2 - 1)
        images = vae.decode(100 * features)
    assert features.shape == (2, 6, 4, 6)
    assert images.shape == (2, 3, 8, 12)
    assert images.abs().max() <= 1


def test_saved_and_loaded_equal(vae: InfinityVAE, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "tokenizer")
    again = InfinityVAE.from_pretrained(tmp_path / "tokenizer")
    features = torch.randn(1, 6, 3, 3)
    with torch.no_grad():
        assert torch.equal(again.decode(features), vae.decode(features))
    assert again.config == vae.config


def test_bad_input_is_explained(vae: InfinityVAE) -> None:
    with pytest.raises(InputError, match="multiples of 2"):
        vae.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(InputError, match=r"\[B, 6, h, w\]"):
        vae.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(InputError, match="got 20"):
        VAEConfig(6, 20)
