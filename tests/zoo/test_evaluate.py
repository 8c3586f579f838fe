"""Evaluation, sample sheet and model card, on a generator that draws its captions with the renderer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pysteer import zoo
from pysteer.files import read_json, write_json
from pysteer.zoo.shapes.captions import SHAPES, captions_of, sample_scenes
from pysteer.zoo.shapes.card import percent, write_card
from pysteer.zoo.shapes.evaluate import evaluate, generate_images, object_centres, sample_sheet
from pysteer.zoo.shapes.renderer import render


class Drawing:
    """Draws known scenes instead of generating; ``wrong`` colours and shapes for every second one if asked."""

    def __init__(self, scenes, wrong=False):
        self.scenes, self.wrong, self.calls = list(scenes), wrong, []

    def __call__(self, prompts, *, seeds, **settings):
        self.calls.append((len(prompts), seeds, settings))
        drawn = []
        for scene in self.scenes[: len(prompts)]:
            assert scene.caption == prompts[len(drawn)]
            drawn.append(scene)
        self.scenes = self.scenes[len(prompts) :]
        if self.wrong:
            drawn = [
                s if i % 2 else replace(s, shape=SHAPES[SHAPES.index(s.shape) - 1], x=32.0, y=32.0)
                for i, s in enumerate(drawn)
            ]
        return SimpleNamespace(images=(render(drawn) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


@pytest.fixture(scope="module")
def classifier():
    return zoo.load_classifier("shapes")


def test_a_perfect_generator(classifier):
    pipe = Drawing(sample_scenes(150, 31))
    found = evaluate(pipe, classifier, count=150, seed=31, batch=64, cfg=2.0)
    assert [call[0] for call in pipe.calls] == [64, 64, 22]
    assert pipe.calls[1][1] == list(range(31 + 64, 31 + 128))
    assert pipe.calls[1][2] == {"cfg": 2.0}
    overall = found.results["overall"]
    assert overall["shape"]["n"] == 150
    assert all(overall[name]["value"] >= 0.98 for name in overall), overall
    assert overall["position"]["n"] == sum("position" in s.stated for s in found.scenes)
    assert found.results["by_shape"]["star"]["shape"]["n"] == sum(s.shape == "star" for s in found.scenes)
    assert found.results["no_shape_recognised"]["value"] <= 0.01


def test_a_wrong_generator(classifier):
    found = evaluate(Drawing(sample_scenes(100, 32), wrong=True), classifier, count=100, seed=32, batch=100)
    overall = found.results["overall"]
    assert 0.45 <= overall["shape"]["value"] <= 0.55
    assert overall["colour"]["value"] >= 0.98
    assert overall["position"]["value"] < 0.9
    assert overall["shape"]["low"] < overall["shape"]["value"] < overall["shape"]["high"]


def test_centres():
    scenes = sample_scenes(40, 33)
    images = (render(scenes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    centres = torch.tensor([(s.x, s.y) for s in scenes])
    assert (object_centres(images) - centres).abs().max() <= 2.0


def test_generate_images_keeps_the_order():
    scenes = sample_scenes(5, 34)
    images = generate_images(Drawing(scenes), captions_of(scenes), 0, batch=2)
    assert torch.equal(images, (render(scenes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_sample_sheet_shows_every_image():
    scenes = sample_scenes(7, 35)
    images = (render(scenes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    page = sample_sheet(images, captions_of(scenes), columns=3)
    assert page.size == (3 * 134 + 6, 3 * (128 + 44 + 6) + 6)
    assert page.getpixel((6, 6)) == tuple(images[0, 0, 0].tolist())
    assert page.getpixel((6, 6 + 2 * 178)) == tuple(images[6, 0, 0].tolist())


def test_percent():
    assert percent({"value": 0.975, "low": 0.96, "high": 0.985, "n": 600}) == "97.5 [96.0, 98.5]"
    assert percent({"value": float("nan"), "low": 0, "high": 0, "n": 0}) == "-"


def test_model_card_holds_the_measured_figures(classifier, tmp_path):
    found = evaluate(Drawing(sample_scenes(60, 36), wrong=True), classifier, count=60, seed=36, batch=60)
    write_json(tmp_path / "evaluation.json", found.results)
    record = read_json(zoo.FOLDER / "infinity-shapes" / "tokenizer" / "training.json")
    write_json(tmp_path / "tokenizer" / "training.json", record)
    history = [{"step": 10, "validation_loss_per_scale": [0.5, 0.3], "seconds": 1.0}]
    settings = {"steps": 4321, "batch": 7, "lr": 0.001, "flip": 0.1}
    transformer = {"settings": settings, "history": history, "seconds": 12.6, "torch": "2", "cuda": False}
    transformer["captions"] = {"position": 0.4}
    write_json(tmp_path / "transformer" / "training.json", transformer)
    text = write_card(tmp_path, zoo.FOLDER / "shapes-classifier").read_text()
    assert percent(found.results["overall"]["shape"]) in text
    assert f"{record['psnr_mean']:.1f} dB" in text
    assert "4321 steps of 7 captioned" in text
    assert "0.400 nats" in text
    for word in ("What it cannot do", "small (stated)", "star", "3000 fresh renders"):
        assert word in text
