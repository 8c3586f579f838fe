"""`pysteer bake`: a folder in, a folder out that plain transformers, diffusers and peft load."""

import re

import pytest
import tiny_diffusion as tiny
import torch
import transformers as tf
from tiny_language import WIDTH, build, out
from tiny_maps import parameters
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import pysteer
from pysteer.capture import Fitted
from pysteer.cli import run_command
from pysteer.families.base import find_family
from pysteer.methods import create
from pysteer.steering import Plan


def fitted(folder, entries) -> str:
    Fitted(create("mean_difference"), entries, {"rows": "both"}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def language(tmp_path) -> str:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b").save_pretrained(tmp_path / "lm")
    build("gpt2").save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def test_language_models(language: str, tmp_path, capsys) -> None:
    model = build("gpt2")
    entries = [parameters("constant", "mlp.1", WIDTH), parameters("constant", "block.0", WIDTH, 1)]
    plain, where = out(model), fitted(tmp_path / "fitted", entries)
    with pysteer.steer(model, Plan.build(entries), strength=0.5):
        steered = out(model)
    assert run_command(["bake", language, where, str(tmp_path / "baked"), "--strength", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "block.0 -> transformer.h.0.mlp.c_proj" in shown
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    torch.testing.assert_close(out(again), steered, rtol=1e-4, atol=1e-5)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "baked")("a b")["input_ids"] == [0, 2, 1]
    assert not torch.allclose(steered, plain, atol=1e-2)
    assert run_command(["bake", language, where, str(tmp_path / "lora"), "--strength", "0.5", "--lora"]) == 0
    again = build("gpt2")
    again.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(out(again.eval()), steered, rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baked", "fitted", "lm", "lora"]


def test_pipelines(tmp_path, capsys) -> None:
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    entry = parameters("constant", "ff.1", find_family(pipe).sites(pipe)["ff.1"].width)
    where = fitted(tmp_path / "fitted", [entry])
    assert run_command(["bake", str(tmp_path / "pipe"), where, str(tmp_path / "baked")]) == 0
    again = type(pipe).from_pretrained(tmp_path / "baked")
    baked = pysteer.bake(pipe, Plan.build([entry], rows="both"))
    assert torch.equal(tiny.out(again.unet, "unet"), tiny.out(baked.unet, "unet"))
    assert not torch.allclose(tiny.out(again.unet, "unet"), tiny.out(pipe.unet, "unet"), atol=1e-3)
    assert "visual  ff.1 -> mid_block" in capsys.readouterr().out


def test_nothing_is_left_behind_by_what_is_refused(language: str, tmp_path, capsys) -> None:
    where = fitted(tmp_path / "fitted", [parameters("affine", "block.1", WIDTH)])
    target = str(tmp_path / "baked")
    assert run_command(["bake", language, where, target]) == 2
    assert re.search(r"site block.1 cannot be folded.*residual stream.*fix: ", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted", "lm"]
    gains = fitted(tmp_path / "gains", [parameters("affine", "mlp.1", WIDTH)])
    assert run_command(["bake", language, gains, target, "--lora"]) == 2
    assert run_command(["bake", language, gains, target, "--rank", "3"]) == 2
    assert "add --lora" in capsys.readouterr().err
    assert run_command(["bake", language, gains, target, "--lora", "--rank", "3"]) == 0
    assert re.search(r"mlp.c_proj: rank 3 leaves out \d+\.\d% of the change", capsys.readouterr().out)
    assert run_command(["bake", language, gains, target]) == 2
    assert "output folder is taken" in capsys.readouterr().err
