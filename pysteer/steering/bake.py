"""Fold a plan into the weights of a copy of a model: what is left is an ordinary model that costs nothing extra.

Exact, up to the rounding of the weights, for affine maps `a x + c` (a = 1 + s (gain - 1), c = s bias) behind

    Linear, Conv1D, Conv     W' = a W, bias' = a bias + c
    LayerNorm, GroupNorm     weight' = a weight, bias' = a bias + c
    RMSNorm                  weight' = a weight (Gemma: a (1 + weight) - 1); c goes on as W c into the bias of every
                             linear layer that reads the norm, where the model's layout says which those are
    Embedding                weight' = a weight + c, unless the output layer shares it

and for blocks that end in one of them. Everything else is refused by name: supports, prototypes, schedules that change
with the step, strengths per row, residual streams, quantised or shared weights.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.steering.plan import Plan, PlanEntry
from pysteer.steering.site import Site

_ENDS = {  # the last layer of a module, by what such modules call it
    "o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "proj", "wo", "o",
}  # fmt: skip
_ENDING = ("attention", "attn", "mlp", "ffn", "feedforward")
_READERS = {  # norms without a bias, and the linear layers beside them that read it
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_BIAS_FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}  # of a configuration, by the module that has the layer


def bake(obj: Any, plan: Plan, *, strength: float = 1.0, inplace: bool = False) -> Any:
    """Return a plain model that does what `obj` does under `plan`.

    Args:
        obj: a model or pipeline of a known family.
        plan: affine maps, the same at every step and for every row.
        strength: factor on the plan's schedule, one number.
        inplace: change `obj` itself instead of a copy. What was folded before an error stays folded then.

    Returns:
        The copy, or `obj`. A transformers model can be saved with `save_pretrained` and loaded without pysteer.

    Raises:
        InputError: something that cannot be folded exactly; names the site and why.
    """
    from pysteer.families.base import find_family

    family = find_family(obj)
    known = family.sites(obj)
    steps = {site.part: family.steps(obj, site.part) for site in known.values()}
    for entry in plan.entries:
        entry.check(known, steps)
    maps = [(known[e.parameters.site], _affine(e, steps[known[e.parameters.site].part], strength, family.announced))
            for e in plan.entries]  # fmt: skip
    for site, _ in maps:  # before anything is copied or changed
        _target(family.root(obj, site.part), site)
    result = obj if inplace else copy.deepcopy(obj)
    with torch.no_grad():
        for site, (gain, shift) in maps:
            root = family.root(result, site.part)
            path, module = _target(root, site)
            _fold(root, path, module, site, gain.to(_device(module)), shift.to(_device(module)))
    return result


def _refuse(site: str, why: str, fix: str = "leave the site out, or steer instead") -> InputError:
    return InputError(f"site {site} cannot be folded", value=why, allowed="see pysteer.bake", fix=fix)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _affine(entry: PlanEntry, steps: int, strength: float, both: bool) -> tuple[Tensor, Tensor]:
    """Gain and shift `[D]` fp64 of an entry that is the same at every step, and for cond and uncond rows if `both`."""
    parameters = entry.parameters
    name = parameters.site
    if parameters.op != "affine_shift" or set(parameters.tensors) != {"gain", "bias"} or parameters.options:
        what = parameters.op + "".join(f" with {key}" for key in sorted({*parameters.tensors, *parameters.options}))
        raise _refuse(name, what, "only maps gain x + bias of whole activations can be folded")
    found = set()
    for step in range(steps):
        cond, uncond = entry.at(step)
        if both and cond != uncond:
            raise _refuse(name, "different strengths for cond and uncond rows", 'use rows="both"')
        which = 0 if parameters.steps is None else parameters.steps.index(step) if step in parameters.steps else -1
        gain, bias = (parameters.tensors[key][which].double() for key in ("gain", "bias"))
        s = cond * strength if which >= 0 else 0.0
        found.add((tuple((1 + s * (gain - 1)).tolist()), tuple((s * bias).tolist())))
        if len(found) > 1:
            raise _refuse(name, "parameters or strengths that change with the step")
    slope, offset = found.pop()
    return torch.tensor(slope, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64)


def _norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def _foldable(module: nn.Module) -> bool:
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return type(module) in plain or _class_name(module) == "Conv1D" or _norm(module)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _target(root: nn.Module, site: Site) -> tuple[str, nn.Module]:
    """The module whose weights make the activation of a site: the site's own, or the one it ends in."""
    module = root.get_submodule(site.path)
    if _foldable(module):
        path = site.path
    else:
        ends = [name for name, child in module.named_children() if name in _ENDS and _foldable(child)]
        # The end has to be the whole output: a block that adds a residual or holds several such layers is none.
        inner = [
            name for name, child in module.named_children() if not _foldable(child) and len(list(child.children()))
        ]
        if len(ends) != 1 or inner:
            raise _refuse(site.name, f"a {_class_name(module)}, which does not end in one linear layer")
        path, module = f"{site.path}.{ends[0]}", module.get_submodule(ends[0])
    weight = module.weight
    sharing = [name for name, other in root.named_parameters(remove_duplicate=False) if other is weight]
    if len(sharing) > 1:
        raise _refuse(site.name, f"weights shared by {', '.join(sharing)}", "untie them first")
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise _refuse(site.name, "quantised weights")
    return path, module


