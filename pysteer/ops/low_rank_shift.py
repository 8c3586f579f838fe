"""`low_rank_shift`: y = x + s (U V'x + b), a map of low rank and a bias, chosen and weighted per row.

Full-matrix transport, erasing or projecting on a subspace, and replacing one direction by another are of this form.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.ops import backends
from pysteer.ops.by_mean import kernel_serves, launch_by_mean, shift_by_mean
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed, refuse_out
from pysteer.ops.launch import Launch, choose, on_device, packed, raise_for, run_compiled
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, full_precision, laid_out_like, look_up, means_of_rows
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor read, Tensor write, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " int channel_dim) -> Tensor"
)
_BY_MEAN = "low_rank_by_mean"
_LARGEST_RANK = {"cpu": 64, "triton": 64}  # of the fast kernels


def low_rank_shift_reference(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    of_mean: bool = False,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `low_rank_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    high = torch.promote_types(x.dtype, torch.float32)
    moved = x.movedim(channel_dim, -1).to(high)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    v, u, b = (bank.index_select(0, which).to(high) for bank in (read, write, bias))
    active = active_tokens(x, which, s, span, channel_dim)
    base = tokens
    if of_mean:
        base = means_of_rows(tokens, active.movedim(channel_dim, -1).reshape(len(x), -1, 1), span, -1)
    with full_precision(x):
        shift = torch.baddbmm(b.unsqueeze(1), base @ v.mT, u)
    y = (tokens + s.to(high).reshape(-1, 1, 1) * shift).reshape(moved.shape).movedim(-1, channel_dim)
    return laid_out_like(torch.where(active, y.to(x.dtype), x), x)


def _choose(x: Tensor, out: Tensor, rank: int, channel_dim: int) -> Launch:
    return choose("low_rank_shift", x, out, channel_dim, lambda name: rank <= _LARGEST_RANK.get(name, 0))


def _run(
    out: Tensor,
    x: Tensor,
    read: Tensor,
    write: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    channel_dim: int,
) -> Tensor:
    launch = _choose(x, out, read.shape[1], channel_dim)
    if launch.backend == "reference":
        table = (slot, strength, clock, span)
        return out.copy_(low_rank_shift_reference(x, read, write, bias, *table, channel_dim=channel_dim))
    tensors = packed(read, write, bias, slot, strength, clock, span)
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("low_rank_shift").launch(out, x, *tensors, launch.source, launch.target)
        return out
    sizes = (*launch.shape, *read.shape[:2], *slot.shape, DTYPE_CODES[x.dtype], torch.get_num_threads())
    status = run_compiled("low_rank_shift", (x, out, *tensors), *sizes)
    if status:
        raise_for(status, slot, clock, read.shape[0])
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, read, write, bias, slot, strength, clock, span, ctx.channel_dim = inputs
    ctx.save_for_backward(read, write, bias, slot, strength, clock, span)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    read, write, bias, *table = ctx.saved_tensors
    # dy/dx = 1 + s U V': its transpose is the op with the two factors exchanged and no bias.
    shift = low_rank_shift(gradient, write, read, torch.zeros_like(bias), *table, channel_dim=ctx.channel_dim)
    return (shift, *[None] * 8)


_plain, _differentiable = declare("low_rank_shift", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def low_rank_shift(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    of_mean: bool = False,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s (sum_k (x·read_k) write_k + bias) for every token.

    A full affine map y = A x + b has write' read = A - 1 from its singular values; erasing the span of orthonormal v_k
    is read = v, write = -v; replacing direction v by w is write = w - v. Row r uses parameter set `slot[clock, r]` with
    strength s = `strength[clock, r]`; rows with slot 0 or strength 0 and tokens outside their span come back bit for
    bit. Arithmetic is fp32 with one rounding to the dtype of `x`. Differentiable in everything; in `x` with the fast
    kernels. With `of_mean` all tokens of a row are shifted by what the mean of those in its span is shifted by.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        read, write: [P, r, D] fp32, what is read off a token and what is added for it; set 0 is never used.
        bias: [P, D] fp32.
        slot: [S, Rcap] int32 with Rcap >= R; 0 leaves the row alone.
        strength: [S, Rcap] fp32, no unit.
        clock: [] int64, the step.
        span: [Rcap, 2] int32, the tokens [start, end) that are touched; None for all.
        of_mean: shift by what the mean would be shifted by.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype or device does not fit, or, on a CPU, the clock or a slot is out of range. On a GPU,
            where looking would wait for the device, such rows come out as NaN.
    """
    width = check_activation(x, channel_dim, out)
    tail = (*read.shape[1:2], width)
    check_banks(x, read=(read, tail), write=(write, tail), bias=(bias, (width,)))
    check_table(x, slot, strength, clock, span)
    arguments = (read, write, bias, slot, strength, clock, span)
    if of_mean and out is not None and x.requires_grad and torch.is_grad_enabled():
        refuse_out(x)
    if of_mean and kernel_serves(_BY_MEAN, x, out, channel_dim, (read, write, bias, strength)):
        banks, table = arguments[:3], (slot, strength, clock, span)
        return shift_by_mean(_BY_MEAN, x, banks, *table, out, channel_dim, read.shape[1])
    if of_mean or _in_plain_torch(x, read.shape[1]) or plain_torch_needed(read, write, bias, strength):
        y = low_rank_shift_reference(x, *arguments, of_mean=of_mean, channel_dim=channel_dim)
        return y if out is None else out.copy_(y)
    return dispatch(
        x,
        out,
        (*arguments, channel_dim),
        wants_grad=x.requires_grad,
        plain=_plain,
        differentiable=_differentiable,
        run=_run,
    )


def _in_plain_torch(x: Tensor, rank: int) -> bool:
    """Whether a compiled graph is better off with two matrix products that it knows."""
    kernels = backends.choices(x.device.type)
    return torch.compiler.is_compiling() and not any(rank <= _LARGEST_RANK.get(name, 0) for name in kernels)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, rank = case.sizes.get("sets", 4), case.sizes.get("rank", 4)
    banks = {
        "read": torch.randn(sets, rank, case.width, generator=generator) / case.width**0.5,
        "write": torch.randn(sets, rank, case.width, generator=generator) / rank**0.5,
        "bias": torch.randn(sets, case.width, generator=generator),
    }
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _implementation(x: Tensor, read: Tensor, out: Tensor | None = None, channel_dim: int = -1, **inputs: Any) -> str:
    if inputs.get("of_mean"):
        return launch_by_mean(_BY_MEAN, x, out, channel_dim).backend
    return _choose(x, torch.empty_like(x) if out is None else out, read.shape[1], channel_dim).backend


_ALL = "ranks up to 64; fp32, bf16, fp16, channels or tokens next to each other"
SPEC = SteeringSpec(
    name="low_rank_shift",
    function=low_rank_shift,
    reference=low_rank_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": _ALL},
    variants={"plain": {}, "mean": {"of_mean": True}},
    sizes=({"rank": 4}, {"rank": 1}, {"rank": 7}, {"rank": 32}),
)
