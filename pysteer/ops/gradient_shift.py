"""`gradient_shift`: pull every token towards its nearest target prototype, down the gradient of the squared distance.

With the precision P = c (I - Z'Z) the squared distance to a prototype m is d²(x) = (x - m)'P(x - m), and minus half
its gradient is P(m - x). In C++ on a CPU, plain torch elsewhere; the isotropic-plus-low-rank form costs 4 D r
operations a token.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import Launch, choose, packed, raise_for, run_compiled
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, close_scores, full_precision, laid_out_like, look_up
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_NORMALIZE = ("none", "unit", "input")
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor offset, Tensor centre, Tensor target, Tensor factor, Tensor scale, Tensor slot,"
    " Tensor strength, Tensor clock, Tensor? span, bool gate, float temperature, str normalize, int channel_dim)"
    " -> Tensor"
)


def gradient_shift_reference(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    centre: Tensor,
    target: Tensor,
    factor: Tensor,
    scale: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: bool = False,
    temperature: float = 0.0,
    normalize: str = "none",
    channel_dim: int = -1,
) -> Tensor:
    """Return what `gradient_shift` computes; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    high = torch.promote_types(x.dtype, torch.float32)
    moved = x.movedim(channel_dim, -1).to(high)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    banks = (weight, offset, centre, target, factor, scale)
    w, o, m, aims, z, c = (bank.index_select(0, which).to(high) for bank in banks)
    with full_precision(x):
        score = tokens @ w.transpose(1, 2) + o.unsqueeze(1)
        nearest = score.masked_fill(aims.unsqueeze(1) == 0, -torch.inf).argmax(-1, keepdim=True)
        u = m.gather(1, nearest.expand(-1, -1, m.shape[-1])) - tokens
        u = c.unsqueeze(1) * (u - (u @ z.transpose(1, 2)) @ z)
        if gate and temperature > 0:
            u = u * (torch.softmax(score / temperature, -1) * (1 - aims).unsqueeze(1)).sum(-1, keepdim=True)
        elif gate:
            u = u * (1 - aims).gather(1, score.argmax(-1)).unsqueeze(-1)
    if normalize != "none":
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(high).tiny)
        u = u * tokens.norm(dim=-1, keepdim=True) if normalize == "input" else u
    y = (tokens + s.to(high).reshape(-1, 1, 1) * u).reshape(moved.shape).movedim(-1, channel_dim)
    return laid_out_like(torch.where(active_tokens(x, which, s, span, channel_dim), y.to(x.dtype), x), x)


