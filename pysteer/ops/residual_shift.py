"""`residual_shift`: y = x + gate ⊙ shift(f), the end of a residual branch with `affine_shift` in the same pass.

x is the residual stream, f the output of a block (attention, feed-forward), and the gate that of an AdaLN, one number
per row and channel. Steering f by itself costs a read and a write of f; here it costs neither.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.affine_shift import affine_shift
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for
from pysteer.ops.layouts import DTYPE_CODES, Frame, frame_of
from pysteer.ops.lookup import active_tokens, along, laid_out_like, look_up
from pysteer.ops.registry import Case, OpSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor f, Tensor gain, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " Tensor? gate, int channel_dim) -> Tensor"
)


def residual_shift_reference(
    x: Tensor,
    f: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `residual_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32)
    g, b = (along(bank.index_select(0, which).to(wide), x, channel_dim) for bank in (gain, bias))
    ff = f.to(wide)
    shifted = ff + along(s.to(wide), x, channel_dim) * ((g - 1) * ff + b)
    ff = torch.where(active_tokens(f, which, s, span, channel_dim), shifted, ff)
    if gate is not None:
        ff = along(gate.to(wide), x, channel_dim) * ff
    return laid_out_like((x.to(wide) + ff).to(x.dtype), x)


def _choose(x: Tensor, f: Tensor, out: Tensor, channel_dim: int) -> tuple[Launch, Frame | None]:
    launch = Launch("reference")
    if f.dtype == x.dtype or (x.dtype is torch.float32 and f.dtype in DTYPE_CODES):
        launch = choose("residual_shift", x, out, channel_dim)
    if launch.source is None or launch.target is None:
        return launch, None
    frame = frame_of(f, channel_dim)
    if frame is None:
        return Launch("reference"), None
    frames = (launch.source, launch.target, frame)
    by_token = frame.width == 1 or all(each.channel_stride == 1 for each in frames)
    by_channel = frame.tokens == 1 or all(each.token_stride == 1 for each in frames)
    return (launch, frame) if by_token or by_channel else (Launch("reference"), None)


def _run(
    out: Tensor,
    x: Tensor,
    f: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    gate: Tensor | None,
    channel_dim: int,
) -> Tensor:
    launch, frame = _choose(x, f, out, channel_dim)
    if frame is None:
        table = (gain, bias, slot, strength, clock, span)
        return out.copy_(residual_shift_reference(x, f, *table, gate=gate, channel_dim=channel_dim))
    gate = None if gate is None else gate.float()
    tensors = packed(gate, gain, bias, slot, strength, clock, span)
    if launch.backend == "triton":
        with on_device(x):
            kernels = backends.load_kernels("residual_shift")
            kernels.launch(out, x, f, *tensors, launch.source, frame, launch.target)
        return out
    codes = (DTYPE_CODES[x.dtype], DTYPE_CODES[f.dtype])
    sizes = (*launch.shape, *frame[3:], gain.shape[0], *slot.shape, *codes)
    status = backends.extension().residual_shift(*addresses(x, f, out, *tensors), *sizes, torch.get_num_threads())
    if status:
        raise_for(status, slot, clock, gain.shape[0])
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, f, gain, _, slot, strength, clock, span, gate, ctx.channel_dim = inputs
    ctx.save_for_backward(gain, slot, strength, clock, span, gate)
    ctx.dtype = f.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gain, slot, strength, clock, span, gate = ctx.saved_tensors
    own = gradient.clone()  # a tensor of its own: the caller may accumulate into it
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if gate is not None:
        wide = wide * along(gate.to(wide.dtype), wide, ctx.channel_dim)
    shift = affine_shift(wide, gain, torch.zeros_like(gain), slot, strength, clock, span, channel_dim=ctx.channel_dim)
    return (own, shift.to(ctx.dtype), *[None] * 8)


_plain, _differentiable = declare("residual_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def _check_branch(x: Tensor, f: Tensor, gate: Tensor | None, width: int) -> None:
    if f.shape != x.shape or f.device != x.device or not f.dtype.is_floating_point:
        value = f"{str(f.dtype).removeprefix('torch.')} {list(f.shape)} on {f.device}"
        raise InputError("f", value=value, allowed=f"floating point {list(x.shape)} on {x.device}, like x")
    if gate is None:
        return
    if gate.shape != (x.shape[0], width) or gate.device != x.device or not gate.dtype.is_floating_point:
        value = f"{str(gate.dtype).removeprefix('torch.')} {list(gate.shape)} on {gate.device}"
        raise InputError("gate", value=value, allowed=f"floating point {[x.shape[0], width]} on {x.device}")


def residual_shift(
    x: Tensor,
    f: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + gate (f + s ((g - 1) f + b)) with g, b and s looked up for every row in the steering table.

    The shift and the table are those of `affine_shift`. Rows with slot 0 or strength 0 and tokens outside their span
    give x + gate f, the same bits whatever the table says elsewhere. Arithmetic is fp32 with one rounding to the dtype
    of `x`. Differentiable in everything; in `x` and `f` with the fast kernels. In a compiled graph it is plain torch,
    which fuses with what stands around it.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        f: like `x`, or bf16 or fp16 where `x` is fp32.
        gain, bias: [P, D] fp32; set 0 is never used.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        gate: [R, D], any floating point; None for 1.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: as `affine_shift`.
    """
    width = check_activation(x, channel_dim, out)
    _check_branch(x, f, gate, width)
    check_banks(x, gain=(gain, (width,)), bias=(bias, (width,)))
    check_table(x, slot, strength, clock, span)
    arguments = (f, gain, bias, slot, strength, clock, span, gate, channel_dim)
    parameters = (gain, bias, strength) if gate is None else (gain, bias, strength, gate)
    if torch.compiler.is_compiling() or plain_torch_needed(*parameters):
        table = (gain, bias, slot, strength, clock, span)
        y = residual_shift_reference(x, f, *table, gate=gate, channel_dim=channel_dim)
        return y if out is None else out.copy_(y)
    return dispatch(
        x,
        out,
        arguments,
        wants_grad=x.requires_grad or f.requires_grad,
        plain=_plain,
        differentiable=_differentiable,
        run=_run,
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, options = case.sizes.get("sets", 4), dict(case.options)
    gain = 1 + 0.5 * torch.randn(sets, case.width, generator=generator)
    bias = torch.randn(sets, case.width, generator=generator)
    f = torch.randn(x.shape, generator=generator).to(device=x.device, dtype=x.dtype)
    if options.pop("half", False) and x.dtype is torch.float32:
        f = f.to(torch.bfloat16)
    f = torch.empty_like(x, dtype=f.dtype).copy_(f)
    given = {"x": x, "f": f, "gain": gain.to(case.device), "bias": bias.to(case.device)}
    if options.pop("gated", True):
        options["gate"] = torch.randn(case.rows, case.width, generator=generator).to(case.device)
    return {**given, **tables(case, sets), "channel_dim": channel_dim, **options}


def _implementation(x: Tensor, f: Tensor, out: Tensor | None = None, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, f, torch.empty_like(x) if out is None else out, channel_dim)[0].backend


_ALL = "fp32, bf16, fp16, and 16-bit f with fp32 x; channels or tokens next to each other in all of them"
SPEC = OpSpec(
    name="residual_shift",
    function=residual_shift,
    reference=residual_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL},
    variants={"gate": {}, "half": {"half": True}, "plain": {"gated": False}},
    gradients=("x", "f"),
    defaults={"gate": None},
    wide=("x", "f"),
    rowwise=("f", "gate"),
)
