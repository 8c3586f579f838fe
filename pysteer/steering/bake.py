"""Fold a plan into the weights of a copy of a model: what is left is an ordinary model that costs nothing extra.

Exact, up to the rounding of the weights, for maps `A x + c` that are the same for every token, row and step:
`affine_shift` (A diagonal), `low_rank_shift` and `sae_edit` without a gate (A = 1 + s U V'). They go into

    Linear, Conv1D, Conv        W' = A W, bias' = A bias + c; also where it is the last layer of attention or an MLP
    LayerNorm, GroupNorm        weight' = a weight, bias' = a bias + c
    RMSNorm                     weight' = a weight (Gemma: a (1 + weight) - 1); c goes on into the layers that read it
    modulated norms of DiTs     scale' = a (1 + scale) - 1 and shift' = a shift + c in the layer that makes them; behind
                                the norm alone, shift' = shift + c (1 + scale)
    what only known layers read W' = W A, bias' = bias + W c: norms with a map that mixes channels, a gated activation
    Embedding                   weight' = A weight + c, unless the output layer shares it

A residual stream takes a constant c alone, into the bias of the branch added last. Everything else is refused by name
before anything is changed: supports, prototypes, gates, schedules that change with the step, strengths per row,
positions, outputs with readers that are not known, quantised or shared weights.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pysteer.errors import InputError
from pysteer.steering.folding.lora import Lora, LoraLayer, lora_layers
from pysteer.steering.folding.maps import AffineMap, map_of
from pysteer.steering.folding.places import Places, add_bias
from pysteer.steering.folding.weights import Edit, Matrix
from pysteer.steering.plan import Plan
from pysteer.steering.site import Site

__all__ = ["Lora", "LoraLayer", "bake", "bake_lora", "find_edits"]


def bake(obj: Any, plan: Plan, *, strength: float = 1.0, positions: Any = "all", inplace: bool = False) -> Any:
    """Return a plain model that does what `obj` does under `plan`.

    Args:
        obj: a model or pipeline of a known family.
        plan: affine maps, the same at every step and for every row; what stands at one site is applied in order.
        strength: factor on the plan's schedule, one number.
        positions: "all"; a model without pysteer cannot tell tokens apart.
        inplace: change `obj` itself instead of a copy.

    Returns:
        The copy, or `obj`. A model of transformers or diffusers can be saved with `save_pretrained` and loaded without
        pysteer. Baking it again adds to what was baked. Padding, which steering leaves alone where a mask says so, is
        changed like all tokens.

    Raises:
        InputError: something that cannot be folded exactly; names the site and why. Nothing has been changed then.
    """
    from pysteer.families.base import find_family

    edits = find_edits(obj, plan, strength=strength, positions=positions)
    family = find_family(obj)
    result = obj if inplace else copy.deepcopy(obj)
    with torch.no_grad():
        for part, found in edits.items():
            _fold(family.root(result, part), found)
    return result


def bake_lora(obj: Any, plan: Plan, *, strength: float = 1.0, positions: Any = "all", rank: int | None = None) -> Lora:
    """Return a LoRA that does to `obj` what `plan` does, for plain peft or the `load_lora_weights` of diffusers.

    A map of rank r, or one that scales k channels, gives exact factors of rank r + k; a shift goes into the bias of the
    LoRA (`lora_bias`), which the layer itself need not have. Norms are left alone, and the layers that read them
    changed.

    Args:
        obj, plan, strength, positions: as for `bake`.
        rank: highest rank of a layer. Changes of a higher rank are cut to it, the best in the least-squares sense;
            `Lora.errors` says what that leaves out. None refuses changes whose factors are larger than the weight.

    Returns:
        What `Lora.save_pretrained` writes.

    Raises:
        InputError: something that cannot be folded exactly, or into no LoRA; names the site and why.
    """
    from pysteer.families.base import find_family

    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise InputError("rank of a LoRA", value=rank, allowed="a whole number from 1, or None")
    edits = find_edits(obj, plan, strength=strength, positions=positions, lora=True)
    family = find_family(obj)
    return lora_layers(obj, {part: (family.root(obj, part), found) for part, found in edits.items()}, rank)


def find_edits(
    obj: Any, plan: Plan, *, strength: float = 1.0, positions: Any = "all", lora: bool = False
) -> dict[str, list[Edit]]:
    """The changes of weights that `bake` and `bake_lora` make, by part, in their order; nothing is changed.

    Raises:
        InputError: see `bake`.
    """
    from pysteer.families.base import find_family

    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        given = list(strength.shape) if isinstance(strength, torch.Tensor) else strength
        raise InputError("strength of a baked plan", value=given, allowed="one finite number for all rows and steps")
    if not isinstance(positions, str) or positions != "all":
        fix = "steer instead, or bake for all tokens"
        raise InputError("positions of a baked plan", value=positions, allowed="all", fix=fix)
    family = find_family(obj)
    known = family.sites(obj)
    used = {known[name].part for name in (entry.parameters.site for entry in plan.entries) if name in known}
    room, steps = ({part: count(obj, part) for part in used} for count in (family.room, family.steps))
    for entry in plan.entries:
        entry.check(known, room)
    sites = [known[entry.parameters.site] for entry in plan.entries]
    maps = [
        (site, map_of(entry, steps[site.part], strength, family.announced))
        for site, entry in zip(sites, plan.entries, strict=True)
    ]
    edits: dict[str, list[Edit]] = {}
    places: dict[str, Places] = {}
    for site, change in _by_place(maps):
        if site.part not in places:
            places[site.part] = Places(family.root(obj, site.part), lora)
        edits.setdefault(site.part, []).extend(places[site.part].edits(site, change))
    return edits


def _by_place(maps: Iterable[tuple[Site, AffineMap]]) -> list[tuple[Site, AffineMap]]:
    """One map for every activation, those of inner modules first: a module and its last layer give out the same."""
    found: dict[tuple[Any, ...], tuple[Site, AffineMap]] = {}
    for site, change in maps:
        key = (site.part, site.path, site.element or 0)
        if key in found:
            first, before = found[key]
            if len(before.gain) != len(change.gain):
                raise InputError(f"width of parameters of site {site.name}", value=len(change.gain),
                                 allowed=str(len(before.gain)), fix="fit them for this model")  # fmt: skip
            found[key] = (first, before.then(change))
        else:
            found[key] = (site, change)
    return sorted(found.values(), key=lambda pair: -pair[0].path.count("."))


def _fold(root: nn.Module, edits: Iterable[Edit]) -> None:
    for path, found in _by_module(edits).items():
        module: Any = root.get_submodule(path)
        if found[0].kind in ("norm", "embedding"):
            for edit in found:
                edit.on_norm(module) if edit.kind == "norm" else edit.on_embedding(module)
            continue
        if getattr(module, "bias", None) is None and any(edit.needs_bias for edit in found):
            add_bias(root, path)
        matrix = Matrix(module)
        for edit in found:
            edit.on(matrix)
        matrix.store()


def _by_module(edits: Iterable[Edit]) -> Mapping[str, list[Edit]]:
    grouped: dict[str, list[Edit]] = {}
    for edit in edits:
        grouped.setdefault(edit.path, []).append(edit)
    return grouped
