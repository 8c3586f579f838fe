"""`affine_shift`: y = x + s ((g - 1) x + b), a gain and a bias per channel, chosen and weighted per row.

Mean shift (g = 1), diagonal transport such as Linear-AcT and Gaussian transport, AurA (b = 0) and channel nudges are
all of this form. Bounds keep the shift to the values that a map was fitted on; on maps the shift may be that of the
channel's mean.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.by_mean import kernel_serves, launch_by_mean, shift_by_mean
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed, refuse_out
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for, run_compiled, stream_of
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, laid_out_like, look_up, means_of_rows
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor gain, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " Tensor? low, Tensor? high, bool of_mean, int channel_dim) -> Tensor"
)
_BY_MEAN = "affine_by_mean"


def _within(base: Tensor, which: Tensor, low: Tensor, high: Tensor, channel_dim: int) -> Tensor:
    """Return where low < base < high, with the bounds of the parameter set of every row."""
    below, above = (along(bank.index_select(0, which).to(base.dtype), base, channel_dim) for bank in (low, high))
    return (base > below) & (base < above)


def affine_shift_reference(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
    of_mean: bool = False,
    bounds_of_mean: bool = False,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `affine_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    g, b = (along(bank.index_select(0, which).to(wide), x, channel_dim) for bank in (gain, bias))
    xf, active = x.to(wide), active_tokens(x, which, s, span, channel_dim)
    bounded = xf  # what the bounds look at
    if of_mean or bounds_of_mean:
        bounded = means_of_rows(xf, active, span, channel_dim)
    y = xf + along(s.to(wide), x, channel_dim) * ((g - 1) * (bounded if of_mean else xf) + b)
    if low is not None and high is not None:
        active = active & _within(bounded, which, low, high, channel_dim)
    return laid_out_like(torch.where(active, y.to(x.dtype), x), x)


def _in_plain_torch(x: Tensor, *arguments: Any) -> Tensor:
    *table, low, high, of_mean, channel_dim = arguments
    return affine_shift_reference(x, *table, low=low, high=high, of_mean=of_mean, channel_dim=channel_dim)


def _run(
    out: Tensor,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    of_mean: bool,
    channel_dim: int,
) -> Tensor:
    launch = choose("affine_shift", x, out, channel_dim)
    if launch.backend == "reference":
        table = (gain, bias, slot, strength, clock, span)
        return out.copy_(_in_plain_torch(x, *table, low, high, of_mean, channel_dim))
    tensors = packed(gain, bias, slot, strength, clock, span, low, high)
    sizes = (*launch.shape, gain.shape[0], *slot.shape, DTYPE_CODES[x.dtype])
    if launch.backend == "cpu":
        status = run_compiled("affine_shift", (x, out, *tensors), *sizes, of_mean, torch.get_num_threads())
        if status:
            raise_for(status, slot, clock, gain.shape[0])
        return out
    with on_device(x):
        sums = _room_for_sums(x, launch) if of_mean else None
        if launch.backend == "triton":
            kernels = backends.load_kernels("affine_shift")
            kernels.launch(out, x, *tensors, sums, launch.source, launch.target)
        else:
            parts = 0 if sums is None else len(sums)
            backends.extension().affine_shift_cuda(*addresses(x, out, *tensors, sums), *sizes, parts, stream_of(x))
    return out


def _room_for_sums(x: Tensor, launch: Launch) -> Tensor:
    """Return where the kernels of a GPU leave the sums over parts of the tokens: [parts, R, D] fp32, added in order."""
    assert launch.source is not None
    rows, tokens, width = launch.source[:3]
    least = 256 if launch.source.channel_stride == 1 else 4096  # tokens that are worth a program
    return torch.empty(max(1, min(32, tokens // least)), rows, width, dtype=torch.float32, device=x.device)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gain, _, slot, strength, clock, span, low, high, ctx.of_mean, ctx.channel_dim = inputs
    ctx.save_for_backward(gain, slot, strength, clock, span, low, high, None if low is None else x)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gain, slot, strength, clock, span, low, high, x = ctx.saved_tensors
    # dy/dx = 1 + s (g - 1), with the mean over tokens in between or not: the op itself without its bias, which also
    # gives the second derivative. The bounds are locally constant.
    given: dict[str, Any] = {"of_mean": ctx.of_mean, "channel_dim": ctx.channel_dim}
    result = affine_shift(gradient, gain, torch.zeros_like(gain), slot, strength, clock, span, **given)
    if x is not None:
        which, s = look_up(slot, strength, clock, x.shape[0])
        xf = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        active = active_tokens(x, which, s, span, ctx.channel_dim)
        base = means_of_rows(xf, active, span, ctx.channel_dim) if ctx.of_mean else xf
        result = torch.where(_within(base, which, low, high, ctx.channel_dim), result, gradient)
    return (result, *[None] * 10)


_plain, _differentiable = declare("affine_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def _check_bounds(x: Tensor, gain: Tensor, bias: Tensor, low: Tensor | None, high: Tensor | None, width: int) -> None:
    tail = (width,)
    if low is None and high is None:
        check_banks(x, gain=(gain, tail), bias=(bias, tail))
    elif low is None or high is None:
        missing = "low" if low is None else "high"
        raise InputError(missing, value=None, allowed="both bounds or none", fix="give an infinite bound")
    else:
        check_banks(x, gain=(gain, tail), bias=(bias, tail), low=(low, tail), high=(high, tail))


def affine_shift(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
    of_mean: bool = False,
    bounds_of_mean: bool = False,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s ((g - 1) x + b) with g, b and s looked up for every row in the steering table.

    Row r uses parameter set `slot[clock, r]` with strength s = `strength[clock, r]`. Rows with slot 0 or strength 0 and
    tokens outside their span come back bit for bit, NaN, infinities and -0 included. Arithmetic is fp32 with one
    rounding to the dtype of `x`. Differentiable in everything; in `x` with the fast kernels.

    With bounds only values low < x < high are shifted, all others come back bit for bit. With `of_mean` the shift is
    that of the mean m over the tokens of each row and channel, y = x + s ((g - 1) m + b), where low < m < high: the
    form of Linear-AcT on maps. A span then says which tokens make the mean and are shifted. With `bounds_of_mean` every
    value is shifted by its own shift where low < m < high: the form of Gaussian transport on maps.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        gain, bias: [P, D] fp32; set 0 is never used.
        slot: [S, Rcap] int32 with Rcap >= R; 0 leaves the row alone.
        strength: [S, Rcap] fp32, no unit.
        clock: [] int64, the step.
        span: [Rcap, 2] int32, the tokens [start, end) that are touched; None for all.
        low, high: [P, D] fp32, may be infinite; None for no bounds.
        of_mean: shift by what the mean would be shifted by.
        bounds_of_mean: the bounds look at the mean alone.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype or device does not fit, or, on a CPU, the clock or a slot is out of range. On a GPU,
            where looking would wait for the device, such rows come out as NaN.
    """
    width = check_activation(x, channel_dim, out)
    _check_bounds(x, gain, bias, low, high, width)
    check_table(x, slot, strength, clock, span)
    arguments = (gain, bias, slot, strength, clock, span, low, high, of_mean, channel_dim)
    if bounds_of_mean and not of_mean:
        if out is not None and x.requires_grad and torch.is_grad_enabled():
            refuse_out(x)
        table = (slot, strength, clock, span)
        parameters = (gain, bias, strength)
        if low is not None and high is not None and kernel_serves(_BY_MEAN, x, out, channel_dim, parameters):
            return shift_by_mean(_BY_MEAN, x, (gain, bias, low, high), *table, out, channel_dim)
        options: dict[str, Any] = {"low": low, "high": high, "bounds_of_mean": True, "channel_dim": channel_dim}
        y = affine_shift_reference(x, gain, bias, *table, **options)
        return y if out is None else out.copy_(y)
    # In a compiled graph plain torch fuses into its neighbours, an opaque op would cost a pass over memory.
    if torch.compiler.is_compiling() or plain_torch_needed(gain, bias, strength):
        y = _in_plain_torch(x, *arguments)
        return y if out is None else out.copy_(y)
    return dispatch(
        x, out, arguments, wants_grad=x.requires_grad, plain=_plain, differentiable=_differentiable, run=_run
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, options = case.sizes.get("sets", 4), dict(case.options)
    gain = 1 + 0.5 * torch.randn(sets, case.width, generator=generator)
    bias = torch.randn(sets, case.width, generator=generator)
    banks = {"gain": gain, "bias": bias}
    if options.pop("bounded", False):  # a stand-in for tensors of the right width; some units closed, some open
        margin = 0.2 * torch.randn(2, sets, case.width, generator=generator)
        banks |= {"low": margin[0] - 2.4, "high": margin[1] + 2.4}
        banks["low"][:, 3::37], banks["high"][:, 3::37] = 0.5, 0.5
        banks["low"][:, 4::37], banks["high"][:, 4::37] = -torch.inf, torch.inf
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **options}


