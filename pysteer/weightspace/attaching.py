"""An adapter on a pipeline at a strength, without files, and what it shifts: weights and activations side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.steering import Plan, SiteParameters
from pysteer.weightspace.adapter import Adapter
from pysteer.weightspace.farm.many import Factors, many_adapters

_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def by_part(adapters: Sequence[Adapter]) -> dict[str, Factors]:
    """Factors of adapters with the same layers, padded to one rank and with their scales multiplied in, by component.

    Raises:
        InputError: adapters with different layers, or with layers of convolutions.
    """
    names = set(adapters[0].layers)
    parts: dict[str, Factors] = {}
    for adapter in adapters:
        if set(adapter.layers) != names or any(it.kernel for it in adapter.layers.values()):
            raise InputError("adapter to attach", value=adapter.name, allowed="linear layers, the same in all adapters")
    for layer in adapters[0].layers:
        component, _, path = layer.partition(".")
        own = parts.setdefault(component, Factors({}, {}))
        its = [adapter.layers[layer] for adapter in adapters]
        widest = max(it.rank for it in its)
        pad = torch.nn.functional.pad
        own.down[path] = torch.stack([pad(it.down, (0, 0, 0, widest - it.rank)) for it in its])
        own.up[path] = torch.stack([pad(it.up * it.scale, (0, widest - it.rank)) for it in its])
    return parts


@contextmanager
def attached(pipe: Any, adapters: Adapter | Sequence[Adapter], strength: float = 1.0, rows: int = 1) -> Iterator[None]:
    """Run a pipeline with adapters while the block lasts; the weights stay as they are.

    Args:
        pipe: a diffusers pipeline, or an `ImageGenerator`.
        adapters: one for all rows, or A of them, which share out the prompts: the first `rows` prompts get the first.
        strength: factor on the changes.
        rows: prompts per adapter in a call.

    Raises:
        InputError: a layer that the pipeline does not have, or of another size.
    """
    many = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    inner = getattr(pipe, "pipe", pipe)
    with ExitStack() as stack:
        for component, factors in by_part(many).items():
            root = getattr(inner, component, None) if component in _PARTS else None
            if root is None:
                raise InputError("component of the adapter", value=component, allowed="one that the pipeline has")
            _check(root, component, factors)
            device = next(root.parameters()).device
            placed = Factors(*({k: v.to(device) for k, v in part.items()} for part in (factors.down, factors.up)))
            # One adapter for every row, however many there are: a row group of its own each.
            size = rows if len(many) > 1 else 1
            stack.enter_context(many_adapters(root, placed, torch.full((len(many),), strength, device=device), size))
        yield


def _check(root: Any, component: str, factors: Factors) -> None:
    modules = dict(root.named_modules())
    for path, down in factors.down.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear):
            raise InputError("layer of the adapter", value=f"{component}.{path}", allowed="linear layers of the model")
        shape = (factors.up[path].shape[1], down.shape[2])
        if tuple(module.weight.shape) != shape:
            raise InputError(f"size of {path}", value=list(shape), allowed=str(list(module.weight.shape)))


@torch.no_grad()
def layer_inputs(pipe: Any, layers: Sequence[str], prompts: Sequence[str], seeds: int = 0, **settings: Any
                 ) -> dict[str, Tensor]:  # fmt: skip
    """Mean input fp32 `[S, in]` of linear layers of the UNet at every step, over rows and tokens.

    Args:
        pipe: an `ImageGenerator` with a UNet; `settings` are those of its call (guidance_scale=1 for one half).
        layers: names as in an adapter, `unet.PATH`.
    """
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:
        module = pipe.pipe.unet.get_submodule(layer.removeprefix("unet."))

        def note(module: nn.Module, given: tuple[Tensor, ...], layer: str = layer) -> None:
            found[layer].append(given[0].float().flatten(0, -2).mean(0).cpu())

        hooks.append(module.register_forward_pre_hook(note))
    try:
        pipe(list(prompts), seeds=seeds, decode=False, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.stack(values) for layer, values in found.items()}


def predicted_shifts(adapter: Adapter, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean shift `dW h` fp32 `[S, out]` of every layer's output that its change predicts for mean inputs `[S, in]`.

    It is exact for the layer's own part (`dW` is linear); what earlier layers do to `h` comes on top.
    """
    shifts = {}
    for layer, it in adapter.layers.items():
        if layer in inputs:
            shifts[layer] = it.scale * (inputs[layer] @ it.down.T) @ it.up.T
    return shifts


def plan_of(shifts: Mapping[str, Tensor]) -> Plan:
    """A steering plan that adds predicted shifts at the outputs of the layers, a set per step.

    With it the same edit is made in activations: `pysteer.steer(pipe, plan_of(shifts), strength=t)` beside
    `attached(pipe, adapter, strength=t)`.
    """
    sites = [
        SiteParameters(layer.removeprefix("unet."), "affine_shift", tuple(range(len(shift))),
                       {"gain": torch.ones_like(shift), "bias": shift})
        for layer, shift in shifts.items()
    ]  # fmt: skip
    return Plan.build(sites)


def shift_cosines(shifts: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Cosines fp32 `[S]` between predicted shifts and the shifts of an activation-steering plan at the same layers.

    Args:
        shifts: fp32 `[S, out]` by layer, of `predicted_shifts`.
        plan: of a method that adds a vector per step, such as `MeanDifference` fitted at the same sites.

    Raises:
        InputError: the plan has none of the layers, or other numbers of steps.
    """
    found = {}
    for parameters in plan.parameters:
        layer = f"unet.{parameters.site}"
        if layer in shifts and "bias" in parameters.tensors:
            own, other = shifts[layer], parameters.tensors["bias"].float()
            if other.shape[0] not in (1, own.shape[0]):
                raise InputError(f"steps of the plan at {layer}", value=len(other), allowed=str(len(own)))
            found[layer] = torch.nn.functional.cosine_similarity(own, other.expand_as(own), dim=1)
    if not found:
        raise InputError("sites of the plan", value=len(plan.parameters), allowed="layers of the adapter")
    return found
