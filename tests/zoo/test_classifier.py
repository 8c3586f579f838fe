"""The bundled judge."""

import pytest
import torch

from pysteer import zoo
from pysteer.errors import InputError
from pysteer.zoo.shapes.captions import BACKGROUNDS, RGB, sample_scenes
from pysteer.zoo.shapes.classifier import HEADS
from pysteer.zoo.shapes.renderer import render
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer

SCENES = sample_scenes(500, 777_777)


@pytest.fixture(scope="module")
def classifier():
    return zoo.load_classifier("shapes")


@pytest.fixture(scope="module")
def images():
    return render(SCENES)


def _accuracy(verdict) -> dict[str, float]:
    return {
        name: sum(getattr(s, name) == word for s, word in zip(SCENES, verdict.labels[name], strict=True)) / len(SCENES)
        for name in HEADS
    }


def test_fresh_renders(classifier, images):
    verdict = classifier.classify((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    assert all(value >= 0.995 for value in _accuracy(verdict).values()), _accuracy(verdict)
    assert verdict.features.shape == (500, classifier.config.features)
    assert verdict.features.std(0).median() > 0.05


def test_reconstructions(classifier, images):
    tokenizer = ShapeTokenizer.from_pretrained(zoo.FOLDER / "infinity-shapes" / "tokenizer")
    made = torch.cat([tokenizer.reconstruct(part * 2 - 1) for part in images[:200].split(50)])
    verdict = classifier.classify(made)
    right = [s.shape == word for s, word in zip(SCENES[:200], verdict.labels["shape"], strict=True)]
    assert sum(right) / len(right) >= 0.98


def test_nothing_is_called_none(classifier):
    plain = torch.tensor([RGB[name] for name in BACKGROUNDS])[:, :, None, None].expand(-1, -1, 64, 64) * 2 - 1
    noise = torch.rand(20, 3, 64, 64) * 2 - 1
    verdict = classifier.classify(torch.cat([plain, noise]))
    assert set(verdict.labels["shape"]) == {"none"}
    assert set(verdict.labels["colour"]) == {"none"}
    assert verdict.labels["background"][: len(BACKGROUNDS)] == list(BACKGROUNDS)


def test_both_image_forms_agree(classifier, images):
    as_bytes = (images[:8] * 255).round().to(torch.uint8)
    one = classifier.classify(as_bytes.permute(0, 2, 3, 1))
    two = classifier.classify(as_bytes.float() / 127.5 - 1, batch=3)
    assert one.labels == two.labels
    assert torch.allclose(one.features, two.features, atol=1e-3)
    wanted = {"shape": SCENES[0].shape, "colour": "none", "position": "left"}
    assert one.matches(0, wanted) == {"shape": True, "colour": False}


def test_wrong_images_and_names_are_named(classifier):
    with pytest.raises(InputError, match="images to classify"):
        classifier.classify(torch.zeros(2, 3, 32, 32))
    with pytest.raises(InputError, match="allowed: shapes"):
        zoo.load_classifier("faces")
    with pytest.raises(InputError, match="allowed: diffusion-shapes, infinity-shapes"):
        zoo.load("infinity-2b")
    assert zoo.available() == {
        "generators": ["diffusion-shapes", "infinity-shapes"],
        "classifiers": ["shapes"],
        "autoencoders": ["diffusion-shapes", "diffusion-shapes-attention"],
    }


def test_small_enough_and_saved_exactly(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2_000_000
    again = type(classifier).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))
