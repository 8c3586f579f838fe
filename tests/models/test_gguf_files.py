"""A GGUF file read once gives what reading it three times gives."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from pysteer.models.gguf_files import gguf_read_once
from pysteer.models.language import LanguageModel

gguf = pytest.importorskip("gguf")
WIDTH, WORDS = 32, [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "<s>", "</s>", "th", "the"]
SHAPES = {
    "token_embd": (len(WORDS), WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
    "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (WIDTH, WIDTH), "blk.0.attn_v": (WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (48, WIDTH), "blk.0.ffn_up": (48, WIDTH),
    "blk.0.ffn_down": (WIDTH, 48),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in GGUF."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(WORDS.index("<s>"))
    writer.add_eos_token_id(WORDS.index("</s>"))
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def load(folder):
    return LanguageModel.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)


def test_a_file_is_read_once_and_gives_the_same(folder, monkeypatch):
    opened = []
    init = gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *args, **more: opened.append(args) or init(self, *args, **more)
    )
    once = load(folder)
    assert len(opened) == 1
    with monkeypatch.context() as patch:
        patch.setattr("pysteer.models.language.gguf_read_once", nullcontext)
        usual = load(folder)
    assert len(opened) > 2  # or the transformers library does it by itself, and ours can go
    weights, expected = once.model.state_dict(), usual.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert weights["model.embed_tokens.weight"].abs().sum() > 0
    assert once.tokenizer.get_vocab() == usual.tokenizer.get_vocab()
    assert once.token_ids(["the cat"]) == usual.token_ids(["the cat"]) != [[]]
    assert torch.equal(once.read(["the cat"]).logits, usual.read(["the cat"]).logits)


def test_the_package_is_left_as_it_was(folder):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with gguf_read_once():
        assert gguf.GGUFReader is not before[0]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with pytest.raises(FileNotFoundError), gguf_read_once():
        gguf.GGUFReader(folder / "absent.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_nothing_happens_without_the_package(monkeypatch):
    monkeypatch.setattr("pysteer.models.gguf_files.find_spec", lambda name: None)
    before = gguf.GGUFReader
    with gguf_read_once():
        assert gguf.GGUFReader is before
