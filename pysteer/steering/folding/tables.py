"""What is known about modules of diffusers and transformers: where their output is made and who reads it.

Everything here is read off the forward methods of the classes and holds for the plain processors of attention.
"""

from typing import Any

from torch import nn

from pysteer.steering.folding.weights import class_name

# (chunks of the modulation `linear`, {element of the output: (chunk of the shift, chunk of the scale)}) of norms that
# give out `norm(x) (1 + scale) + shift`.
Pairs = dict[int, tuple[int | None, int]]
_MODULATED: dict[str, tuple[int, Pairs]] = {
    "AdaLayerNorm": (2, {0: (1, 0)}),
    "AdaGroupNorm": (2, {0: (1, 0)}),
    "AdaLayerNormContinuous": (2, {0: (1, 0)}),
    "AdaLayerNormZero": (6, {0: (0, 1)}),
    "AdaLayerNormZeroSingle": (3, {0: (0, 1)}),
    "SD35AdaLayerNormZeroX": (9, {0: (0, 1), 5: (6, 7)}),
    "CogVideoXLayerNormZero": (6, {0: (0, 1), 1: (3, 4)}),
    "CogView3PlusAdaLayerNormZeroTextImage": (12, {0: (0, 1), 5: (6, 7)}),
    "LuminaRMSNormZero": (4, {0: (None, 0)}),
}
# Norms without weights in blocks, and what shifts and scales what they give out: chunks 3 and 4 of a modulated norm
# beside them, or chunks of a layer (its path, how many, which).
_MODULATED_BY_NORM = {
    "FluxTransformerBlock": {"norm2": "norm1", "norm2_context": "norm1_context"},
    "JointTransformerBlock": {"norm2": "norm1", "norm2_context": "norm1_context"},
    "BasicTransformerBlock": {"norm3": "norm1"},
}
_WITH_MLP = ("AdaLayerNormZero", "SD35AdaLayerNormZeroX")
_MODULATED_BY_LAYER: dict[str, dict[str, tuple[str, int, tuple[int | None, int]]]] = {
    "QwenImageTransformerBlock": {
        "img_norm1": ("img_mod.1", 6, (0, 1)), "img_norm2": ("img_mod.1", 6, (3, 4)),
        "txt_norm1": ("txt_mod.1", 6, (0, 1)), "txt_norm2": ("txt_mod.1", 6, (3, 4)),
    },
}  # fmt: skip

# The last linear layer of modules of diffusers: what they give out is its output, or a residual and its output.
_LAST = {
    "FeedForward": "net.2",
    "Downsample2D": "conv",
    "Upsample2D": "conv",
    "TimestepEmbedding": "linear_2",
    "PixArtAlphaTextProjection": "linear_2",
    "AdaLayerNormSingle": "linear",
}
_LAST_BEHIND_RESIDUAL = {
    "ResnetBlock2D": "conv2",
    "Transformer2DModel": "proj_out",
    "BasicTransformerBlock": "ff.net.2",
    "LlamaDecoderLayer": "mlp.down_proj",
    "MistralDecoderLayer": "mlp.down_proj",
    "Qwen2DecoderLayer": "mlp.down_proj",
    "Qwen3DecoderLayer": "mlp.down_proj",
    "PhiDecoderLayer": "mlp.fc2",
    "GPT2Block": "mlp.c_proj",
    "CLIPEncoderLayer": "mlp.fc2",
}
_PROCESSORS = (  # of attention, that end in to_out[0], and to_add_out for a second stream
    "JointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor", "QwenDoubleStreamAttnProcessor2_0",
    "SanaAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
)  # fmt: skip
# ... and that then add a residual and divide, where the attention says so.
_PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")

# Projections that attention does not call any more once they are fused.
BYPASSED = (".to_q", ".to_k", ".to_v", ".add_q_proj", ".add_k_proj", ".add_v_proj")

