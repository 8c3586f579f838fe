"""Tiny random models of transformers for the tests, and a shift at one of their sites."""

import torch
import transformers as tf
from torch import Tensor

from pysteer.steering import SiteParameters

WIDTH, VOCABULARY, LAYERS = 32, 101, 3
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
DECODER = {
    **COMMON,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def build(name: str):
    """A tiny random model in eval mode."""
    torch.manual_seed(0)
    gpt2 = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64)
    gemma = {**DECODER, "head_dim": 8, "sliding_window": 16}
    t5 = tf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4)
    clip = tf.CLIPTextConfig(**COMMON, intermediate_size=48, max_position_embeddings=20, eos_token_id=2)
    makers = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
        "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)),
        "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**gemma)),
        "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**gemma)),
        "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**DECODER)),
        "gpt2": lambda: tf.GPT2LMHeadModel(gpt2),
        "t5": lambda: tf.T5EncoderModel(t5),
        "clip": lambda: tf.CLIPTextModel(clip),
    }
    model = makers[name]().eval()
    if hasattr(model, "generation_config") and model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


DECODERS = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "phi", "gpt2")
ENCODERS = ("t5", "clip")
IDS = torch.tensor([[5, 9, 17, 33, 2], [7, 61, 4, 88, 2]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def shift(site: str, seed: int = 0, width: int = WIDTH) -> SiteParameters:
    generator = torch.Generator().manual_seed(seed)
    gain, bias = 1 + 0.3 * torch.randn(1, width, generator=generator), torch.randn(1, width, generator=generator)
    return SiteParameters(site, "affine_shift", None, {"gain": gain, "bias": bias})


def out(model, ids: Tensor = IDS, **more) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=ids, **more)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state