def _in_plain_torch(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, gate, temperature, normalize, channel_dim = arguments
    return gradient_shift_reference(
        x, *tensors, gate=gate, temperature=temperature, normalize=normalize, channel_dim=channel_dim
    )


def _choose(x: Tensor, out: Tensor, count: int, channel_dim: int) -> Launch:
    return choose("gradient_shift", x, out, channel_dim, lambda name: name == "cpu" and count > 0)


def _run(out: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    *tensors, gate, temperature, normalize, channel_dim = arguments
    weight, factor, slot, clock = tensors[0], tensors[4], tensors[6], tensors[8]
    launch = _choose(x, out, weight.shape[1], channel_dim)
    if launch.backend == "reference":
        return out.copy_(_in_plain_torch(x, *arguments))
    sizes = (*launch.shape, *weight.shape[:2], factor.shape[1], *slot.shape)
    options = (gate, temperature, _NORMALIZE.index(normalize), DTYPE_CODES[x.dtype], torch.get_num_threads())
    status = run_compiled("gradient_shift", (x, out, *packed(*tensors)), *sizes, *options)
    if status:
        raise_for(status, slot, clock, weight.shape[0])
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.gate, _, _, ctx.channel_dim = inputs
    x, weight, offset, _, target, factor, scale, *table = tensors
    ctx.save_for_backward(*(x, weight, offset, target) if ctx.gate else (None,) * 4, factor, scale, *table)
    ctx.rows = x.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # The choices of the prototypes are locally constant: dy/dx = I - s w c (I - Z'Z).
    x, weight, offset, target, factor, scale, slot, strength, clock, span = ctx.saved_tensors
    which, s = look_up(slot, strength, clock, ctx.rows)
    high = torch.promote_types(gradient.dtype, torch.float32)
    moved = gradient.movedim(ctx.channel_dim, -1).to(high)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    z, c = (bank.index_select(0, which).to(high) for bank in (factor, scale))
    with full_precision(gradient):
        pulled = c.unsqueeze(1) * (tokens - (tokens @ z.transpose(1, 2)) @ z)
        if ctx.gate:
            given = x.movedim(ctx.channel_dim, -1).to(high).unsqueeze(1).flatten(1, -2)
            w, o, aims = (bank.index_select(0, which).to(high) for bank in (weight, offset, target))
            nearest = (given @ w.transpose(1, 2) + o.unsqueeze(1)).argmax(-1)
            pulled = pulled * (1 - aims).gather(1, nearest).unsqueeze(-1)
    pulled = pulled.reshape(moved.shape).movedim(-1, ctx.channel_dim)
    active = active_tokens(gradient, which, s, span, ctx.channel_dim)
    steered = (gradient - along(s.to(high), gradient, ctx.channel_dim) * pulled).to(gradient.dtype)
    return (torch.where(active, steered, gradient), *[None] * 14)


_plain, _differentiable = declare("gradient_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def gradient_shift(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    centre: Tensor,
    target: Tensor,
    factor: Tensor,
    scale: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: bool = False,
    temperature: float = 0.0,
    normalize: str = "none",
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s w c (I - Z'Z)(m_j - x), with j the highest scoring target prototype of the token.

    score_k = x·weight_k + offset_k, over target prototypes and others. w = 1; with `gate` and temperature 0, w = 1
    where the highest score of all is not a target's and 0 elsewhere; with `gate` and temperature t > 0, w is the
    softmax(score / t) mass of the prototypes that are not targets. `normalize` scales the shift to length 1 ("unit") or
    to that of the token ("input"). The steering table, inactive rows and tokens, and rounding are as for
    `affine_shift`. Differentiable in all arguments.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight, centre: [P, K, D] fp32; set 0 is never used.
        offset: [P, K] fp32; -inf switches a prototype off.
        target: [P, K] fp32, 1 for target prototypes, 0 for the others; at least one is a target.
        factor: [P, r, D] fp32, Z; [P, 0, D] for the Euclidean distance.
        scale: [P, 1] fp32, c.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        gate: weigh the shift by the classes around the token.
        temperature: of the softmax over scores, in units of the score; 0 for the nearest alone.
        normalize: "none", "unit" or "input".
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype, device or option does not fit, or, on a CPU, the clock or a slot is out of range.
    """
    width = check_activation(x, channel_dim, out)
    count = weight.shape[1] if weight.dim() == 3 else 0
    rank = factor.shape[1] if factor.dim() == 3 else 0
    check_banks(
        x, weight=(weight, (count, width)), offset=(offset, (count,)), centre=(centre, (count, width)),
        target=(target, (count,)), factor=(factor, (rank, width)), scale=(scale, (1,)),
    )  # fmt: skip
    check_table(x, slot, strength, clock, span)
    if not temperature >= 0:
        raise InputError("temperature", value=temperature, allowed="0 (the nearest prototype alone) or more")
    if normalize not in _NORMALIZE:
        raise InputError("normalize", value=normalize, allowed=", ".join(_NORMALIZE))
    banks = (weight, offset, centre, target, factor, scale)
    arguments = (*banks, slot, strength, clock, span, gate, temperature, normalize, channel_dim)
    smooth = normalize != "none" or (
        gate and temperature > 0
    )  # more than the locally constant choices to differentiate
    wants_grad = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() or (wants_grad and smooth) or plain_torch_needed(*banks, strength):
        y = _in_plain_torch(x, *arguments)  # in a graph plain torch fuses into its neighbours
        return y if out is None else out.copy_(y)
    return dispatch(x, out, arguments, wants_grad=wants_grad, plain=_plain, differentiable=_differentiable, run=_run)


def _implementation(x: Tensor, weight: Tensor, channel_dim: int = -1, out: Tensor | None = None, **_: Any) -> str:
    return _choose(x, torch.empty_like(x) if out is None else out, weight.shape[1], channel_dim).backend


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, count = case.sizes.get("sets", 4), case.sizes.get("prototypes", 6)
    centre = torch.randn(sets, count, case.width, generator=generator)
    banks = {
        "weight": centre,
        "offset": -0.5 * centre.square().sum(-1),
        "centre": centre,
        "target": (torch.arange(count) % 2 == 0).float().expand(sets, -1).contiguous(),
        "factor": torch.randn(sets, 3, case.width, generator=generator) / (2 * case.width**0.5),
        "scale": torch.rand(sets, 1, generator=generator) + 0.5,
    }
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _unsure(x: Tensor, weight: Tensor, offset: Tensor, target: Tensor, **inputs: Any) -> Tensor:
    table = [inputs[name] for name in ("slot", "strength", "clock", "channel_dim")]
    aimed = offset.masked_fill(target == 0, -torch.inf)
    return close_scores(x, weight, offset, *table) | close_scores(x, weight, aimed, *table)


SPEC = SteeringSpec(
    name="gradient_shift",
    function=gradient_shift,
    reference=gradient_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": "fp32, bf16, fp16, channels or tokens next to each other"},
    defaults={"gate": False, "temperature": 0.0, "normalize": "none"},
    variants={
        "one": {},
        "gate": {"gate": True},
        "soft": {"gate": True, "temperature": 2.0},
        "unit": {"normalize": "unit"},
    },
    unsure=_unsure,
)
