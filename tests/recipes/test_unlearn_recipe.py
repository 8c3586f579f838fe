"""The recipe unlearn on a tiny pipeline with a judge of pixels: parts in order, and the choice of the edit."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_diffusion import stable_diffusion

from pysteer.errors import InputError
from pysteer.models.diffusion import ImageGenerator
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes import unlearn as module
from pysteer.recipes.dreaming import studio
from pysteer.recipes.frame import execute
from pysteer.recipes.unlearn import UnlearnConfig
from pysteer.zoo.shapes.captions import COLOURS, SHAPES

pytest.importorskip("diffusers")

WORDS = (
    "settings={num_inference_steps: 3}", "fit_prompts=2", "search_prompts=4", "prompts=6", "batch_size=8",
    "percentiles=[90]", "factors=[-1, -4]", "floors=[1]",
)  # fmt: skip


class Pixels:
    """Words by the mean of the pixels."""

    def classify(self, images):
        marks = images.flatten(1).long().sum(1).tolist()
        labels = {"colour": [COLOURS[m % 8] for m in marks], "shape": [SHAPES[m % 6] for m in marks]}
        return type("Verdict", (), {"labels": labels})()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(30, 32), dim=1)
    sae = SparseAutoencoder(
        decoder.clone(), torch.zeros(30), decoder, torch.zeros(32), "topk", 3, meta={"site": "up.1.0"}
    )
    sae.save_pretrained(tmp_path / "sae")
    pipe = ImageGenerator(stable_diffusion())
    monkeypatch.setattr(studio, "load_model", lambda name: pipe)
    monkeypatch.setattr(module, "load_classifier", lambda name: Pixels())
    return tmp_path


def start(folder, *words, name="run"):
    given = [f"sae={folder / 'sae'}", *WORDS, *words]
    return execute("unlearn", given, out=folder / "results", run_name=name, console=Console(file=io.StringIO()))


def test_a_run_leaves_the_rates_of_all_classes(tiny, monkeypatch):
    folder, summary = start(tiny, "concept=red")
    found = json.loads((folder / "search.json").read_text())
    assert [(row["percentile"], row["factor"]) for row in found] == [(90.0, -1.0), (90.0, -4.0)]
    headline = summary.headline
    assert headline["latents"]
    assert {row["setting"] for row in summary.tables["classes"]} == {"unsteered", "unlearned"}
    assert headline["unsteered"]["concept"]["n"] == headline["unlearned"]["concept"]["n"] == 6
    assert headline["unsteered"] != headline["unlearned"]
    assert "With red unlearned" in (folder / "report.html").read_text()

    def never(*args):
        raise AssertionError("means are there already")

    monkeypatch.setattr(module, "add_rows", never)
    _, second = start(tiny, "concept=red")
    assert second.headline == headline


def test_the_edit_that_forgets_most_among_those_that_keep_enough(tiny, monkeypatch):
    outcomes = iter([(0.5, 0.95), (0.1, 0.2)])

    def judged(work, scenes, images, name):
        concept, kept = next(outcomes)
        rate = lambda value: type("Rate", (), {"value": value})()  # noqa: E731
        return type("Outcome", (), {"concept": rate(concept), "others": rate(kept), "others_else": rate(1.0)})()

    monkeypatch.setattr(module, "judge", judged)
    monkeypatch.setattr(module, "_measured", lambda work, means, best: (_ for _ in ()).throw(KeyboardInterrupt(best)))
    with pytest.raises(KeyboardInterrupt) as caught:
        start(tiny, "concept=circle")
    assert caught.value.args[0] == {"percentile": 90.0, "factor": -1.0, "floor": 1.0}


def test_what_cannot_be_unlearned():
    with pytest.raises(InputError, match="circle, square"):
        UnlearnConfig(concept="dog")
    assert UnlearnConfig(concept="ring").attribute == "shape"


def test_what_is_searched_where_nothing_is_said():
    own = UnlearnConfig(concept="ring", factors=(-2.0,), percentiles=(98.0,))
    assert own.searched == [{"percentile": 98.0, "factor": -2.0, "floor": 1.0}]
    assert UnlearnConfig(concept="red").autoencoder == "diffusion-shapes-attention"
    assert own.autoencoder == "diffusion-shapes"
    assert len(UnlearnConfig(concept="red", floors=(2.0,)).searched) == 2