def _fold(root: nn.Module, path: str, module: Any, site: Site, gain: Tensor, shift: Tensor) -> None:
    weight = module.weight
    if len(gain) != (weight.shape[-1] if _class_name(module) in ("Conv1D", "Embedding") else weight.shape[0]):
        raise _refuse(site.name, f"parameters of width {len(gain)} for weights {list(weight.shape)}", "fit them again")
    if isinstance(module, nn.Embedding):
        weight.copy_(gain * weight.double() + shift)
        return
    if _norm(module):
        centred = float("Gemma" in _class_name(module))  # its norm multiplies by 1 + weight
        weight.copy_(gain * (weight.double() + centred) - centred)
    elif _class_name(module) == "Conv1D":
        weight.copy_(weight.double() * gain)
    else:
        weight.copy_(gain.view(-1, *[1] * (weight.dim() - 1)) * weight.double())
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_(gain * bias.double() + shift)
    elif bool((shift != 0).any()):
        if _norm(module) and not isinstance(module, nn.LayerNorm | nn.GroupNorm):
            _push(root, path, site, shift)
        else:
            _add_bias(root, path, module, site, shift)


def _push(root: nn.Module, path: str, site: Site, shift: Tensor) -> None:
    """Give the shift behind a norm without a bias to the layers that read it: W (x + c) = W x + W c."""
    stem, _, name = path.rpartition(".")
    block = root.get_submodule(stem)
    readers = _READERS.get(name, ())
    before_mlp = name != "post_attention_layernorm" or not hasattr(block, "pre_feedforward_layernorm")
    layers = [(f"{stem}.{reader}", _find(block, reader)) for reader in readers]
    if not readers or not before_mlp or any(type(layer) is not nn.Linear for _, layer in layers):
        raise _refuse(site.name, "a shift behind a norm that has no bias, read by layers that are not known")
    for where, layer in layers:
        assert isinstance(layer, nn.Linear)
        addition = layer.weight.double() @ shift
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() + addition)
        else:
            _add_bias(root, where, layer, site, addition)


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _add_bias(root: Any, path: str, module: Any, site: Site, shift: Tensor) -> None:
    """Give a layer a bias; where a configuration says which layers have one, all of its kind get one."""
    owner, _, _ = path.rpartition(".")
    flag = _BIAS_FLAGS.get(owner.rpartition(".")[2], "")
    config = getattr(root, "config", None)
    if config is None:
        module.bias = nn.Parameter(shift.to(module.weight))
        return
    if not hasattr(config, flag):
        raise _refuse(site.name, f"a shift at {path}, for which a {type(config).__name__} has no bias")
    if not getattr(config, flag):
        setattr(config, flag, True)
        kind = owner.rpartition(".")[2]
        for name, other in root.named_modules():
            beside = name.rpartition(".")[0].rpartition(".")[2] == kind
            if beside and type(other) is nn.Linear and other.bias is None:
                other.bias = nn.Parameter(torch.zeros_like(other.weight[:, 0]))
    module.bias.copy_(module.bias.double() + shift)
