"""Published weight layouts come in, damaged ones are refused with a reason and leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official
import parity_case as case
import pytest
import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.convert import convert, convert_pipeline
from pysteer.models.infinity.pipeline import InfinityPipeline, load_transformer
from pysteer.models.infinity.vae import InfinityVAE, VAEConfig

CONFIG = case.small_config(bits=16, scales=((1, 1), (2, 2)))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return case.weights(CONFIG, 3)


def logits(config: InfinityConfig, weights: dict[str, Tensor]) -> Tensor:
    model = case.Infinity(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(case.texts(config, (4,), 1), case.normal(2, (1, config.tokens - 1, config.bits)))


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    other = {name: tensor + 1 for name, tensor in state.items()}
    return {"args": {"pn": "0.06M"}, "epoch": 3, "trainer": {"gpt_fsdp": state, "gpt_ema_fsdp": other, "config": {}}}


def one_chunk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"block_chunks.0.module.0.": "blocks.0.", "block_chunks.1.module.0.": "blocks.1."}
    made = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        made[name] = tensor
    return made


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "released": lambda state: state,
    "training checkpoint": training_checkpoint,
    "compiled and wrapped": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "flash kernel temperature": lambda state: {
        name: tensor.reshape(1, 1, -1, 1) if "scale_mul" in name else tensor for name, tensor in state.items()
    },
    "no zero key bias, old masks": lambda state: {
        **{name: tensor for name, tensor in state.items() if "zero_k_bias" not in name},
        "attn_bias_for_masking": torch.zeros(2, 2),
    },
    "one chunk": one_chunk,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformer_layouts_give_the_same_model(layout: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](state), tmp_path / "in.pth")
    made = convert(tmp_path / "in.pth", tmp_path / "out")
    model = load_transformer(tmp_path / "out")
    assert model.config.chunks == (1 if layout == "one chunk" else 2)
    assert (model.config.bits, model.config.patchify, made.name) == (16, False, "")
    assert model.config.scales == case.small_config().scales  # 0.06M
    text, inputs = case.texts(CONFIG, (4,), 1), case.normal(2, (1, CONFIG.tokens - 1, CONFIG.bits))
    with torch.no_grad():
        got = model(text, inputs, CONFIG.scales)
    # Not to the bit: where weights lie in memory decides which kernels a BLAS takes.
    torch.testing.assert_close(got, logits(CONFIG, state), rtol=1e-4, atol=1e-5)
    assert made.parameters == sum(p.numel() for p in model.parameters())


def test_moving_average_is_taken_when_asked(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(training_checkpoint(state), tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out", ema=True)
    assert torch.equal(load_transformer(tmp_path / "out").head.bias, state["head.bias"] + 1)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    stem = "pytorch_model" if kind == "bin" else "model"
    table = {}
    for part in range(2):
        piece = {name: state[name] for index, name in enumerate(sorted(state)) if index % 2 == part}
        name = f"{stem}-{part + 1:05d}-of-00002.{kind}"
        torch.save(piece, folder / name) if kind == "bin" else files.write_safetensors(folder / name, piece)
        table |= dict.fromkeys(piece, name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    convert(folder, tmp_path / "out", dtype="bf16")
    stored = files.read_safetensors(tmp_path / "out" / "model.safetensors")[0]
    assert stored["head.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["head.weight"], state["head.weight"].bfloat16())

    index.write_text(json.dumps({"weight_map": {**table, "head.bias": "../elsewhere.bin"}}))
    with pytest.raises(InputError, match="leaves the folder"):
        convert(folder, tmp_path / "second")


def test_patchify_is_read_off_the_bits(tmp_path: Path) -> None:
    config = case.small_config(bits=56, patchify=True, scales=((1, 1), (2, 2)))
    torch.save(case.weights(config, 1), tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out", pn="0.25M", h_div_w=2.0)
    made = load_transformer(tmp_path / "out").config
    assert (made.patchify, made.bits, made.scales[-1]) == (True, 56, (46, 23))


def damage(name: str, state: dict[str, Tensor], path: Path) -> None:
    changed = dict(state)
    if name == "missing tensor":
        del changed["block_chunks.1.module.0.ffn.fc2.weight"]
    elif name == "foreign":
        changed = {"layer.weight": torch.zeros(2)}
    elif name == "wrong shape":
        changed["head.weight"] = torch.zeros(3, 64)
    elif name == "unknown tensor":
        changed["block_chunks.1.module.0.ffn.fcg.weight"] = torch.zeros(3)
    elif name == "nan":
        changed["head.bias"] = changed["head.bias"].clone()
        changed["head.bias"][3] = float("nan")
    torch.save(changed if name != "code" else {"a": Path("x")}, path)
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif name == "not pytorch":
        path.write_text("hello, I am no weights file")


DAMAGES = {
    "missing tensor": r"lacks 1 tensors.*ffn\.fc2\.weight",
    "foreign": r"not an Infinity transformer: word_embed\.weight is missing.*layer\.weight",
    "wrong shape": r"shape of head\.weight: got \[3, 64\]; allowed: \[32, 64\]",
    "unknown tensor": r"unexpected 1 tensors.*fcg",
    "nan": r"head\.bias: got 'NaN or infinity'",
    "truncated": "truncated or not a PyTorch file",
    "not pytorch": "truncated or not a PyTorch file",
    "code": "weights_only=True",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_named_and_leave_nothing(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    damage(name, state, tmp_path / "in.pth")
    with pytest.raises(InputError, match=DAMAGES[name]) as caught:
        convert(tmp_path / "in.pth", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_other_bad_input(state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        convert(tmp_path / "no.pth", tmp_path / "out")
    with pytest.raises(InputError, match=r"infinity-transformer, infinity-vae"):
        convert(tmp_path / "no.pth", tmp_path / "out", "llama")
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(InputError, match="moving average"):
        convert(tmp_path / "in.pth", tmp_path / "out", ema=True)
    with pytest.raises(InputError, match="got 'fp8'; allowed: keep, fp32"):
        convert(tmp_path / "in.pth", tmp_path / "out", dtype="fp8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="output folder is taken"):
        convert(tmp_path / "in.pth", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def vae_weights(config: VAEConfig) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in InfinityVAE(config).state_dict().items()}


@pytest.mark.parametrize("old_names", [False, True])
def test_vae(old_names: bool, tmp_path: Path) -> None:
    config = VAEConfig(14, 24, (1, 2, 2))
    state = vae_weights(config)
    stored = {**state, "quantizer.lfq.mask": torch.arange(4), "image_disc.conv.weight": torch.zeros(2)}
    if old_names:
        stored = {
            name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias"): t for name, t in state.items()
        }
        stored = {
            name.replace(".norm.weight", ".weight").replace(".norm.bias", ".bias"): t for name, t in stored.items()
        }
    torch.save({"vae": stored, "ema": {name: tensor + 1 for name, tensor in stored.items()}}, tmp_path / "in.pth")
    made = convert(tmp_path / "in.pth", tmp_path / "out", "infinity-vae")
    vae = InfinityVAE.from_pretrained(tmp_path / "out")
    assert (vae.config, made.name) == (config, "d14 f4")
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    convert(tmp_path / "in.pth", tmp_path / "ema", "infinity-vae", ema=True)
    again = InfinityVAE.from_pretrained(tmp_path / "ema").state_dict()
    assert torch.equal(again["encoder.conv_in.conv.bias"], state["encoder.conv_in.conv.bias"] + 1)
    torch.save({"vae": {"decoder.x.weight": torch.zeros(1)}}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="not an Infinity image tokenizer"):
        convert(tmp_path / "bad.pth", tmp_path / "bad", "infinity-vae")


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 encoder with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=7, d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0)
    T5EncoderModel(config).eval().save_pretrained(folder)
    return folder


def test_whole_pipeline(state: dict[str, Tensor], text_encoder: Path, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "transformer.pth")
    torch.save({"vae": vae_weights(VAEConfig(16, 24, (1, 1)))}, tmp_path / "vae.pth")
    sources = {"transformer": tmp_path / "transformer.pth", "vae": tmp_path / "vae.pth", "text_encoder": text_encoder}
    convert_pipeline(tmp_path / "model", **sources)
    pipe = InfinityPipeline.from_pretrained(tmp_path / "model")
    first = pipe(["a red circle", "blue"], seeds=1)
    assert first.images.shape == (2, 32, 32, 3)
    assert not torch.equal(first.images[0], first.images[1])

    torch.save({"vae": vae_weights(VAEConfig(18, 24, (1, 1)))}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match="bits of the image tokenizer: got 18; allowed: 16"):
        convert_pipeline(tmp_path / "second", **sources)
    assert not (tmp_path / "second").exists()
    assert not list(tmp_path.glob(".second*"))


PROMPTS = ["a red circle", "blue", "a blue circle " * 300]


def encoded(folder: Path) -> tuple[Any, Any, tuple[Tensor, list[int], Tensor, int]]:
    """Encoder, tokenizer, and what the port makes of `PROMPTS`, packed."""
    from transformers import AutoTokenizer, T5EncoderModel

    from pysteer.models.infinity.text import encode_text

    encoder, words = T5EncoderModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = encode_text(encoder, words, PROMPTS, 512)
    return encoder, words, official.pack_text(ours.hidden, ours.lengths.tolist())


def test_text_condition_does_not_depend_on_padding(text_encoder: Path) -> None:
    """The published code pads every prompt to 512 tokens, encodes it alone and keeps the attended part."""
    encoder, words, (packed, lens, cumulated, longest) = encoded(text_encoder)
    for row, prompt in enumerate(PROMPTS):
        tokens = words([prompt], max_length=512, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        assert lens[row] == int(tokens.attention_mask.sum())
        assert torch.allclose(packed[cumulated[row] : cumulated[row + 1]], hidden[0, : lens[row]], atol=1e-5)
    assert (lens, longest) == ([4, 2, 512], 512)


@pytest.mark.skipif(official.official_path() is None, reason=f"needs {official.VARIABLE}")
def test_live_text_condition(text_encoder: Path) -> None:
    encoder, words, (packed, lens, cumulated, _) = encoded(text_encoder)
    for row, prompt in enumerate(PROMPTS):
        theirs, their_lens, _, their_longest = official.encode_prompt(words, encoder, prompt)
        assert [lens[row]] == their_lens == [their_longest]
        assert torch.allclose(packed[cumulated[row] : cumulated[row + 1]], theirs, atol=1e-5)
