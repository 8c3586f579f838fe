"""The recipe sae on a tiny pipeline, from captured and from streamed activations."""

import io
import json

import pytest
import torch
from rich.console import Console
from tiny_diffusion import stable_diffusion

from pysteer.dream.sources import StoredTokens, StreamedTokens
from pysteer.errors import InputError
from pysteer.models.diffusion import ImageGenerator
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes import sae as module
from pysteer.recipes.frame import execute
from pysteer.recipes.sae import SaeConfig

pytest.importorskip("diffusers")

PROMPTS = ["a red circle", "a blue square", "two circle", "a ugly red", "the blue", "a circle"]
WORDS = (
    "site=up.1.0", "settings={num_inference_steps: 3}", "batch_size=2", "count=4", "test_count=2",
    "train.latents=40", "train.k=4", "train.batch_tokens=128", "train.epochs=4", "train.learning_rate=0.01",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    labels = ["red", "blue", "two", "red", "blue", "red"]
    entries = [{"prompt": text, "label": label} for text, label in zip(PROMPTS, labels, strict=True)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    pipe = ImageGenerator(stable_diffusion())
    monkeypatch.setattr(module, "load_model", lambda name: pipe)
    return tmp_path, pipe


def start(folder, *words, name="run"):
    given = [f"prompts={folder / 'prompts.json'}", *WORDS, *words]
    return execute("sae", given, out=folder / "results", run_name=name, console=Console(file=io.StringIO()))


def test_an_autoencoder_comes_out_and_is_measured(tiny):
    folder, _ = tiny
    run, summary = start(folder)
    sae = SparseAutoencoder.from_pretrained(run / "sae")
    assert (sae.latents, sae.width, sae.activation) == (40, 32, "jumprelu")  # batch_topk, by its running threshold
    assert sae.meta["site"] == "up.1.0"
    history = json.loads((run / "sae/training.json").read_text())
    assert history[-1]["step"] == 4 * 6  # 4 prompts x 3 steps x 64 tokens in batches of 128
    assert 0 < summary.headline["fvu"] < 1
    assert summary.headline["tokens"] == 2 * 3 * 64
    assert summary.headline["live"] > 0
    assert "What latents tell" in (run / "report.html").read_text()
    _, second = start(folder)  # nothing is trained again
    assert second.headline == summary.headline


def test_streamed_tokens_are_the_captured_ones(tiny):
    folder, pipe = tiny
    run, _ = start(folder, name="captured")
    from pysteer.capture import ActivationStore

    stored = StoredTokens(ActivationStore.open(run / "activations"), "up.1.0")
    seeds = [61000 + i for i in range(4)]
    streamed = StreamedTokens(pipe, "up.1.0", PROMPTS[:4], seeds, 2, settings={"num_inference_steps": 3})
    assert sum(stored.sizes) == sum(streamed.sizes) == 4 * 3 * 64
    mine = torch.cat([streamed.chunk(i) for i in range(len(streamed.sizes))])
    theirs = torch.cat([stored.chunk(i) for i in range(len(stored.sizes))])
    assert (mine.sum(1).sort().values - theirs.sum(1).sort().values).abs().max() < 0.1  # stored in 16 bits
    other, _ = start(folder, "source=streaming", name="streamed")
    assert not (other / "activations").exists()
    assert SparseAutoencoder.from_pretrained(other / "sae").latents == 40


def test_what_cannot_be_trained(tiny):
    folder, pipe = tiny
    with pytest.raises(InputError, match="captured, streaming"):
        SaeConfig(source="air")
    with pytest.raises(InputError, match="unknown site"):
        start(folder, "site=up.9.9")
    with pytest.raises(InputError, match="steps that the run takes"):
        StreamedTokens(pipe, "up.1.0", PROMPTS[:2], [1, 2], 2, steps=[40], settings={"num_inference_steps": 3})
