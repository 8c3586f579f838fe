"""Changes of weights as a LoRA, in the files that plain peft and diffusers load."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysteer import files
from pysteer.errors import InputError
from pysteer.steering.folding.maps import refusal
from pysteer.steering.folding.tables import from_diffusers
from pysteer.steering.folding.weights import Edit, Factors, Matrix, class_name

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# The layers of a text encoder that diffusers finds the ranks of.
_OF_TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one layer: `weight + up @ down`, and `bias`.

    Attributes:
        up: fp32 `[out, r]`, of a convolution `[out, r, 1, ...]`.
        down: fp32 `[r, in]`, of a convolution `[r, in, *kernel]`.
        bias: fp32 `[out]`.
        error: length of what the rank leaves out of the change, relative to the change; 0 when nothing.
    """

    up: Tensor
    down: Tensor
    bias: Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.up.shape[1]


@dataclass(frozen=True)
class Lora:
    """A LoRA for a model or for parts of a pipeline, with a scaling of 1.

    Attributes:
        layers: part of the pipeline ("unet", "transformer", "text_encoder", ...) -> path of the layer -> what is added.
            A model of transformers is the part "".
        base: name or folder of the model it is for, as far as known.
    """

    layers: Mapping[str, Mapping[str, LoraLayer]]
    base: str = ""

    @property
    def errors(self) -> dict[str, float]:
        """What was left out of the layers that the rank does not hold, see `LoraLayer.error`."""
        return {
            ".".join(filter(None, (part, path))): layer.error
            for part, layers in self.layers.items()
            for path, layer in layers.items()
            if layer.error
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the LoRA into `folder`.

        For a model of transformers `adapter_model.safetensors` and `adapter_config.json`, to be loaded by
        `peft.PeftModel.from_pretrained(model, folder)` or `model.load_adapter(folder)`. For diffusers
        `pytorch_lora_weights.safetensors`, to be loaded by `pipe.load_lora_weights(folder)`, or for a model on its own
        by `model.load_lora_adapter(folder, prefix="unet", weight_name="pytorch_lora_weights.safetensors")` with the
        name of the part.
        """
        if "" in self.layers:
            layers = self.layers[""]
            files.write_safetensors(Path(folder) / PEFT_WEIGHTS, _named("base_model.model.", layers))
            files.write_json(Path(folder) / PEFT_CONFIG, _peft_config(layers, self.base))
        else:
            named = (_named(f"{part}.", layers) for part, layers in self.layers.items())
            tensors = {name: tensor for part in named for name, tensor in part.items()}
            files.write_safetensors(Path(folder) / DIFFUSERS_WEIGHTS, tensors, {"format": "pt"})
        return Path(folder)


def _with_bias(layers: Mapping[str, LoraLayer]) -> bool:
    """All layers of a part have a bias or none has: that is one switch in peft."""
    return any(bool((layer.bias != 0).any()) for layer in layers.values())


def _named(prefix: str, layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    # Of the names that peft uses, the loader of diffusers for text encoders knows those of attention alone.
    text = prefix.startswith("text_encoder")
    down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora_A", "lora_B")
    named = {}
    for path, layer in layers.items():
        named[f"{prefix}{path}.{down}.weight"] = layer.down
        named[f"{prefix}{path}.{up}.weight"] = layer.up
        if _with_bias(layers):
            named[f"{prefix}{path}.{up}.bias"] = layer.bias
    return named


def _peft_config(layers: Mapping[str, LoraLayer], base: str) -> dict[str, Any]:
    ranks = {f"^{re.escape(path)}": layer.rank for path, layer in layers.items()}
    most = max(ranks.values())
    other = {path: rank for path, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": other,
        # A pattern, because plain names would also match layers whose path ends in them.
        "target_modules": "|".join(re.escape(path) for path in layers),
        "lora_bias": _with_bias(layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def lora_layers(obj: Any, parts: Mapping[str, tuple[nn.Module, list[Edit]]], rank: int | None) -> Lora:
    """The LoRA of the changes of every part, whose root stands with them."""
    found: dict[str, dict[str, LoraLayer]] = {}
    base = ""
    for part, (root, edits) in parts.items():
        name = _part_name(obj, part, root, edits)
        by_path: dict[str, list[Edit]] = {}
        for edit in edits:
            by_path.setdefault(edit.path, []).append(edit)
        made = {path: _layer(root.get_submodule(path), changes, rank) for path, changes in by_path.items()}
        if made:
            found[name] = made
            base = str(getattr(root, "name_or_path", "") or "")
    if not found:
        raise InputError("LoRA of a plan that changes nothing", fix="give a strength other than 0")
    return Lora(found, base)


def _part_name(obj: Any, part: str, root: nn.Module, edits: list[Edit]) -> str:
    """What the loaders of diffusers call a part; "" for a model of transformers on its own."""
    pipe, kind = _pipeline(obj), class_name(root)
    if pipe is None and not from_diffusers(root):
        return ""
    if pipe is None:
        if edits and not hasattr(root, "load_lora_adapter"):
            raise refusal(edits[0].site, f"a {kind}, which has no loader for a LoRA", "use bake")
        return "vae" if part == "vae" else "unet" if "UNet" in kind else "transformer"
    name = next((name for name, module in pipe.components.items() if module is root), part)
    loadable = getattr(pipe, "_lora_loadable_modules", ())
    if edits and name not in loadable:
        allowed = ", ".join(loadable) or "nothing"
        why = f"the {name} of a {type(pipe).__name__}, whose loader takes {allowed}"
        raise refusal(edits[0].site, why, "use bake, or bake_lora for the model on its own")
    for edit in edits:
        if name.startswith("text_encoder") and not edit.path.endswith(_OF_TEXT):
            raise refusal(
                edit.site, f"the layer {edit.path} of the {name}, which loaders of a LoRA leave out", "use bake"
            )
    return name


def _pipeline(obj: Any) -> Any:
    """The diffusers pipeline in `obj`, None where it is a model."""
    for candidate in (obj, getattr(obj, "pipe", None)):
        if candidate is not None and not isinstance(candidate, nn.Module) and hasattr(candidate, "components"):
            return candidate
    return None


def _layer(module: Any, edits: list[Edit], rank: int | None) -> LoraLayer:
    site = edits[0].site
    if getattr(module, "groups", 1) != 1:
        raise refusal(site, "a grouped convolution, which a LoRA cannot hold", "use bake")
    before, matrix = Matrix(module), Matrix(module, record=True)
    for edit in edits:
        edit.on(matrix)
    out, width = matrix.weight.shape
    needed = sum(up.shape[1] for up, _ in matrix.factors)
    if needed > (rank or needed):
        (up, down), error = _truncated(matrix.weight - before.weight, rank or needed)
    elif rank is None and needed * (out + width) > out * width:
        fix = "give rank=... for the closest LoRA of that rank, or use bake"
        raise refusal(site, f"a change of rank {needed} of {out} x {width} weights: it scales most channels", fix)
    else:
        up = torch.cat([up for up, _ in matrix.factors] or [matrix.weight.new_zeros(out, 1)], 1)
        down = torch.cat([down for _, down in matrix.factors] or [matrix.weight.new_zeros(1, width)])
        error = 0.0
    bias = (matrix.bias - before.bias).float()
    weight = module.weight
    if weight.dim() > 2:
        up, down = up.view(*up.shape, *[1] * (weight.dim() - 2)), down.view(len(down), *weight.shape[1:])
    return LoraLayer(up.float(), down.float(), bias, error)


def _truncated(change: Tensor, rank: int) -> tuple[Factors, float]:
    """The closest product of `rank`, and the part of the change's length that it leaves out."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    error = (s[rank:].square().sum() / s.square().sum()).sqrt()
    return (u[:, :rank] * root, root[:, None] * v[:rank]), float(error)
