"""Which weights make the activation of a site, or read it: where a map can be put exactly."""

import copy
from typing import Any

import torch
from torch import nn

from pysteer.steering.folding import tables
from pysteer.steering.folding.maps import AffineMap, refusal
from pysteer.steering.folding.weights import (
    Edit,
    check_weights,
    check_width,
    class_name,
    is_linear,
    is_norm,
    is_pointwise,
    norm_origin,
    plain_class,
)
from pysteer.steering.site import Site

_ENDS = {  # the last layer of attention and MLPs outside diffusers, by what such modules call it
    "o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "proj", "wo", "o",
}  # fmt: skip
_ENDING = ("attention", "attn", "mlp", "ffn", "feedforward", "t5dense")
_BIAS_FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}  # of a configuration, by the module that has the layer
_NO_BIAS = "a shift at {}, for which a {} has no bias"


class Places:
    """Finds the weights for the sites of one part of a model.

    Args:
        root: what the paths of the sites start from.
        lora: only weights of linear layers and convolutions may change, and each may be given a bias.
    """

    def __init__(self, root: nn.Module, lora: bool = False) -> None:
        self.root = root
        self.lora = lora
        self._with_bias: dict[str, nn.Module | None] = {}
        self._users: dict[int, dict[int, str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            for name, parameter in module._parameters.items():
                self._users.setdefault(id(parameter), {}).setdefault(id(module), f"{path}.{name}")

    def edits(self, site: Site, change: AffineMap) -> list[Edit]:
        """The changes of weights that do at `site` what `change` says.

        Raises:
            InputError: none do exactly; names the site and why. Nothing has been changed.
        """
        module = self.root.get_submodule(site.path)
        found = [] if change.does_nothing else self._edits(site, module, change)
        for edit in found:
            self._check(site, edit)
        return found

    def _edits(self, site: Site, module: nn.Module, change: AffineMap) -> list[Edit]:
        element = site.element if isinstance(site.element, int) else 0
        owner = self.root.get_submodule(site.path.rpartition(".")[0])
        if getattr(owner, "fused_projections", False) and site.path.endswith(tables.BYPASSED):
            raise refusal(site.name, "a projection that is bypassed by a fused one", "unfuse the projections first")
        if element == 0 and is_linear(module):
            return [Edit(site.name, site.path, change)]
        if element == 0 and plain_class(module) is nn.Embedding and not self.lora:
            return [Edit(site.name, site.path, change, "embedding")]
        found = None
        if is_norm(module):
            found = self._at_norm(site, module, change)
        elif not change.mixes:
            found = self._modulated(site, module, element, change)
        found = found or self._at_end(site, module, element, change) or self._before_readers(site, element, change)
        if not found:
            raise self._no_place(site, module, change)
        return found

    def _at_norm(self, site: Site, norm: Any, change: AffineMap) -> list[Edit] | None:
        """In the norm itself; what it has no weights for goes to the layers that read it."""
        if self.lora or change.mixes:
            return None
        if norm_origin(norm) is None:
            raise refusal(site.name, f"a {class_name(norm)}, whose weights act in a way that is not known")
        if not change.shifts or getattr(norm, "bias", None) is not None:
            return [Edit(site.name, site.path, change, "norm")]
        gain = AffineMap.diagonal(change.gain, torch.zeros_like(change.shift))
        shift = AffineMap.diagonal(torch.ones_like(change.gain), change.shift)
        behind = self._before_readers(site, 0, shift)
        if not behind:
            raise refusal(site.name, "a shift behind a norm that has no bias, read by layers that are not known")
        return [*([Edit(site.name, site.path, gain, "norm")] if change.scales else []), *behind]

    def _modulated(self, site: Site, module: nn.Module, element: int, change: AffineMap) -> list[Edit] | None:
        """In the layer that makes shift and scale of `norm(x) (1 + scale) + shift`: behind them, or behind the norm."""
        chunks, by_element = tables.modulation(module)
        path, kind, pairs = f"{site.path}.linear", "modulation", [by_element[element]] if element in by_element else []
        if not chunks:
            stem, _, child = site.path.rpartition(".")
            layer, chunks, pairs = tables.modulated_by(self.root.get_submodule(stem), child)
            path, kind = f"{stem}.{layer}", "normed"
        if not pairs or (change.shifts and any(shift is None for shift, _ in pairs)):
            return None
        linear: Any = self.root.get_submodule(path)
        width = linear.out_features // chunks
        check_width(site.name, width, change)
        rows = [slice(k * width, (k + 1) * width) for k in range(chunks)]
        return [Edit(site.name, path, change, kind, scale=rows[scale], shift=None if shift is None else rows[shift])
                for shift, scale in pairs]  # fmt: skip

    def _at_end(self, site: Site, module: nn.Module, element: int, change: AffineMap) -> list[Edit] | None:
        """In the last layer of a module, or of the branch that it adds to its input."""
        last, residual, divisor = tables.last_layer(module, element)
        if not last and not tables.from_diffusers(module) and element == 0:
            last, residual, divisor = _end_by_name(module), False, 1.0
        if not last or not is_linear(_find(module, last)) or (residual and not change.only_shifts):
            return None
        return [Edit(site.name, f"{site.path}.{last}", change.scaled(divisor))]

    def _before_readers(self, site: Site, element: int, change: AffineMap) -> list[Edit] | None:
        """In all layers that read the activation, where it is known which do."""
        for depth in (1, 2):
            names = site.path.split(".")
            if len(names) <= depth:
                return None
            stem, child = ".".join(names[:-depth]), ".".join(names[-depth:])
            owner = self.root.get_submodule(stem)
            paths = tables.readers(owner, child, element)
            if paths:
                break
        layers = {path: _find(owner, path) for path in paths}
        if not layers or not all(layer is not None and is_pointwise(layer) for layer in layers.values()):
            return None
        width = len(change.gain)  # the last layer of a single block of Flux reads more behind these
        return [Edit(site.name, f"{stem}.{path}", change, "inputs", slice(0, width)) for path in layers]

    def _no_place(self, site: Site, module: nn.Module, change: AffineMap) -> Exception:
        kind = class_name(module)
        inside = [name for name, layer in module.named_modules() if is_linear(layer)]
        fix = f"steer {site.path}.{inside[-1]} if that is meant, or leave the site out" if inside else ""
        if hasattr(module, "base_layer"):
            return refusal(site.name, "an adapter on the layer", "merge it into the weights first")
        if isinstance(getattr(module, "weight", None), torch.Tensor) and not is_norm(module) and kind != "Embedding":
            return refusal(site.name, f"a {kind}: quantised or foreign weights", "load the model without quantisation")
        if self.lora and (is_norm(module) or kind == "Embedding"):
            return refusal(site.name, f"a {kind}, which a LoRA cannot hold and whose readers are not known", "use bake")
        if "norm" in kind.lower():
            return refusal(
                site.name, f"a {kind} with a map for which neither it nor what is known to read it has a place"
            )
        if tables.is_residual(module):
            return refusal(site.name, f"a {kind}, a residual stream, which takes a constant at most", fix)
        return refusal(site.name, f"a {kind}, which does not end in one linear layer", fix)

    def _check(self, site: Site, edit: Edit) -> None:
        module: Any = self.root.get_submodule(edit.path)
        sharing = self._users.get(id(getattr(module, "weight", None)), {})
        check_weights(site.name, module, list(sharing.values()))
        if edit.kind in ("outputs", "inputs"):
            weight = module.weight
            conv1d = class_name(module) == "Conv1D"
            if edit.kind == "outputs":
                check_width(site.name, weight.shape[-1] if conv1d else weight.shape[0], edit.change)
            elif weight.shape[0 if conv1d else 1] < len(edit.change.gain):
                check_width(site.name, weight.shape[0 if conv1d else 1], edit.change)
            if edit.change.mixes and getattr(module, "groups", 1) != 1:
                raise refusal(site.name, "a map that mixes the channels of a grouped convolution")
        elif edit.kind in ("norm", "embedding"):
            check_width(site.name, module.weight.shape[-1], edit.change)
        if edit.needs_bias and getattr(module, "bias", None) is None and not self.lora:
            self._check_room(site, edit.path)

    def _check_room(self, site: Site, path: str) -> None:
        """Refuse a shift at a layer without a bias, unless the class of the model takes one there."""
        config = getattr(self.root, "config", None)
        if config is None:
            return
        flag = bias_flag(config, path)
        fresh = self._fresh(config, flag) if flag else None
        layer = _find(fresh, path) if fresh is not None else None
        if getattr(layer, "bias", None) is None:
            raise refusal(
                site.name, _NO_BIAS.format(path, type(config).__name__), "leave out the shift, or try bake_lora"
            )

    def _fresh(self, config: Any, flag: str) -> nn.Module | None:
        """An empty model of the same class with biases: says whether a saved one would be loaded whole."""
        if flag not in self._with_bias:
            altered = copy.deepcopy(config)
            setattr(altered, flag, True)
            kind: Any = plain_class(self.root)
            with torch.device("meta"):
                self._with_bias[flag] = kind(altered)
        return self._with_bias[flag]


def bias_flag(config: Any, path: str) -> str:
    """The entry of a configuration that gives the layers beside `path` a bias, "" for none."""
    flag = _BIAS_FLAGS.get(path.rpartition(".")[0].rpartition(".")[2], "")
    return flag if flag and hasattr(config, flag) else ""


def add_bias(root: Any, path: str) -> None:
    """Give a layer a bias of 0; where the configuration says which layers have one, all of its kind get one."""
    config = getattr(root, "config", None)
    layers = [root.get_submodule(path)]
    if config is not None:
        flag = bias_flag(config, path)
        setattr(config, flag, True)
        kind = path.rpartition(".")[0].rpartition(".")[2]
        layers = [layer for name, layer in root.named_modules()
                  if name.rpartition(".")[0].rpartition(".")[2] == kind and type(layer) is nn.Linear]  # fmt: skip
    for layer in layers:
        if layer.bias is None:
            zero = torch.zeros_like(layer.weight.flatten(1)[:, 0])
            layer.bias = nn.Parameter(zero, requires_grad=layer.weight.requires_grad)


def _end_by_name(module: nn.Module) -> str:
    """The last layer of an attention or an MLP outside diffusers, "" where it is not plain."""
    if not any(word in class_name(module).lower() for word in _ENDING):
        return ""
    ends = [name for name, child in module.named_children() if name in _ENDS and is_linear(child)]
    # The end has to be the whole output: a block that adds a residual or holds several such layers is none.
    blocks = [child for child in module.children() if not is_linear(child) and len(list(child.children()))]
    return ends[0] if len(ends) == 1 and not blocks else ""


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
