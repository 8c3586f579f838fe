"""`linear_shift`: a linear layer followed by `affine_shift`, y = shift(x Wᵀ + c), without a pass of its own.

In fp32 the matrix product is that of torch, and `affine_shift` then works in place on what is still in the cache. In
bfloat16 on a CPU that multiplies it (AVX-512 BF16, AMX) a kernel of our own has the shift in the epilogue of the
product, which is rounded once; any other 16-bit product is taken in fp32. A Triton kernel of that kind is there for
those who insist on it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.affine_shift import affine_shift, affine_shift_reference
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import addresses, choose, on_device, packed, raise_for
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import full_precision
from pysteer.ops.registry import Case, OpSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor gain, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span,"
    " Tensor? linear_bias) -> Tensor"
)


_STEP = 32  # inputs that a tile of AMX multiplies at once; without tiles the same are served


def _product(x: Tensor, weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """x Wᵀ + c in `dtype`, or in that of `x` and at least fp32."""
    high = torch.promote_types(x.dtype, torch.float32) if dtype is None else dtype
    with full_precision(x):
        if x.is_cuda and high is torch.float32 and x.dtype is not high and not torch.compiler.is_compiling():
            n = torch.mm(x.flatten(0, -2), weight.T, out_dtype=high).view(*x.shape[:-1], len(weight))
            return n if linear_bias is None else n.add_(linear_bias)
        return F.linear(x.to(high), weight.to(high), None if linear_bias is None else linear_bias.to(high))


def linear_shift_reference(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
) -> Tensor:
    """Return what `linear_shift` computes, in plain torch; fp64 `x` is computed in fp64."""
    n = _product(x, weight, linear_bias)
    return affine_shift_reference(n, gain, bias, slot, strength, clock, span).to(x.dtype)


def _chosen(x: Tensor, y: Tensor) -> str:
    if backends.insisted() == "triton" and x.dtype in DTYPE_CODES and x.numel() and y.numel():
        return "triton" if "triton" in backends.choices(x.device.type) else "reference"
    return "cpu" if _in_bfloat16(x, y.new_empty(1, x.shape[-1])) else choose("affine_shift", y, y, -1).backend


def _run(
    out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    linear_bias: Tensor | None,
) -> Tensor:
    table = (gain, bias, slot, strength, clock, span)
    if backends.insisted() == "triton":
        y = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device) if out is None else out
        if _chosen(x, y) == "triton" and y.is_contiguous():
            tensors = packed(x, weight, linear_bias, *table)
            with on_device(x):
                backends.load_kernels("linear_shift").launch(y, *tensors)
            return y
    if _in_bfloat16(x, weight):
        return _by_panels(out, x, weight, linear_bias, *table)
    n = _product(x, weight, linear_bias).contiguous()
    if n.dtype is x.dtype:
        return affine_shift(n, *table, out=n if out is None else out)
    affine_shift(n, *table, out=n)
    return n.to(x.dtype) if out is None else out.copy_(n)


def _in_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel for bfloat16 serves: a multiple of 32 inputs, next to each other in the weight."""
    if x.dtype is not torch.bfloat16 or weight.dtype is not x.dtype or "cpu" not in backends.choices(x.device.type):
        return False
    fits = x.shape[-1] % _STEP == 0 and x.numel() > 0 and len(weight) > 0 and weight.stride(1) == 1
    return fits and backends.provides("cpu", "linear_shift") and backends.extension().linear_shift_serves()


