"""Names of tensors in LoRA files, whatever program wrote them, as component, layer and role.

diffusers   unet.PATH.lora_A.weight, unet.PATH.lora.down.weight, unet.PATH.attn1.processor.to_q_lora.down.weight,
            text_encoder.PATH.lora_linear_layer.up.weight
PEFT        base_model.model.PATH.lora_B.weight, ...lora_B.default.weight, ...lora_magnitude_vector
kohya       lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight, .lora_up.weight, .lora_mid.weight, .alpha, .dora_scale
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from pysteer.errors import InputError

ROLES = ("down", "up", "mid", "alpha", "magnitude", "bias")


class TensorName(NamedTuple):
    """Where a tensor belongs.

    Attributes:
        layer: component and path of the layer, for example `unet.mid_block.attentions.0.proj_in`.
        role: one of `ROLES`.
        format: diffusers, peft or kohya.
    """

    layer: str
    role: str
    format: str


_SAFE = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
_ENDINGS: dict[str, str] = {
    "lora_a": "down", "lora_b": "up", "lora.down": "down", "lora.up": "up", "lora_down": "down", "lora_up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up", "lora_mid": "mid", "lora.mid": "mid",
    "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude", "alpha": "alpha",
}  # fmt: skip
_ENDING = re.compile(
    r"^(?P<layer>.+?)\.(?P<kind>lora_A|lora_B|lora\.down|lora\.up|lora\.mid|lora_down|lora_up|lora_mid|"
    r"lora_linear_layer\.down|lora_linear_layer\.up|lora_magnitude_vector|dora_scale|alpha)"
    r"(?:\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?$"
)
_PROCESSOR = re.compile(r"^(?P<layer>.+)\.processor\.(?P<name>to_\w+?)_lora\.(?P<kind>down|up)\.weight$")
_OTHERS = re.compile(r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_\w+|oft_\w+|boft_\w+|diff|diff_b|glora\w*|on_input|ia3\w*)")
_KOHYA = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer",
}  # fmt: skip
# Names of modules that contain underscores, so that the others can be split at them.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "time_emb_proj",
    "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "to_add_out",
    "add_q_proj", "add_k_proj", "add_v_proj", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj",
    "text_projection", "token_embedding", "position_embedding", "time_embedding", "linear_1", "linear_2", "ff_context",
    "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection",
    "double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "final_layer",
)  # fmt: skip
_WORD = re.compile("|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r"|[^_]+")


@lru_cache(maxsize=65536)
def parse_name(name: str) -> TensorName:
    """What a tensor of a LoRA file is.

    Raises:
        InputError: a name that is not of a LoRA, of another kind of adapter (LoHa, LoKr, OFT), or with parts that lead
            out of a folder.
    """
    if len(name) > 512 or not _SAFE.fullmatch(name):
        raise InputError("tensor name", value=name, allowed="letters, digits, '_', '-' and single dots")
    other = _OTHERS.search(name)
    if other:
        raise InputError("kind of adapter", value=other[1], allowed="LoRA, LoCon or DoRA factors")
    processor = _PROCESSOR.match(name)
    if processor:
        return TensorName(_component(f"{processor['layer']}.{processor['name']}"), processor["kind"], "diffusers")
    found = _ENDING.match(name)
    if not found:
        raise InputError("tensor name", value=name, allowed="names of LoRA factors: .lora_A., .lora.down., .lora_down.")
    layer, kind = found["layer"], found["kind"].lower()
    role = "bias" if found["leaf"] == ".bias" else _ENDINGS[kind]
    for prefix, component in _KOHYA.items():
        if layer.startswith(prefix):
            return TensorName(f"{component}.{_dotted(layer.removeprefix(prefix))}", role, "kohya")
    if layer.startswith("base_model.model."):
        return TensorName(_component(layer.removeprefix("base_model.model.")), role, "peft")
    return TensorName(_component(layer), role, "diffusers")


def _component(path: str) -> str:
    """Paths without a component are those of a UNet where they look like it."""
    if path.startswith(("down_blocks.", "up_blocks.", "mid_block.")):
        return f"unet.{path}"
    return path


def _dotted(path: str) -> str:
    """`down_blocks_0_attn1_to_q` -> `down_blocks.0.attn1.to_q`; `to_out_0` keeps its number as a part."""
    return ".".join(_WORD.findall(path))
