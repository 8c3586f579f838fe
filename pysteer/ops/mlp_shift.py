"""`mlp_shift`: every token of a row is shifted by what a small network makes of the mean of the row's tokens.

The form of a learned transport map that is conditioned on the sample. The network sees one vector per row, so all it
costs is a read for the means and a pass for the sum.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from pysteer.ops.by_mean import kernel_serves, launch_by_mean, shift_by_mean
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import refuse_out
from pysteer.ops.lookup import active_tokens, along, full_precision, laid_out_like, look_up, means_of_rows
from pysteer.ops.registry import Case, SteeringSpec, activation, tables


def mlp_shift_reference(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    third: Tensor,
    third_bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    residual: bool = True,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `mlp_shift` computes; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    active = active_tokens(x, which, s, span, channel_dim)
    mean = means_of_rows(wide, active, span, channel_dim).reshape(len(x), 1, x.shape[channel_dim])
    hidden = mean
    with full_precision(x):
        for number, (weight, bias) in enumerate(((first, first_bias), (second, second_bias), (third, third_bias))):
            w, b = weight.index_select(0, which).to(wide.dtype), bias.index_select(0, which).to(wide.dtype)
            hidden = torch.baddbmm(b.unsqueeze(1), gelu(hidden) if number else hidden, w.mT)
    shift = (hidden if residual else hidden - mean)[:, 0]
    y = wide + along(s.to(wide.dtype), x, channel_dim) * along(shift, x, channel_dim)
    return laid_out_like(torch.where(active, y.to(x.dtype), x), x)


def mlp_shift(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor,
    second: Tensor,
    second_bias: Tensor,
    third: Tensor,
    third_bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    residual: bool = True,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s N(m), with m the mean of the row's tokens and N(m) = W3 gelu(W2 gelu(W1 m + b1) + b2) + b3.

    Without `residual` the network gives the place itself, y = x + s (N(m) - m). A span says which tokens make the mean
    and are shifted. The steering table, inactive rows and tokens, and rounding are as for `affine_shift`.
    Differentiable in all arguments.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16, fp16 or fp64.
        first: [P, H, D] fp32; set 0 is never used.
        second: [P, H, H] fp32.
        third: [P, D, H] fp32.
        first_bias, second_bias: [P, H] fp32; third_bias: [P, D] fp32.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        residual: whether the network gives the shift.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    width = check_activation(x, channel_dim, out)
    size = first.shape[1] if first.dim() == 3 else 0
    check_banks(
        x, first=(first, (size, width)), first_bias=(first_bias, (size,)), second=(second, (size, size)),
        second_bias=(second_bias, (size,)), third=(third, (width, size)), third_bias=(third_bias, (width,)),
    )  # fmt: skip
    check_table(x, slot, strength, clock, span)
    if out is not None and x.requires_grad and torch.is_grad_enabled():
        refuse_out(x)
    banks = (first, first_bias, second, second_bias, third, third_bias)
    if size and kernel_serves("mlp_shift", x, out, channel_dim, (*banks, strength)):
        table = (slot, strength, clock, span)
        return shift_by_mean("mlp_shift", x, banks, *table, out, channel_dim, size, residual)
    y = mlp_shift_reference(x, *banks, slot, strength, clock, span, residual=residual, channel_dim=channel_dim)
    return y if out is None else out.copy_(y)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, size = case.sizes.get("sets", 4), case.sizes.get("hidden", 6)
    shapes = {"first": (size, case.width), "second": (size, size), "third": (case.width, size)}
    banks = {}
    for name, (rows, columns) in shapes.items():
        banks[name] = torch.randn(sets, rows, columns, generator=generator) / columns**0.5
        banks[f"{name}_bias"] = torch.randn(sets, rows, generator=generator)
    banks = {name: bank.to(case.device) for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _implementation(x: Tensor, channel_dim: int = -1, out: Tensor | None = None, **_: Any) -> str:
    return launch_by_mean("mlp_shift", x, out, channel_dim).backend


SPEC = SteeringSpec(
    name="mlp_shift",
    function=mlp_shift,
    reference=mlp_shift_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": "fp32, bf16, fp16, channels or tokens next to each other; eager code without gradients"},
    variants={"residual": {}, "place": {"residual": False}},
    defaults={"residual": True},
)