def _by_panels(
    out: Tensor | None,
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
) -> Tensor:
    own = out is not None and out.is_contiguous()
    y = out if out is not None and own else x.new_empty(*x.shape[:-1], len(weight))
    x = x.contiguous()
    linear_bias, *table = packed(linear_bias, gain, bias, slot, strength, clock, span)
    sizes = (x.shape[0], x[0].numel() // x.shape[-1], x.shape[-1], len(weight), weight.stride(0), len(gain))
    places = addresses(x, y, weight, linear_bias, *table)
    if status := backends.extension().linear_shift(*places, *sizes, *slot.shape, torch.get_num_threads()):
        raise_for(status, slot, clock, len(gain))
    return y if out is None or own else out.copy_(y)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(None, x, *arguments)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, gain, _, slot, strength, clock, span, linear_bias = inputs
    ctx.save_for_backward(x, weight, gain, slot, strength, clock, span)
    ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gain, slot, strength, clock, span = ctx.saved_tensors
    table = (gain, torch.zeros_like(gain), slot, strength, clock, span)
    g = affine_shift(gradient.contiguous(), *table)
    to_x, to_weight, to_bias = (ctx.needs_input_grad[place] for place in (0, 1, 8))
    with full_precision(x):
        dx = g @ weight.to(g.dtype) if to_x else None
        dw = (g.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype) if to_weight else None
    db = g.flatten(0, -2).sum(0).to(ctx.bias_dtype) if to_bias and ctx.bias_dtype is not None else None
    return (dx, dw, *[None] * 6, db)


_plain, _differentiable = declare(
    "linear_shift", _SCHEMA, _forward, fake=_fake, setup_context=_setup_context, backward=_backward
)


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check_layer(x: Tensor, weight: Tensor, linear_bias: Tensor | None, width: int, out: Tensor | None) -> int:
    """Check weight, linear_bias and out; return the number of outputs N."""
    free = x.dtype is torch.float64  # the tests' own precision, in plain torch
    name = str(x.dtype).removeprefix("torch.")
    fits = free or weight.dtype is x.dtype
    if weight.dim() != 2 or weight.shape[1] != width or weight.device != x.device or not fits:
        raise InputError("weight", value=_say(weight), allowed=f"{name} ['N', {width}] on {x.device}, like x")
    count = weight.shape[0]
    if linear_bias is not None:
        fits = free or linear_bias.dtype is x.dtype
        if linear_bias.shape != (count,) or linear_bias.device != x.device or not fits:
            raise InputError("linear_bias", value=_say(linear_bias), allowed=f"{name} [{count}] on {x.device}, like x")
    if out is not None and (out.shape != (*x.shape[:-1], count) or out.dtype != x.dtype or out.device != x.device):
        allowed = f"{name} {[*x.shape[:-1], count]} on {x.device}"
        raise InputError("out", value=_say(out), allowed=allowed)
    return count


def linear_shift(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return a linear layer's output n = x Wᵀ + c, shifted as `affine_shift` does: y = n + s ((g - 1) n + b).

    Rows with slot 0 or strength 0 and tokens outside their span give n, the same bits whatever the table says
    elsewhere. Arithmetic is fp32 with one rounding at the end: n itself is not rounded. Differentiable in everything;
    in `x`, `weight` and `linear_bias` with the fast kernels, as products in the dtype of `x`. In a compiled graph
    in fp32 or for a GPU it is plain torch, which fuses with what stands around it, and there n has the dtype of `x`.

    Args:
        x: [R, K] or [R, *tokens, K]; fp32, bf16 or fp16 (fp64 in plain torch).
        weight: [N, K], W, of the dtype of `x`.
        gain, bias: [P, N] fp32, of the shift; set 0 is never used.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        linear_bias: [N], c, of the dtype of `x`; None for 0.
        out: where to write, [R, *tokens, N]; not `x`.

    Returns:
        A fresh tensor [R, *tokens, N], or `out`.

    Raises:
        InputError: as `affine_shift`, or the layer does not fit.
    """
    count = _check_layer(x, weight, linear_bias, check_activation(x, -1, None), out)
    check_banks(x, gain=(gain, (count,)), bias=(bias, (count,)))
    check_table(x, slot, strength, clock, span)
    arguments = (weight, gain, bias, slot, strength, clock, span, linear_bias)
    wide = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)  # better off with the kernel in a compiled graph too
    compiling = torch.compiler.is_compiling() and not wide
    if compiling or plain_torch_needed(gain, bias, strength):
        table = (gain, bias, slot, strength, clock, span)
        n = _product(x, weight, linear_bias, x.dtype if compiling else None)
        y = affine_shift_reference(n, *table).to(x.dtype)
        return y if out is None else out.copy_(y)
    layer = (x, weight) if linear_bias is None else (x, weight, linear_bias)
    return dispatch(
        x,
        out,
        arguments,
        wants_grad=any(each.requires_grad for each in layer),
        plain=_plain,
        differentiable=_differentiable,
        run=_run,
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, _ = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, count, options = case.sizes.get("sets", 4), case.sizes.get("outputs", 72), dict(case.options)
    given = {
        "weight": (torch.randn(count, case.width, generator=generator) / case.width**0.5).to(case.dtype),
        "gain": 1 + 0.5 * torch.randn(sets, count, generator=generator),
        "bias": torch.randn(sets, count, generator=generator),
        "linear_bias": torch.randn(count, generator=generator).to(case.dtype),
    }
    given = {name: tensor.to(case.device) for name, tensor in given.items()}
    return {"x": x, **given, **tables(case, sets), **options}


def _implementation(x: Tensor, weight: Tensor, **_: Any) -> str:
    return _chosen(x, torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device))


_PRODUCT = "torch's product, and the kernel of affine_shift in place on the result"
_EPILOGUE = "; bf16 with AVX-512 BF16 or AMX and a multiple of 32 inputs: the shift in the epilogue"
SPEC = OpSpec(
    name="linear_shift",
    function=linear_shift,
    reference=linear_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={
        "cpu": _PRODUCT + _EPILOGUE,
        "cuda": _PRODUCT,
        "triton": "the shift in the epilogue; only for those who insist",
    },
    variants={"plain": {}},
    gradients=("x", "weight", "linear_bias"),
    wide=("x", "weight"),
    layouts=("tokens", "rows"),
)