_Q, _K, _V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
_READERS: dict[str, dict[str, tuple[str, ...]]] = {  # the linear layers that read a module, and nothing else does
    "BasicTransformerBlock": {
        "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm2": ("attn2.to_q",), "norm3": ("ff.net.0.proj",),
    },
    "Transformer2DModel": {"norm": ("proj_in",)},
    "FeedForward": {"net.0": ("net.2",)},
    "FluxTransformerBlock": {
        "norm1": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "norm1_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "FluxSingleTransformerBlock": {
        "norm": ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"), "attn": ("proj_out",),
    },
    "JointTransformerBlock": {
        "norm1": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "norm1_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "GPT2Block": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    "CLIPEncoderLayer": {"layer_norm1": (_Q, _K, _V), "layer_norm2": ("mlp.fc1",)},
    "PhiDecoderLayer": {"input_layernorm": (_Q, _K, _V, "mlp.fc1")},
}  # fmt: skip
# Blocks of language models by what they hold: two norms, or four as in Gemma.
_TWO = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_FOUR = {*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm"}
_MLP = ("mlp.gate_proj", "mlp.up_proj")


def from_diffusers(module: nn.Module) -> bool:
    """Whether the class of a module is one of diffusers."""
    return any(base.__module__.startswith("diffusers.") for base in type(module).__mro__)


def modulation(module: nn.Module) -> tuple[int, Pairs]:
    """Chunks of the `linear` of a modulated norm, and which shift and scale which element; (0, {}) for others."""
    if class_name(module) == "AdaLayerNorm" and getattr(module, "chunk_dim", 0) == 1:
        return 2, {0: (0, 1)}
    return _MODULATED.get(class_name(module), (0, {}))


def modulated_by(owner: nn.Module, child: str) -> tuple[str, int, list[tuple[int | None, int]]]:
    """What shifts and scales the output of a norm in `owner`: path of the layer, its chunks, and all (shift, scale)."""
    kind = class_name(owner)
    chunks, pairs = modulation(owner)
    if chunks and child == "norm":
        return "linear", chunks, list(pairs.values())
    beside = _MODULATED_BY_NORM.get(kind, {}).get(child, "")
    if beside and class_name(owner.get_submodule(beside)) in _WITH_MLP:
        return f"{beside}.linear", modulation(owner.get_submodule(beside))[0], [(3, 4)]
    layer, chunks, pair = _MODULATED_BY_LAYER.get(kind, {}).get(child, ("", 0, (0, 0)))
    return layer, chunks, [pair] if layer else []


def last_layer(module: Any, element: int) -> tuple[str, bool, float]:
    """Path of the layer whose output an element of a module's output is; "" where none is known.

    The other two say whether a residual is added to it, and what both are divided by.
    """
    name = class_name(module)
    if name in ("Attention", "FluxAttention"):
        return _last_of_attention(module, element)
    if element == 0 and _as_usual(module):
        if name in _LAST:
            return _LAST[name], False, 1.0
        if name in _LAST_BEHIND_RESIDUAL:
            return _LAST_BEHIND_RESIDUAL[name], True, float(getattr(module, "output_scale_factor", 1.0))
    return "", False, 1.0


def _last_of_attention(module: Any, element: int) -> tuple[str, bool, float]:
    processor = type(module.processor).__name__
    residual, divisor = getattr(module, "residual_connection", False), getattr(module, "rescale_output_factor", 1.0)
    known = processor in _PLAIN_PROCESSORS or (processor in _PROCESSORS and not residual and divisor == 1.0)
    path = {0: "to_out", 1: "to_add_out"}.get(element, "")
    if not known or not path or getattr(module, path, None) is None:
        return "", False, 1.0
    return ("to_out.0", residual, divisor) if element == 0 else ("to_add_out", False, 1.0)


def is_residual(module: nn.Module) -> bool:
    """Whether what a module gives out is its input and something more."""
    return last_layer(module, 0)[1] or class_name(module).endswith(("Block", "DecoderLayer", "EncoderLayer"))


def _as_usual(module: Any) -> bool:
    """Whether a module that comes in several forms has the one of the tables."""
    name = class_name(module)
    if name in ("Downsample2D", "Upsample2D"):
        return bool(module.use_conv) and not getattr(module, "use_conv_transpose", False)
    if name == "TimestepEmbedding":
        return module.post_act is None
    if name == "Transformer2DModel":
        return bool(module.is_input_continuous)
    if name == "BasicTransformerBlock":
        return str(module.norm_type) == "layer_norm"
    return True


def readers(owner: Any, child: str, element: int) -> tuple[str, ...]:
    """Paths in `owner` of the linear layers that read an element of a child's output, () where they are not known."""
    name = class_name(owner)
    found = _READERS.get(name, {}).get(child, ())
    if name == "JointTransformerBlock" and (child, element) == ("norm1", 5):
        found, element = ("attn2.to_q", "attn2.to_k", "attn2.to_v"), 0
    inside = {path for path, _ in owner.named_children()}
    if {"self_attn", "mlp"} < inside and not found:
        found = _of_language_model(owner, child, inside)
    if element != 0 or any(_fused(owner, path) for path in found) or not _reads_plainly(owner, child):
        return ()
    return found


def _reads_plainly(owner: Any, child: str) -> bool:
    if class_name(owner) != "BasicTransformerBlock" or child not in ("norm1", "norm2", "norm3"):
        return True
    usual = _as_usual(owner) and owner.pos_embed is None and not owner.only_cross_attention
    return usual and (child != "norm2" or not owner.double_self_attention)


def _fused(owner: nn.Module, path: str) -> bool:
    """Whether a layer is bypassed because the projections of its attention were fused."""
    return bool(getattr(owner.get_submodule(path.partition(".")[0]), "fused_projections", False))


def _of_language_model(block: Any, child: str, inside: set[str]) -> tuple[str, ...]:
    linear = {name for name, layer in block.named_modules() if type(layer) is nn.Linear}
    if inside not in (_TWO, _FOUR) or linear != {_Q, _K, _V, "self_attn.o_proj", *_MLP, "mlp.down_proj"}:
        return ()
    before_mlp = "pre_feedforward_layernorm" if inside == _FOUR else "post_attention_layernorm"
    return {"input_layernorm": (_Q, _K, _V), before_mlp: _MLP}.get(child, ())
