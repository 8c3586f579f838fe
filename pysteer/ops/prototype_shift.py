"""`prototype_shift`: move every token by the shift of its nearest prototype, or by a soft mixture of shifts.

With score_k = x·w_k + o_k the nearest prototype is the argmax for two metrics: Euclid with w = mu and o = -|mu|²/2,
and Mahalanobis with one shared precision P with w = P mu and o = -mu'P mu/2, since x'Px is the same for every k.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, has_memory, plain_torch_needed, refuse_out
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for, stream_of
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, close_scores, full_precision, laid_out_like, look_up
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor offset, Tensor delta, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " bool pull, float temperature, str normalize, int channel_dim) -> Tensor"
)
_NORMALIZE = ("none", "unit", "input")
_LARGEST_K = 256  # of the fast kernels
_LARGEST_K_IN_REGISTERS = 16  # above this the matrix units of a GPU win


def prototype_shift_reference(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    delta: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    pull: bool = False,
    temperature: float = 0.0,
    normalize: str = "none",
    channel_dim: int = -1,
) -> Tensor:
    """Return what `prototype_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    high = torch.promote_types(x.dtype, torch.float32)
    moved = x.movedim(channel_dim, -1).to(high)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    w, o, shifts = (bank.index_select(0, which).to(high) for bank in (weight, offset, delta))
    with full_precision(x):
        score = tokens @ w.transpose(1, 2) + o.unsqueeze(1)
        if temperature > 0:
            u = torch.softmax(score / temperature, -1) @ shifts
        else:
            nearest = score.argmax(-1, keepdim=True)
            u = shifts.gather(1, nearest.expand(-1, -1, shifts.shape[-1]))
    u = u - tokens if pull else u
    if normalize != "none":
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(high).tiny)
        u = u * tokens.norm(dim=-1, keepdim=True) if normalize == "input" else u
    y = (tokens + s.to(high).reshape(-1, 1, 1) * u).reshape(moved.shape).movedim(-1, channel_dim)
    return laid_out_like(torch.where(active_tokens(x, which, s, span, channel_dim), y.to(x.dtype), x), x)


def _in_plain_torch(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, pull, temperature, normalize, channel_dim = arguments
    return prototype_shift_reference(
        x, *tensors, pull=pull, temperature=temperature, normalize=normalize, channel_dim=channel_dim
    )


def _choose(x: Tensor, out: Tensor, prototypes: int, temperature: float, normalize: str, channel_dim: int) -> Launch:
    if temperature > 0 or normalize != "none" or prototypes > _LARGEST_K:
        return Launch("reference")
    forced = len(backends.choices(x.device.type)) == 1
    in_registers = prototypes <= _LARGEST_K_IN_REGISTERS and x.stride(channel_dim) == 1
    return choose("prototype_shift", x, out, channel_dim, lambda name: name != "cuda" or forced or in_registers)


def _run(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    delta: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    pull: bool,
    temperature: float,
    normalize: str,
    channel_dim: int,
) -> Tensor:
    launch = _choose(x, out, weight.shape[1], temperature, normalize, channel_dim)
    if launch.backend == "reference":
        table = (slot, strength, clock, span)
        return out.copy_(_in_plain_torch(x, weight, offset, delta, *table, pull, temperature, normalize, channel_dim))
    tensors = packed(weight, offset, delta, slot, strength, clock, span)
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("prototype_shift").launch(out, x, *tensors, pull, launch.source, launch.target)
        return out
    sizes = (*launch.shape, *weight.shape[:2], *slot.shape, int(pull), DTYPE_CODES[x.dtype])
    places = addresses(x, out, *tensors)
    if launch.backend == "cpu":
        status = backends.extension().prototype_shift(*places, *sizes, torch.get_num_threads())
        if status:
            raise_for(status, slot, clock, weight.shape[0])
    else:
        with on_device(x):
            backends.extension().prototype_shift_cuda(*places, *sizes, stream_of(x))
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, _, slot, strength, clock, span, ctx.pull, _, _, ctx.channel_dim = inputs
    ctx.save_for_backward(*(slot, strength, clock, span) if ctx.pull else ())
    ctx.rows = x.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # The choice of the prototype is locally constant: dy/dx = 1, or 1 - s where the token is pulled.
    if ctx.pull:
        slot, strength, clock, span = ctx.saved_tensors
        which, s = look_up(slot, strength, clock, ctx.rows)
        factor = along(1 - s, gradient, ctx.channel_dim)
        active = active_tokens(gradient, which, s, span, ctx.channel_dim)
        gradient = torch.where(active, (gradient * factor).to(gradient.dtype), gradient)
    else:
        gradient = gradient.clone()  # a tensor of its own: the caller may accumulate into it
    return (gradient, *[None] * 11)


_plain, _differentiable = declare(
    "prototype_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward
)


def _check_options(temperature: float, normalize: str) -> None:
    if not temperature >= 0:
        raise InputError("temperature", value=temperature, allowed="0 (the nearest prototype alone) or more")
    if normalize not in _NORMALIZE:
        raise InputError("normalize", value=normalize, allowed=", ".join(_NORMALIZE))


def prototype_shift(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    delta: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    pull: bool = False,
    temperature: float = 0.0,
    normalize: str = "none",
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s u, with u the shift of the prototype that scores highest for the token.

    score_k = x·weight_k + offset_k. Temperature 0: k* = argmax score (lowest index on ties), u = delta_k*. Temperature
    t > 0: u = sum_k softmax(score / t)_k delta_k. `pull` subtracts x from u, `normalize` then scales u to length 1
    ("unit") or to the length of the token ("input"). The steering table, inactive rows and tokens, rounding, and errors
    are as for `affine_shift`. The hard choice (temperature 0, no normalisation, K <= 256) has fast kernels and is
    differentiable in `x`; everything else runs, and differentiates in all arguments, in plain torch.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight, delta: [P, K, D] fp32; set 0 is never used.
        offset: [P, K] fp32; -inf switches a prototype off.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        pull: aim at delta_k as a point instead of shifting by it.
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
    tail = (weight.shape[1] if weight.dim() == 3 else 0, width)
    check_banks(x, weight=(weight, tail), offset=(offset, tail[:1]), delta=(delta, tail))
    check_table(x, slot, strength, clock, span)
    _check_options(temperature, normalize)
    arguments = (weight, offset, delta, slot, strength, clock, span, pull, temperature, normalize, channel_dim)
    return _dispatch(x, out, *arguments)


def _dispatch(x: Tensor, out: Tensor | None, *arguments: Any) -> Tensor:
    weight, offset, delta, _, strength, _, _, _, temperature, normalize, _ = arguments
    compiling = torch.compiler.is_compiling()
    wants_grad = x.requires_grad and torch.is_grad_enabled()
    # In a graph for the CPU the kernel saves copying the banks of every row; what it does not serve is better fused.
    kernel = temperature == 0 and normalize == "none" and weight.shape[1] <= _LARGEST_K
    if (
        (compiling and x.device.type == "cpu" and not (kernel and "cpu" in backends.choices("cpu")))
        or (wants_grad and (temperature > 0 or normalize != "none"))
        or plain_torch_needed(weight, offset, delta, strength)
    ):
        y = _in_plain_torch(x, *arguments)
        return y if out is None else out.copy_(y)
    if wants_grad:
        if out is not None:
            refuse_out(x)
        return _differentiable(x, *arguments)
    if out is None:
        return _plain(x, *arguments)
    if compiling or not has_memory(x):
        return out.copy_(_plain(x, *arguments))
    return _run(out, x, *arguments)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, count = case.sizes.get("sets", 4), case.sizes.get("prototypes", 8)
    centres = torch.randn(sets, count, case.width, generator=generator)
    offset = -0.5 * centres.square().sum(-1)
    delta = torch.randn(sets, count, case.width, generator=generator)
    if count > 2:  # a set may hold fewer prototypes than the bank has room for
        offset[-1, count - 1], delta[-1, count - 1] = -torch.inf, 0.0
    banks = {"weight": centres, "offset": offset, "delta": delta}
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _implementation(
    x: Tensor,
    weight: Tensor,
    temperature: float = 0.0,
    normalize: str = "none",
    channel_dim: int = -1,
    out: Tensor | None = None,
    **_: Any,
) -> str:
    target = torch.empty_like(x) if out is None else out
    return _choose(x, target, weight.shape[1], temperature, normalize, channel_dim).backend


def _unsure(x: Tensor, **inputs: Any) -> Tensor:
    table = [inputs[name] for name in ("weight", "offset", "slot", "strength", "clock", "channel_dim")]
    return close_scores(x, *table)


_HARD = "temperature 0, no normalisation, K <= 256; fp32, bf16, fp16, channels or tokens next to each other"
SPEC = SteeringSpec(
    name="prototype_shift",
    function=prototype_shift,
    reference=prototype_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _HARD, "triton": _HARD, "cuda": f"{_HARD}; left alone only for K <= {_LARGEST_K_IN_REGISTERS}"},
    variants={
        "hard": {},
        "pull": {"pull": True},
        "soft": {"temperature": 2.0},
        "soft-pull": {"temperature": 2.0, "pull": True},
        "unit": {"normalize": "unit"},
        "pull-input": {"normalize": "input", "pull": True},
    },
    unsure=_unsure,
    defaults={"pull": False, "temperature": 0.0, "normalize": "none"},
    sizes=({"prototypes": 5}, {"prototypes": 1}, {"prototypes": 64}),
)
