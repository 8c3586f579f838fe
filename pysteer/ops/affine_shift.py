"""`affine_shift`: y = x + s ((g - 1) x + b), a gain and a bias per channel, chosen and weighted per row.

Mean shift (g = 1), diagonal transport such as Linear-AcT, and channel nudges are all of this form.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.ops import backends
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, has_memory, plain_torch_needed, refuse_out
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for, stream_of
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, laid_out_like, look_up
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor gain, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span, int channel_dim)"
    " -> Tensor"
)


def affine_shift_reference(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `affine_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    high = torch.promote_types(x.dtype, torch.float32)
    g, b = (along(bank.index_select(0, which).to(high), x, channel_dim) for bank in (gain, bias))
    xf = x.to(high)
    y = xf + along(s.to(high), x, channel_dim) * ((g - 1) * xf + b)
    return laid_out_like(torch.where(active_tokens(x, which, s, span, channel_dim), y.to(x.dtype), x), x)


def _run(
    out: Tensor,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    channel_dim: int,
    launch: Launch,
) -> Tensor:
    if launch.backend == "reference":
        return out.copy_(affine_shift_reference(x, gain, bias, slot, strength, clock, span, channel_dim=channel_dim))
    tensors = packed(gain, bias, slot, strength, clock, span)
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("affine_shift").launch(out, x, *tensors, launch.source, launch.target)
        return out
    sizes = (*launch.shape, gain.shape[0], *slot.shape, DTYPE_CODES[x.dtype])
    places = addresses(x, out, *tensors)
    if launch.backend == "cpu":
        status = backends.extension().affine_shift(*places, *sizes, torch.get_num_threads())
        if status:
            raise_for(status, slot, clock, gain.shape[0])
    else:
        with on_device(x):
            backends.extension().affine_shift_cuda(*places, *sizes, stream_of(x))
    return out


def _forward(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    channel_dim: int,
) -> Tensor:
    out = torch.empty_like(x)
    return _run(
        out, x, gain, bias, slot, strength, clock, span, channel_dim, choose("affine_shift", x, out, channel_dim)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, gain, _, slot, strength, clock, span, channel_dim = inputs
    ctx.save_for_backward(gain, slot, strength, clock, span)
    ctx.channel_dim = channel_dim


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gain, slot, strength, clock, span = ctx.saved_tensors
    # dy/dx = 1 + s (g - 1): the op itself without its bias, which also gives the second derivative.
    shift = affine_shift(
        gradient, gain, torch.zeros_like(gain), slot, strength, clock, span, channel_dim=ctx.channel_dim
    )
    return shift, None, None, None, None, None, None, None


_plain, _differentiable = declare("affine_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def affine_shift(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s ((g - 1) x + b) with g, b and s looked up for every row in the steering table.

    Row r uses parameter set `slot[clock, r]` with strength s = `strength[clock, r]`. Rows with slot 0 or strength 0 and
    tokens outside their span come back bit for bit, NaN, infinities and -0 included. Arithmetic is fp32 with one
    rounding to the dtype of `x`. Differentiable in everything; in `x` with the fast kernels.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        gain, bias: [P, D] fp32; set 0 is never used.
        slot: [S, Rcap] int32 with Rcap >= R; 0 leaves the row alone.
        strength: [S, Rcap] fp32, no unit.
        clock: [] int64, the step.
        span: [Rcap, 2] int32, the tokens [start, end) that are touched; None for all.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype or device does not fit, or, on a CPU, the clock or a slot is out of range. On a GPU,
            where looking would wait for the device, such rows come out as NaN.
    """
    width = check_activation(x, channel_dim, out)
    check_banks(x, gain=(gain, (width,)), bias=(bias, (width,)))
    check_table(x, slot, strength, clock, span)
    # In a compiled graph plain torch fuses into its neighbours, an opaque op would cost a pass over memory.
    if torch.compiler.is_compiling() or plain_torch_needed(gain, bias, strength):
        y = affine_shift_reference(x, gain, bias, slot, strength, clock, span, channel_dim=channel_dim)
        return y if out is None else out.copy_(y)
    if x.requires_grad and torch.is_grad_enabled():
        if out is not None:
            refuse_out(x)
        return _differentiable(x, gain, bias, slot, strength, clock, span, channel_dim)
    if out is None:
        return _plain(x, gain, bias, slot, strength, clock, span, channel_dim)
    if not has_memory(x):
        return out.copy_(_plain(x, gain, bias, slot, strength, clock, span, channel_dim))
    return _run(
        out, x, gain, bias, slot, strength, clock, span, channel_dim, choose("affine_shift", x, out, channel_dim)
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets = case.sizes.get("sets", 4)
    gain = 1 + 0.5 * torch.randn(sets, case.width, generator=generator)
    bias = torch.randn(sets, case.width, generator=generator)
    banks = {"gain": gain.to(case.device), "bias": bias.to(case.device)}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _implementation(x: Tensor, out: Tensor | None = None, channel_dim: int = -1, **_: Any) -> str:
    return choose("affine_shift", x, torch.empty_like(x) if out is None else out, channel_dim).backend


_ALL = "fp32, bf16, fp16 in all layouts with channels or tokens next to each other"
SPEC = SteeringSpec(
    name="affine_shift",
    function=affine_shift,
    reference=affine_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL, "cuda": _ALL},
    variants={"plain": {}},
)
