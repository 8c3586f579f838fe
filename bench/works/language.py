"""Work with SmolLM2-135M (its real weights): a mean shift at every block, or a diagonal map at every norm.

Kinds of contenders are `SITES/HOW`, such as `blocks/pysteer compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.baselines import hooks
from bench.serving import Prepared
from bench.works.decoding import Decoder, find, levels, one_by_one
from pysteer.files import read_json, write_json

WIDE = 1e6  # bounds that everything lies within, as ml-act has them by default for Gaussian maps


def write_case(folder: Path, layers: int | None = None) -> None:
    """The model and what steers it, for all contenders of ours and of others.

    Args:
        folder: gets `model/` (transformers) and `case.safetensors`.
        layers: how many layers are kept, None for all.
    """
    if (folder / "case.safetensors").is_file():
        return
    from transformers import LlamaForCausalLM

    from pysteer.models.language import smollm2

    model = smollm2().model
    config = model.config
    if layers is not None:
        keep_layers(model, layers)
    if hasattr(config, "quantization_config"):  # of the file it came from; the weights are plain fp32 now
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "model")
    _for_older_versions(folder / "model" / "config.json")
    generator = torch.Generator().manual_seed(0)
    width = config.hidden_size
    case: dict[str, Tensor] = {}
    for i in range(config.num_hidden_layers):
        case[f"blocks.{i}.bias"] = 0.3 * torch.randn(width, generator=generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            case[f"norms.{i}.{norm}.gain"] = 1 + 0.2 * torch.randn(width, generator=generator)
            case[f"norms.{i}.{norm}.bias"] = 0.05 * torch.randn(width, generator=generator)
    save_file(case, folder / "case.safetensors")


def keep_layers(model: Any, layers: int) -> None:
    """Cut a model down to its first layers."""
    config = model.config
    model.model.layers = model.model.layers[:layers]
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers] if getattr(config, "layer_types", None) else None


def _for_older_versions(path: Path) -> None:
    """Say the base of the rotary embedding where transformers 4 looks for it; else it silently takes another one."""
    config = read_json(path, "configuration of the model")
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        write_json(path, {**config, "rope_theta": rotary["rope_theta"]})


def load_model(folder: Path) -> Any:
    """The model of the case, fp32, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


def maps(folder: Path, sites: str, layers: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> gain and bias `[D]`, of the first so many layers."""
    case = load_file(folder / "case.safetensors")
    found = {}
    for name, bias in case.items():
        kind, layer, *rest = name.split(".")
        if kind == sites and rest[-1] == "bias" and int(layer) < layers:
            path = ".".join([f"model.layers.{layer}", *rest[:-1]])
            found[path] = (case.get(name.replace("bias", "gain"), torch.ones_like(bias)), bias)
    return found


def _with_pysteer(model: Any, folder: Path, sites: str) -> tuple[Any, Any]:
    import pysteer
    from pysteer.steering import Plan, SiteParameters

    entries = []
    for path, (gain, bias) in maps(folder, sites, len(model.model.layers)).items():
        banks = {"gain": gain[None], "bias": bias[None]}
        if sites == "norms":
            banks |= {"low": torch.full_like(bias, -WIDE)[None], "high": torch.full_like(bias, WIDE)[None]}
        entries.append(SiteParameters(path, "affine_shift", None, banks))
    return model, pysteer.steer(model, Plan.build(entries)).__enter__()


def _with_reference(gain: Tensor, bias: Tensor, strength: Tensor) -> hooks.Hook:
    """Our own reference in a hook, to be compiled: the opponent that is hardest to beat."""
    from pysteer.ops.affine_shift import affine_shift_reference

    clock = torch.zeros((), dtype=torch.int64)

    def hook(module: Any, args: Any, output: Any) -> Any:
        x, rest = hooks.first(output)
        slot = torch.ones(1, x.shape[0], dtype=torch.int32)
        table = strength.expand(1, x.shape[0])
        banks = (torch.stack([torch.ones_like(gain), gain]), torch.stack([torch.zeros_like(bias), bias]))
        return hooks.again(affine_shift_reference(x, *banks, slot, table, clock), rest)

    return hook


def _attach(model: Any, folder: Path, sites: str, how: str) -> Callable[[float], None]:
    """Steer `model` in one of the ways of others; returns what sets the strength."""
    lever: hooks.Lever = [1.0]
    tensor = torch.ones(1, 1)

    def set_strength(value: float) -> None:
        lever[0] = value
        tensor.fill_(value)

    for path, (gain, bias) in maps(folder, sites, len(model.model.layers)).items():
        module = model.get_submodule(path)
        low, high = torch.full_like(bias, -WIDE), torch.full_like(bias, WIDE)
        if how == "repeng":
            number = int(path.split(".")[2])
            model.model.layers[number] = hooks.RepengBlock(module, bias, lever)
            continue
        made = {
            "hooks": lambda g=gain, b=bias: hooks.add(b, lever) if sites == "blocks" else hooks.affine(g, b, lever),
            "linear-act": lambda g=gain, b=bias, lo=low, hi=high: hooks.linear_act(g, b, lo, hi, lever),
            "gaussian-act": lambda g=gain, b=bias, lo=low, hi=high: hooks.gaussian_act(g, b, lo, hi, lever),
            "reference": lambda g=gain, b=bias: _with_reference(g, b, tensor),
        }[how]
        module.register_forward_hook(made())
    return set_strength


def prepare(kind: str, folder: Path, work_name: str) -> Prepared:
    """A contender of this part with a work."""
    sites, _, how = kind.partition("/")
    how, _, mode = how.partition(" ")
    work = find(work_name)
    model, handle = load_model(folder), None
    if work.layers:
        keep_layers(model, work.layers)
    set_strength: Callable[[float], None] = lambda value: None  # noqa: E731
    if how == "pysteer":
        model, handle = _with_pysteer(model, folder, sites)
    elif how != "unsteered":
        set_strength = _attach(model, folder, sites, how)
    if work.layers:
        model = model.model
    call = torch.compile(model, dynamic=False) if mode == "compiled" else None
    swept = levels(work.strengths)
    if swept and handle is not None:  # a batch holds a row per strength
        decoder = Decoder(model, work, call, rows=len(swept))
        handle.strength = torch.tensor(swept)
        return Prepared(decoder.run, decoder.run, len(swept) * work.new, setup=decoder.setup)
    decoder = Decoder(model, work, call)
    if swept:
        return Prepared(
            lambda: one_by_one(decoder, set_strength, swept),
            lambda: one_by_one(decoder, set_strength, swept),
            len(swept) * work.new,
        )
    return Prepared(decoder.run, decoder.run, work.batch * (work.new or work.prompt), setup=decoder.setup)
