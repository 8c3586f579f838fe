"""What the ops on latents of sparse autoencoders share: pre-activations, selection, sparse gradients, checks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pysteer.errors import InputError
from pysteer.ops.declare import declare
from pysteer.ops.lookup import full_precision
from pysteer.ops.registry import Case
from pysteer.ops.sae_decode import sae_decode

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pre_activations(
    x: Tensor, weight: Tensor, bias: Tensor | None, pre_bias: Tensor | None, channel_dim: int
) -> Tensor:
    """Return weight (x - pre_bias) + bias as [R, *tokens, M], in fp32 or fp64."""
    high = torch.promote_types(x.dtype, torch.float32)
    tokens = x.movedim(channel_dim, -1).to(high)
    tokens = tokens if pre_bias is None else tokens - pre_bias.to(high)
    with full_precision(x):
        return linear(tokens, weight.to(high), None if bias is None else bias.to(high))


def largest(a: Tensor, k: int) -> Tensor:
    """Return the indices [..., k] of the k largest along the last dimension, largest first, ties to the lowest index.

    NaN counts as largest. `torch.topk` leaves the order of ties open.
    """
    top = a.topk(k, -1)
    last = top.values[..., -1:]
    ties = (a == last) | (a.isnan() & last.isnan())
    places = torch.arange(a.shape[-1], device=a.device, dtype=torch.int32)
    lowest = torch.where(ties, places, a.shape[-1]).topk(k, -1, largest=False).values
    above = k - ((top.values == last) | (top.values.isnan() & last.isnan())).sum(-1, keepdim=True)
    position = torch.arange(k, device=a.device)
    chosen = lowest.gather(-1, (position - above).clamp_min(0)).to(torch.int64)
    indices = torch.where(position < above, top.indices, chosen).sort(-1).values
    return indices.gather(-1, a.gather(-1, indices).sort(dim=-1, descending=True, stable=True).indices)


def _gradients(
    gradient: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    wanted: list[bool],
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high = torch.promote_types(x.dtype, torch.float32)
    moved = x.movedim(channel_dim, -1)
    g = gradient.to(high).reshape(-1, gradient.shape[-1])
    index = indices.reshape(g.shape)
    in_weight = torch.ops.pysteer.sae_decode_weight_backward.default
    found = list(_fake_gradients(gradient, indices, x, weight, bias, pre_bias, wanted, channel_dim))
    if wanted[0] or wanted[3]:
        start = g.new_zeros(g.shape[0], weight.shape[1])  # gives the sum its dtype
        to_tokens = sae_decode(g, index, weight, None, start)
        if wanted[0]:
            found[0].copy_(to_tokens.reshape(moved.shape).movedim(-1, channel_dim))
        if wanted[3]:
            found[3].copy_(-to_tokens.sum(0))
    if wanted[1]:
        tokens = moved.to(high).reshape(-1, x.shape[channel_dim])
        tokens = tokens if pre_bias is None else tokens - pre_bias.to(high)
        found[1].copy_(in_weight(tokens, g, index, weight.shape[0], weight.dtype))
    if wanted[2]:
        found[2].copy_(in_weight(torch.ones_like(g[:, :1]), g, index, weight.shape[0], high).squeeze(1))
    return found[0], found[1], found[2], found[3]


def _fake_gradients(
    gradient: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    wanted: list[bool],
    channel_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (x, weight, bias, pre_bias)
    found = [
        torch.empty_like(each) if asked and each is not None else x.new_empty(0)
        for each, asked in zip(like, wanted, strict=True)
    ]
    return found[0], found[1], found[2], found[3]


sparse_gradients, _ = declare(
    "sae_encode_gradients",
    "(Tensor gradient, Tensor indices, Tensor x, Tensor weight, Tensor? bias, Tensor? pre_bias, bool[] wanted,"
    " int channel_dim) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    fake=_fake_gradients,
)


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_latents(
    x: Tensor,
    width: int,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    threshold: Tensor | None,
) -> int:
    """Check the tensors of an encoder against `x`; return the number of latents M.

    Raises:
        InputError: names the argument that does not fit.
    """
    if weight.dtype not in _FLOATS or weight.dim() != 2 or weight.shape[1] != width or weight.device != x.device:
        raise InputError("weight", value=_say(weight), allowed=f"floats [M, {width}] on {x.device}")
    latents = weight.shape[0]
    for name, tensor, shapes in (
        ("bias", bias, ([latents],)),
        ("pre_bias", pre_bias, ([width],)),
        ("threshold", threshold, ([], [latents])),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS or list(tensor.shape) not in shapes or tensor.device != x.device:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise InputError(name, value=_say(tensor), allowed=f"floats {wanted} on {x.device}")
    return latents


def random_latents(case: Case, x: Tensor) -> dict[str, Tensor]:
    """Return random weight [M, D], bias [M] and pre_bias [D] for a case; pre-activations are of order one."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    latents = case.sizes.get("latents", 96)
    weight = torch.randn(latents, case.width, generator=generator) / max(case.width, 1) ** 0.5
    bias = 0.1 * torch.randn(latents, generator=generator)
    pre_bias = 0.3 * torch.randn(case.width, generator=generator)
    tensors = {"weight": weight.to(case.dtype), "bias": bias, "pre_bias": pre_bias}
    return {name: tensor.to(x.device) for name, tensor in tensors.items()}


