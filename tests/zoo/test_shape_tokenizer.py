"""The bundled bit tokenizer."""

import pytest
import torch

from pysteer.errors import InputError
from pysteer.zoo import FOLDER
from pysteer.zoo.shapes.captions import SIZES, sample_scenes
from pysteer.zoo.shapes.renderer import render
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer, ShapeTokenizerConfig


@pytest.fixture(scope="module")
def tokenizer() -> ShapeTokenizer:
    return ShapeTokenizer.from_pretrained(FOLDER / "infinity-shapes" / "tokenizer")


def test_fresh_renders_come_back(tokenizer):
    scenes = sample_scenes(96, 424_242)
    images = render(scenes) * 2 - 1
    made = tokenizer.reconstruct(images)
    assert made.shape == images.shape
    assert made.abs().max() <= 1
    quality = 10 * torch.log10(4 / (made - images).square().flatten(1).mean(1))
    assert quality.mean() >= 30
    for size in SIZES:
        assert quality[[scene.size == size for scene in scenes]].mean() >= 28


def test_different_images_have_different_bits(tokenizer):
    images = render(sample_scenes(2, 5)) * 2 - 1
    bits, _ = tokenizer.quantizer.encode(tokenizer.encode(images))
    assert [tuple(b.shape) for b in bits] == [(2, h * w, 16) for h, w in tokenizer.quantizer.scales]
    assert not torch.equal(bits[-1][0], bits[-1][1])


def test_saving_keeps_every_bit(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = ShapeTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000_000


def test_another_configuration_and_wrong_files(tmp_path):
    small = ShapeTokenizerConfig(dim=4, scales=((1, 1), (8, 8)), encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1))
    model = ShapeTokenizer(small)
    model.save_pretrained(tmp_path)
    assert ShapeTokenizer.from_pretrained(tmp_path).config == small
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="tokenizer weights"):
        ShapeTokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer config"):
        ShapeTokenizer.from_pretrained(tmp_path / "nowhere")
