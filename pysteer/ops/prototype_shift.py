"""`prototype_shift`: move every token by the shift of its nearest prototype, or by a soft mixture of shifts.

With score_k = x·w_k + o_k the nearest prototype is the argmax for two metrics: Euclid with w = mu and o = -|mu|²/2,
and Mahalanobis with one shared precision P with w = P mu and o = -mu'P mu/2, since x'Px is the same for every k. Where
every prototype has a precision P_k = c_k (I - F_k'F_k) of its own, -x'P_k x/2 = c_k (|F_k x|² - |x|²)/2 is added.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for, run_compiled, stream_of
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, close_scores, full_precision, laid_out_like, look_up, own_scores
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor offset, Tensor delta, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " bool pull, float temperature, str normalize, int channel_dim, Tensor? factor, Tensor? scale) -> Tensor"
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
    factor: Tensor | None = None,
    scale: Tensor | None = None,
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
        if factor is not None and scale is not None:
            score = score + own_scores(tokens, factor.index_select(0, which), scale.index_select(0, which))
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
    *tensors, pull, temperature, normalize, channel_dim, factor, scale = arguments
    options = {"pull": pull, "temperature": temperature, "normalize": normalize, "channel_dim": channel_dim}
    return prototype_shift_reference(x, *tensors, factor=factor, scale=scale, **options)


def _choose(x: Tensor, out: Tensor, prototypes: int, hard: bool, channel_dim: int) -> Launch:
    """`hard`: the nearest prototype under one precision and nothing else, which all kernels know."""
    if prototypes > _LARGEST_K or prototypes == 0:
        return Launch("reference")
    forced = len(backends.choices(x.device.type)) == 1
    in_registers = prototypes <= _LARGEST_K_IN_REGISTERS and x.stride(channel_dim) == 1
    serves = {"triton": True, "cpu": hard, "cuda": hard and (forced or in_registers)}
    return choose("prototype_shift", x, out, channel_dim, lambda name: serves[name])


def _is_hard(temperature: float, normalize: str, factor: Tensor | None) -> bool:
    return temperature == 0 and normalize == "none" and factor is None


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
    factor: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    launch = _choose(x, out, weight.shape[1], _is_hard(temperature, normalize, factor), channel_dim)
    options = (pull, temperature, normalize)
    if launch.backend == "reference":
        table = (slot, strength, clock, span)
        return out.copy_(_in_plain_torch(x, weight, offset, delta, *table, *options, channel_dim, factor, scale))
    tensors = packed(weight, offset, delta, slot, strength, clock, span)
    if launch.backend == "triton":
        kernels = backends.load_kernels("prototype_shift")
        with on_device(x):
            kernels.launch(out, x, *tensors, *packed(factor, scale), *options, launch.source, launch.target)
        return out
    sizes = (*launch.shape, *weight.shape[:2], *slot.shape, int(pull), DTYPE_CODES[x.dtype])
    if launch.backend == "cpu":
        status = run_compiled("prototype_shift", (x, out, *tensors), *sizes, torch.get_num_threads())
        if status:
            raise_for(status, slot, clock, weight.shape[0])
    else:
        with on_device(x):
            backends.extension().prototype_shift_cuda(*addresses(x, out, *tensors), *sizes, stream_of(x))
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, _, slot, strength, clock, span, ctx.pull, _, _, ctx.channel_dim, _, _ = inputs
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
    return (gradient, *[None] * 13)


_plain, _differentiable = declare(
    "prototype_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward
)


def precise_banks(centre: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` and `offset` for prototypes that each have a precision P_k = c_k (I - F_k'F_k).

    Args:
        centre: [P, K, D]; factor: [P, K, r, D]; scale: [P, K].
    """
    m, z, c = centre.double(), factor.double(), scale.double()
    along_factor = torch.einsum("pkrd,pkd->pkr", z, m)
    weight = c.unsqueeze(-1) * (m - torch.einsum("pkrd,pkr->pkd", z, along_factor))
    return weight.float(), (-0.5 * (weight * m).sum(-1)).float()


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
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s u, with u the shift of the prototype that scores highest for the token.

    score_k = x·weight_k + offset_k. Temperature 0: k* = argmax score (lowest index on ties), u = delta_k*. Temperature
    t > 0: u = sum_k softmax(score / t)_k delta_k. `pull` subtracts x from u, `normalize` then scales u to length 1
    ("unit") or to the length of the token ("input"). The steering table, inactive rows and tokens, rounding, and errors
    are as for `affine_shift`.

    With a `factor` F_k and a `scale` c_k for every prototype, c_k (|F_k x|² - |x|²) / 2 is added to its score: for the
    weight and offset that `precise_banks` gives, the score is then minus half the squared distance to the prototype
    under its own precision P_k = c_k (I - F_k'F_k).

    Triton has kernels for all of this with K <= 256, the CPU and CUDA for the hard choice under one precision
    (temperature 0, no normalisation, no factor). The hard choice without normalisation is differentiable in `x` with
    the kernels; all else differentiates, and in all arguments, in plain torch.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight, delta: [P, K, D] fp32; set 0 is never used.
        offset: [P, K] fp32; -inf switches a prototype off.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        pull: aim at delta_k as a point instead of shifting by it.
        temperature: of the softmax over scores, in units of the score; 0 for the nearest alone.
        normalize: "none", "unit" or "input".
        factor, scale: [P, K, r, D] and [P, K] fp32, both or neither.
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
    if factor is not None or scale is not None:
        if factor is None or scale is None:
            raise InputError(
                "scale" if scale is None else "factor", value="nothing", allowed="factor and scale together"
            )
        rank = factor.shape[2] if factor.dim() == 4 else 0
        check_banks(x, weight=(weight, tail), factor=(factor, (tail[0], rank, width)), scale=(scale, tail[:1]))
    options = (pull, temperature, normalize, channel_dim)
    return _dispatch(x, out, weight, offset, delta, slot, strength, clock, span, *options, factor, scale)


@torch.compiler.assume_constant_result
def _cpu_has_a_kernel() -> bool:
    """Asked while a graph is traced: what follows from here must not be traced."""
    return "cpu" in backends.choices("cpu") and backends.provides("cpu", "prototype_shift")


def _dispatch(x: Tensor, out: Tensor | None, *arguments: Any) -> Tensor:
    weight, offset, delta, _, strength, _, _, _, temperature, normalize, _, factor, scale = arguments
    banks = (weight, offset, delta, strength, *(each for each in (factor, scale) if each is not None))
    compiling = torch.compiler.is_compiling()
    wants_grad = x.requires_grad and torch.is_grad_enabled()
    # In a graph for the CPU the kernel saves copying the banks of every row; what it does not serve is better fused.
    kernel = _is_hard(temperature, normalize, factor) and weight.shape[1] <= _LARGEST_K
    if (
        (compiling and x.device.type == "cpu" and not (kernel and _cpu_has_a_kernel()))
        or (wants_grad and (temperature > 0 or normalize != "none"))
        or plain_torch_needed(*banks)
    ):
        y = _in_plain_torch(x, *arguments)
        return y if out is None else out.copy_(y)
    return dispatch(x, out, arguments, wants_grad=wants_grad, plain=_plain, differentiable=_differentiable, run=_run)


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
    if rank := case.sizes.get("rank", 0):
        directions = torch.randn(sets, count, rank, case.width, generator=generator)
        banks["factor"] = directions * (0.8 / directions.norm(dim=-1, keepdim=True) / rank**0.5)
        banks["scale"] = torch.rand(sets, count, generator=generator) * 0.2 + 0.9
        precise = precise_banks(centres, banks["factor"], banks["scale"])
        banks["weight"], banks["offset"] = precise[0], torch.where(offset.isinf(), offset, precise[1])
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _implementation(
    x: Tensor,
    weight: Tensor,
    temperature: float = 0.0,
    normalize: str = "none",
    factor: Tensor | None = None,
    channel_dim: int = -1,
    out: Tensor | None = None,
    **_: Any,
) -> str:
    target = torch.empty_like(x) if out is None else out
    return _choose(x, target, weight.shape[1], _is_hard(temperature, normalize, factor), channel_dim).backend


def _unsure(x: Tensor, factor: Tensor | None = None, scale: Tensor | None = None, **inputs: Any) -> Tensor:
    names = ("weight", "offset", "slot", "strength", "clock", "channel_dim")
    return close_scores(x, **{name: inputs[name] for name in names}, factor=factor, scale=scale)


_HARD = "temperature 0, no normalisation, no factor, K <= 256; fp32, bf16, fp16, channels or tokens next to each other"
SPEC = SteeringSpec(
    name="prototype_shift",
    function=prototype_shift,
    reference=prototype_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={
        "cpu": _HARD,
        "triton": "K <= 256; fp32, bf16, fp16, channels or tokens next to each other",
        "cuda": f"{_HARD}; left alone only for K <= {_LARGEST_K_IN_REGISTERS}",
    },
    variants={
        "hard": {},
        "pull": {"pull": True},
        "soft": {"temperature": 2.0},
        "soft-pull": {"temperature": 2.0, "pull": True},
        "unit": {"normalize": "unit"},
        "pull-input": {"normalize": "input", "pull": True},
    },
    unsure=_unsure,
    defaults={"pull": False, "temperature": 0.0, "normalize": "none", "factor": None, "scale": None},
    sizes=({"prototypes": 5}, {"prototypes": 1}, {"prototypes": 64}, {"prototypes": 5, "rank": 3}),
)
