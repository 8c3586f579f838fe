"""The same operations at inference: on activations, through the steering table, with the weights left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pysteer.dynamics.classify import DeadChannels
from pysteer.dynamics.interventions import Operation
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.steering.plan import Plan, SiteParameters


def nudge_plan(model: Any, dead: DeadChannels, operation: Operation, *, rows: str = "both") -> Plan:
    """A plan that does to the output of a norm what `operation` would do to its scale.

    With y = gamma z + beta and a new scale gamma' the new output is beta + g (y - beta), g = gamma' / gamma: an affine
    map per channel, exact up to rounding. The operation is applied once; strength 1 is all of it.

        with pysteer.steer(vae, nudge_plan(vae, dead, Scale(1.5))):
            images = vae.decode(latents).sample

    Args:
        model: a model or pipeline of a known family.
        dead: what a classifier found at outputs of norms.
        operation: `Scale`, `Add` or `Reset`.
        rows: "cond", "uncond" or "both".

    Raises:
        InputError: nothing is dead; a layer that is no site; a scale of 0, whose z cannot be seen in y.
    """
    family = find_family(model)
    sites = family.sites(model)
    parameters = []
    for name, layer in dead.layers.items():
        if not len(layer.indices):
            continue
        path = name.rpartition(".")[0]
        site = next((site for site in sites.values() if site.path == path), None)
        if site is None:
            raise InputError("layer is no site of the model", value=path, fix="watch a layer of this model")
        module = dict(family.root(model, site.part).named_modules()).get(path)
        gain, bias = _affine(name, module, layer.indices, operation)
        parameters.append(SiteParameters(site.name, "affine_shift", None, {"gain": gain, "bias": bias}))
    if not parameters:
        raise InputError("dead channels to nudge", value="none", allowed="at least one", fix="raise the threshold")
    return Plan.build(parameters, rows=rows)


def _affine(name: str, module: Any, channels: Tensor, operation: Operation) -> tuple[Tensor, Tensor]:
    """Gain and bias `[1, C]` fp32 of the map on the outputs of a norm."""
    weight, shift = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise InputError(f"nudge of activations at {name}", value=type(module).__name__, allowed="norms with a scale")
    scale = weight.detach().double().cpu()
    old = scale[channels]
    if bool((old == 0).any()):
        channel = int(channels[old == 0][0])
        fix = "nudge the parameter itself with Nudger(model, Add(...))"
        raise InputError(f"scale of channel {channel} of {name}", value=0.0, allowed="not 0", fix=fix)
    gain = torch.ones_like(scale)
    gain[channels] = operation.scales(old) / old
    beta = torch.zeros_like(scale) if shift is None else shift.detach().double().cpu()
    return gain.float()[None], ((1 - gain) * beta).float()[None]
