"""`norm_affine`: RMS, layer or group norm followed by `affine_shift`, in one pass over the activation.

n = (x - m) / sqrt(v + eps) w + c with the mean m and the mean square v of a token's channels (RMS: m = 0) or of a group
of channels over all tokens of a row, then y = n + s ((g - 1) n + b). Steering a norm's output by itself costs another
read and write; here it costs nothing, because the two affine maps are one.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed, raise_for
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, along, laid_out_like, look_up
from pysteer.ops.registry import Case, OpSpec, activation, tables

_SCHEMA = (
    "(Tensor x, Tensor gain, Tensor bias, Tensor slot, Tensor strength, Tensor clock, Tensor? span, Tensor? weight,"
    " Tensor? norm_bias, str kind, float eps, bool plus_one, int groups, int channel_dim) -> Tensor"
)
_KINDS = ("rms", "layer", "group")
_WIDEST = 16384  # channels that one Triton program holds


def _normalised(xf: Tensor, kind: str, eps: float, groups: int, channel_dim: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return (x - m) / sqrt(v + eps), 1 / sqrt(v + eps), and the dimensions that m and v are means over.

    For "group" the channels are split into [groups, D / groups], here and in the result.
    """
    channel = channel_dim % xf.dim()
    dims = [channel]
    if kind == "group":
        xf = xf.unflatten(channel, (groups, xf.shape[channel] // max(groups, 1)))
        dims = [dim for dim in range(1, xf.dim()) if dim != channel]
    if kind != "rms":
        xf = xf - xf.mean(dims, keepdim=True)
    root = torch.rsqrt(xf.square().mean(dims, keepdim=True) + eps)
    return xf * root, root, dims


def _per_channel(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return values.reshape(shape)


def norm_affine_reference(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-5,
    plus_one: bool = False,
    groups: int = 32,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `norm_affine` computes, in plain torch; fp64 `x` is computed in fp64."""
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    n = _normalised(x.to(wide), kind, eps, groups, channel_dim)[0].reshape(x.shape)
    if weight is not None:
        w = _per_channel(weight.to(wide), x, channel_dim)
        n = n * (1 + w if plus_one else w)
    if norm_bias is not None:
        n = n + _per_channel(norm_bias.to(wide), x, channel_dim)
    g, b = (along(bank.index_select(0, which).to(wide), x, channel_dim) for bank in (gain, bias))
    y = n + along(s.to(wide), x, channel_dim) * ((g - 1) * n + b)
    return laid_out_like(torch.where(active_tokens(x, which, s, span, channel_dim), y, n).to(x.dtype), x)


def _in_plain_torch(x: Tensor, *arguments: Any) -> Tensor:
    *table, weight, norm_bias, kind, eps, plus_one, groups, channel_dim = arguments
    norm = {"weight": weight, "norm_bias": norm_bias, "kind": kind, "eps": eps, "plus_one": plus_one, "groups": groups}
    return norm_affine_reference(x, *table, **norm, channel_dim=channel_dim)


def _serves(kind: str, launch: Launch) -> bool:
    a, b = launch.source, launch.target
    if a is None or b is None:
        return False
    by_token = a.width == 1 or (a.channel_stride == 1 and b.channel_stride == 1)
    by_channel = a.tokens > 1 and a.token_stride == 1 and b.token_stride == 1
    if kind == "group":
        return by_channel or (by_token and launch.backend == "cpu")
    return by_token and (launch.backend == "cpu" or a.width <= _WIDEST)


def _choose(x: Tensor, out: Tensor, kind: str, channel_dim: int) -> Launch:
    launch = choose("norm_affine", x, out, channel_dim)
    return launch if _serves(kind, launch) else Launch("reference")


def _run(
    out: Tensor,
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str,
    eps: float,
    plus_one: bool,
    groups: int,
    channel_dim: int,
) -> Tensor:
    launch = _choose(x, out, kind, channel_dim)
    if launch.backend == "reference":
        table = (gain, bias, slot, strength, clock, span)
        norm = (weight, norm_bias, kind, eps, plus_one, groups)
        return out.copy_(_in_plain_torch(x, *table, *norm, channel_dim))
    weight, norm_bias = (None if each is None else each.float() for each in (weight, norm_bias))
    tensors = packed(weight, norm_bias, gain, bias, slot, strength, clock, span)
    if launch.backend == "triton":
        with on_device(x):
            kernels = backends.load_kernels("norm_affine")
            kernels.launch(out, x, *tensors, kind, eps, plus_one, groups, launch.source, launch.target)
        return out
    sizes = (*launch.shape, gain.shape[0], *slot.shape, DTYPE_CODES[x.dtype])
    options = (_KINDS.index(kind), eps, plus_one, groups)
    arguments = (*addresses(x, out, *tensors), *sizes, *options, torch.get_num_threads())
    if status := backends.extension().norm_affine(*arguments):
        raise_for(status, slot, clock, gain.shape[0])
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gain, _, slot, strength, clock, span, weight, _, *options = inputs
    ctx.save_for_backward(x, gain, slot, strength, clock, span, weight)
    ctx.options = options


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, slot, strength, clock, span, weight = ctx.saved_tensors
    kind, eps, plus_one, groups, channel_dim = ctx.options
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    unit, root, dims = _normalised(x.to(wide), kind, eps, groups, channel_dim)
    slope = along(s.to(wide).unsqueeze(1) * (gain.index_select(0, which).to(wide) - 1), x, channel_dim)
    h = gradient.to(wide)
    h = torch.where(active_tokens(x, which, s, span, channel_dim), h + slope * h, h)
    if weight is not None:
        w = _per_channel(weight.to(wide), x, channel_dim)
        h = h * (1 + w if plus_one else w)
    h = h.reshape(unit.shape)
    inner = h - unit * (h * unit).mean(dims, keepdim=True)
    if kind != "rms":
        inner = inner - h.mean(dims, keepdim=True)
    return ((root * inner).reshape(x.shape).to(x.dtype), *[None] * 13)


_plain, _differentiable = declare("norm_affine", _SCHEMA, _forward, setup_context=_setup_context, backward=_backward)


def _check_norm(x: Tensor, width: int, kind: str, groups: int, eps: float, **vectors: Tensor | None) -> None:
    if kind not in _KINDS:
        raise InputError("kind", value=kind, allowed=", ".join(_KINDS))
    if kind == "group" and (groups < 1 or width % groups):
        raise InputError("groups", value=groups, allowed=f"a divisor of the width {width}")
    if not eps >= 0:
        raise InputError("eps", value=eps, allowed="0 or more")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (width,) or vector.device != x.device or not vector.dtype.is_floating_point:
            value = f"{str(vector.dtype).removeprefix('torch.')} {list(vector.shape)} on {vector.device}"
            raise InputError(name, value=value, allowed=f"floating point [{width}] on {x.device}")


def norm_affine(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-5,
    plus_one: bool = False,
    groups: int = 32,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return the norm of x, then shifted as `affine_shift` does, y = n + s ((g - 1) n + b).

    n = x / sqrt(mean(x²) + eps) w for "rms", (x - mean) / sqrt(var + eps) w + c for "layer", both over the channels of
    a token, and for "group" over the channels of a group and all tokens of a row. Rows with slot 0 or strength 0 and
    tokens outside their span give n, the same bits whatever the table says elsewhere. Arithmetic is fp32 with one
    rounding at the end (some models round once more, before the gain). Differentiable in everything; in `x` with the
    fast kernels. In a compiled graph it is plain torch, which fuses with what stands around it.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        gain, bias: [P, D] fp32, of the shift; set 0 is never used.
        slot, strength, clock, span: the steering table, see `affine_shift`.
        weight, norm_bias: [D], w and c of the norm, any floating point; None for 1 and 0.
        kind: "rms", "layer" or "group".
        eps: added to the mean square.
        plus_one: `weight` holds w - 1, as Gemma stores it.
        groups: of channels, for "group".
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: as `affine_shift`, or an option that is not known.
    """
    width = check_activation(x, channel_dim, out)
    _check_norm(x, width, kind, groups, eps, weight=weight, norm_bias=norm_bias)
    check_banks(x, gain=(gain, (width,)), bias=(bias, (width,)))
    check_table(x, slot, strength, clock, span)
    table = (gain, bias, slot, strength, clock, span)
    arguments = (*table, weight, norm_bias, kind, eps, plus_one, groups, channel_dim)
    parameters = [each for each in (gain, bias, strength, weight, norm_bias) if each is not None]
    if torch.compiler.is_compiling() or plain_torch_needed(*parameters):
        y = _in_plain_torch(x, *arguments)
        return y if out is None else out.copy_(y)
    return dispatch(
        x, out, arguments, wants_grad=x.requires_grad, plain=_plain, differentiable=_differentiable, run=_run
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, width, options = case.sizes.get("sets", 4), case.width, dict(case.options)
    gain = 1 + 0.5 * torch.randn(sets, width, generator=generator)
    given = {"gain": gain, "bias": torch.randn(sets, width, generator=generator)}
    if options.pop("weighted", True):
        given["weight"] = 1 + 0.2 * torch.randn(width, generator=generator) - int(bool(options.get("plus_one")))
        if options.get("kind", "rms") != "rms":
            given["norm_bias"] = 0.2 * torch.randn(width, generator=generator)
    if options.get("kind") == "group":
        options["groups"] = max(count for count in range(1, 33) if width % count == 0)
    given = {name: tensor.to(case.device) for name, tensor in given.items()}
    return {"x": x, **given, **tables(case, sets), "channel_dim": channel_dim, **options}


def _implementation(x: Tensor, kind: str = "rms", out: Tensor | None = None, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, torch.empty_like(x) if out is None else out, kind, channel_dim).backend


_ALL = "rms and layer with channels next to each other"
SPEC = OpSpec(
    name="norm_affine",
    function=norm_affine,
    reference=norm_affine_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={
        "cpu": f"fp32, bf16, fp16: {_ALL}, group with channels or tokens next to each other",
        "triton": f"fp32, bf16, fp16: {_ALL}, up to {_WIDEST} of them, group with tokens next to each other",
    },
    variants={
        "rms": {"kind": "rms"},
        "gemma": {"kind": "rms", "plus_one": True},
        "layer": {"kind": "layer"},
        "group": {"kind": "group"},
        "bare": {"kind": "layer", "weighted": False},
    },
    gradients=("x",),
    defaults={"weight": None, "norm_bias": None, "eps": 1e-5, "plus_one": False, "groups": 32},
)