def _unsure(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    of_mean: bool = False,
    bounds_of_mean: bool = False,
    channel_dim: int = -1,
    **inputs: Any,
) -> Tensor:
    if low is None or high is None or not (of_mean or bounds_of_mean):
        return torch.zeros((), dtype=torch.bool, device=x.device)
    which, s = look_up(inputs["slot"], inputs["strength"], inputs["clock"], x.shape[0])
    active = active_tokens(x, which, s, inputs["span"], channel_dim)
    base = means_of_rows(x.double(), active, inputs["span"], channel_dim)
    tight = (low + 1e-6 * (1 + low.abs()), high - 1e-6 * (1 + high.abs()))
    loose = (low - 1e-6 * (1 + low.abs()), high + 1e-6 * (1 + high.abs()))
    return _within(base, which, *tight, channel_dim) != _within(base, which, *loose, channel_dim)


def _implementation(x: Tensor, out: Tensor | None = None, channel_dim: int = -1, **inputs: Any) -> str:
    if inputs.get("bounds_of_mean"):
        return launch_by_mean(_BY_MEAN, x, out, channel_dim).backend
    return choose("affine_shift", x, torch.empty_like(x) if out is None else out, channel_dim).backend


_ALL = "fp32, bf16, fp16 in all layouts with channels or tokens next to each other"
SPEC = SteeringSpec(
    name="affine_shift",
    function=affine_shift,
    reference=affine_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL, "cuda": _ALL},
    variants={
        "plain": {},
        "bounded": {"bounded": True},
        "mean": {"of_mean": True},
        "bounded-mean": {"of_mean": True, "bounded": True},
        "mean-bounds": {"bounds_of_mean": True, "bounded": True},
    },
    unsure=_unsure,
    defaults={"low": None, "high": None, "of_mean": False},
)