def compare_selection(result: Any, truth: Any, inputs: dict[str, Any], limit: Any) -> None:
    """Assert that values and indices are right: selection in fp64 wherever fp32 cannot decide otherwise."""
    values, indices = result
    x, threshold, mode = inputs["x"], inputs.get("threshold"), inputs.get("mode", "topk")
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int32
    assert values.shape == indices.shape == truth[0].shape
    weight = inputs["weight"].double()
    bias, pre_bias = (None if inputs.get(name) is None else inputs[name].double() for name in ("bias", "pre_bias"))
    a = pre_activations(x.double(), weight, bias, pre_bias, inputs["channel_dim"])
    size = None if bias is None else bias.abs(), None if pre_bias is None else -pre_bias.abs()
    band = 2e-6 * pre_activations(x.double().abs(), weight.abs(), *size, inputs["channel_dim"])
    room, latents = values.shape[-1], a.shape[-1]
    a, band = a.reshape(-1, latents), band.reshape(-1, latents)
    values, index = values.reshape(-1, room), indices.reshape(-1, room).long()
    there = index >= 0
    assert (index < latents).all()
    assert not (there[:, 1:] & ~there[:, :-1]).any(), "an empty place before a full one"
    assert (values[~there] == 0).all()
    mine, slack = a.gather(1, index.clamp_min(0)), band.gather(1, index.clamp_min(0))
    right = mine.relu() if inputs.get("relu", True) else mine
    far = (values.double() - right).abs() > limit.absolute + limit.relative * right.abs() + slack
    assert not (far & there).any(), f"{int((far & there).sum())} of {far.numel()} values are off"
    assert not (values[:, 1:] > values[:, :-1])[there[:, 1:]].any(), "values are not sorted"
    chosen = torch.zeros_like(a).scatter_add_(1, index.clamp_min(0), there.double())
    assert (chosen <= 1).all(), "a latent was chosen twice"
    _compare_sets(a, band, chosen > 0, mode, inputs, threshold, room)


def _compare_sets(
    a: Tensor, band: Tensor, chosen: Tensor, mode: str, inputs: dict[str, Any], threshold: Tensor | None, room: int
) -> None:
    count = chosen.sum(1)
    best_left = (a - band).masked_fill(chosen, -torch.inf)
    worst_kept = (a + band).masked_fill(~chosen, torch.inf)
    if threshold is not None:
        best_left = best_left.masked_fill(best_left <= threshold.double(), -torch.inf)
    full = count == room
    beaten = best_left.amax(1) > worst_kept.amin(1)
    assert not (beaten & full).any(), "a larger latent was left out"
    if mode == "threshold":
        assert threshold is not None
        assert (worst_kept > threshold.double()).all(), "a latent below the threshold was kept"
        assert not ((best_left > -torch.inf).any(1) & ~full).any(), "a latent above the threshold was left out"
        return
    if mode == "topk":
        assert full.all()
        return
    groups = 1 if mode == "batch_topk" else inputs["x"].shape[0]
    per_group = count.reshape(groups, -1)
    assert (per_group.sum(1) == min(inputs["k"], a.shape[1]) * per_group.shape[1]).all()
    best_left = best_left.amax(1).masked_fill(full, -torch.inf).reshape(groups, -1).amax(1)
    assert not (best_left > worst_kept.amin(1).reshape(groups, -1).amin(1)).any(), "a larger latent was left out"
