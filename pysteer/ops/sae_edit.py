"""`sae_edit`: change a few latents of a sparse autoencoder without encoding or decoding.

Decoding edited and unedited latents and adding the difference to x is x + sum_e g_e (new a_e - a_e) d_e over the edited
latents alone, with a_e = relu(x·w_e + b_e), its direction d_e and a gate g_e. What the autoencoder does not explain
stays as it is. An edit costs two passes over D instead of three products with all M latents.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import declare, dispatch, plain_torch_needed
from pysteer.ops.launch import Launch, choose, on_device, packed, raise_for, run_compiled
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, full_precision, laid_out_like, look_up
from pysteer.ops.registry import Case, SteeringSpec, activation, tables

_ARGUMENTS = (
    "Tensor encoder, Tensor encoder_bias, Tensor decoder, Tensor scale, Tensor add, Tensor slot, Tensor strength,"
    " Tensor clock, Tensor? span, Tensor? level, Tensor? full_encoder, Tensor? full_bias, Tensor? latent, str gate,"
    " int k, int channel_dim"
)
GATES = ("none", "relu", "threshold", "topk")  # in the order of csrc/sae_edit.cpp
_MOST_EDITS = 16  # of the Triton kernels
_CHUNK = 1024  # latents that plain torch ranks at a time


class EditArguments(NamedTuple):
    """All arguments of `sae_edit` but `x`, in the order of the schema."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    scale: Tensor
    add: Tensor
    slot: Tensor
    strength: Tensor
    clock: Tensor
    span: Tensor | None
    level: Tensor | None
    full_encoder: Tensor | None
    full_bias: Tensor | None
    latent: Tensor | None
    gate: str
    k: int
    channel_dim: int


class _Scored(NamedTuple):
    """The tokens [R, L, D], their pre-activations [R, L, E] and open gates (None: all), and the table per row."""

    tokens: Tensor
    score: Tensor
    is_open: Tensor | None
    which: Tensor
    strength: Tensor
    scale: Tensor


def _rank(tokens: Tensor, score: Tensor, full_encoder: Tensor, full_bias: Tensor, latent: Tensor) -> Tensor:
    """Return how many of all latents come before an edited one: a higher score, or the same and a lower index."""
    before = torch.zeros_like(score, dtype=torch.int32)
    own = latent.unsqueeze(1).unsqueeze(-1)
    for first in range(0, full_encoder.shape[0], _CHUNK):
        weight, bias = (each[first : first + _CHUNK].to(tokens.dtype) for each in (full_encoder, full_bias))
        others = (tokens @ weight.T + bias).unsqueeze(2)
        index = first + torch.arange(len(bias), device=tokens.device)
        higher = (others > score.unsqueeze(-1)) | ((others == score.unsqueeze(-1)) & (index < own))
        before = before + (higher & (index != own)).sum(-1, dtype=torch.int32)
    return before


def _gates(tokens: Tensor, score: Tensor, which: Tensor, given: EditArguments) -> Tensor | None:
    """Return which gates [R, L, E] are open, None for all."""
    if given.gate == "none":
        return None
    is_open = score > 0
    if given.gate != "relu" and given.level is not None:
        above = score.relu() > given.level.index_select(0, which).to(score.dtype).unsqueeze(1)
        is_open = above if given.gate == "threshold" else is_open & above
    if given.gate == "topk":
        assert given.full_encoder is not None
        assert given.full_bias is not None
        assert given.latent is not None
        latent = given.latent.index_select(0, which)
        is_open = is_open & (_rank(tokens, score, given.full_encoder, given.full_bias, latent) < given.k)
    return is_open


def _score(x: Tensor, given: EditArguments) -> _Scored:
    which, s = look_up(given.slot, given.strength, given.clock, x.shape[0])
    tokens = _tokens_of(x, given.channel_dim)
    high = tokens.dtype
    w, b, scale = (each.index_select(0, which).to(high) for each in (given.encoder, given.encoder_bias, given.scale))
    with full_precision(x):
        score = tokens @ w.transpose(1, 2) + b.unsqueeze(1)
        is_open = _gates(tokens, score, which, given)
    return _Scored(tokens, score, is_open, which, s.to(high).reshape(-1, 1, 1), scale.unsqueeze(1))


def _tokens_of(x: Tensor, channel_dim: int) -> Tensor:
    """Return x as [R, L, D] in fp32, or fp64."""
    return x.movedim(channel_dim, -1).to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(1).flatten(1, -2)


def _add_directions(
    x: Tensor, tokens: Tensor, scored: _Scored, weights: Tensor, bank: Tensor, touched: Tensor, given: EditArguments
) -> Tensor:
    """Return x + sum_e weights_e bank_e for the tokens that are touched; `tokens` is `_tokens_of` x."""
    dim, shape = given.channel_dim, x.movedim(given.channel_dim, -1).shape
    with full_precision(x):
        y = tokens + weights @ bank.index_select(0, scored.which).to(weights.dtype)
    active = active_tokens(x, scored.which, scored.strength.flatten(), given.span, dim)
    active = active & touched.reshape(shape[:-1]).unsqueeze(dim)
    return laid_out_like(torch.where(active, y.reshape(shape).movedim(-1, dim).to(x.dtype), x), x)


def _in_plain_torch(x: Tensor, given: EditArguments) -> Tensor:
    scored = _score(x, given)
    latents = scored.score if given.gate == "none" else scored.score.relu()
    add = given.add.index_select(0, scored.which).to(latents.dtype).unsqueeze(1)
    change = scored.strength * ((scored.scale - 1) * latents + add)
    change = change if scored.is_open is None else torch.where(scored.is_open, change, 0)
    # A change of 0 gives the same bits, -0 too; where it is differentiated, it must stay part of the sum.
    watched = torch.is_grad_enabled() and change.requires_grad
    touched = torch.ones_like(change, dtype=torch.bool) if watched else change != 0
    touched = touched if scored.is_open is None else touched & scored.is_open
    return _add_directions(x, scored.tokens, scored, change, given.decoder, touched.any(-1), given)


def _gradient_in_plain_torch(gradient: Tensor, x: Tensor, given: EditArguments) -> Tensor:
    scored = _score(x, given)
    factor = (scored.strength * (scored.scale - 1)).expand(scored.score.shape)
    if scored.is_open is not None:
        factor = torch.where(scored.is_open & (scored.score > 0), factor, 0)
    tokens = _tokens_of(gradient, given.channel_dim)
    with full_precision(x):
        along = tokens @ given.decoder.index_select(0, scored.which).to(factor.dtype).transpose(1, 2)
    touched = (factor != 0).any(-1)
    return _add_directions(gradient, tokens, scored, factor * along, given.encoder, touched, given)


def sae_edit_reference(
    x: Tensor,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    scale: Tensor,
    add: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: str = "none",
    level: Tensor | None = None,
    full_encoder: Tensor | None = None,
    full_bias: Tensor | None = None,
    latent: Tensor | None = None,
    k: int = 0,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `sae_edit` computes, in plain torch; fp64 `x` is computed in fp64."""
    return _in_plain_torch(
        x,
        EditArguments(
            encoder, encoder_bias, decoder, scale, add, slot, strength, clock, span,
            level, full_encoder, full_bias, latent, gate, k, channel_dim,
        ),
    )  # fmt: skip


def _choose(x: Tensor, out: Tensor, given: EditArguments) -> Launch:
    if given.full_encoder is not None and (given.full_encoder.dtype not in DTYPE_CODES or not len(given.full_encoder)):
        return Launch("reference")
    few = given.encoder.shape[1] <= _MOST_EDITS
    return choose("sae_edit", x, out, given.channel_dim, lambda name: few or name != "triton")


def _run(out: Tensor, x: Tensor, given: EditArguments, gradient: Tensor | None = None) -> Tensor:
    """Write the result, or the gradient in `x` where `gradient` is given, which lies in memory as `x` does."""
    launch = _choose(x, out, given)
    if launch.backend == "reference":
        plain = _in_plain_torch(x, given) if gradient is None else _gradient_in_plain_torch(gradient, x, given)
        return out.copy_(plain)
    full = given.full_encoder if given.gate == "topk" else None
    if full is not None and full.stride(1) != 1:
        full = full.contiguous()
    banks = packed(given.encoder, given.encoder_bias, given.decoder, given.scale, given.add, given.level)
    extra = packed(given.full_bias, given.latent, given.slot, given.strength, given.clock, given.span)
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("sae_edit").launch(
                out, x, gradient, *banks, full, *extra, given.gate, given.k, launch.source, launch.target
            )
        return out
    shape = (0, 0, 0) if full is None else (full.shape[0], full.stride(0), DTYPE_CODES[full.dtype])
    sizes = (*launch.shape, *given.encoder.shape[:2], *given.slot.shape, *shape)
    options = (GATES.index(given.gate), given.k, DTYPE_CODES[x.dtype], torch.get_num_threads())
    if status := run_compiled("sae_edit", (x, out, gradient, *banks, full, *extra), *sizes, *options):
        raise_for(status, given.slot, given.clock, given.encoder.shape[0])
    return out


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, EditArguments(*arguments))


def _backward_forward(gradient: Tensor, x: Tensor, *arguments: Any) -> Tensor:
    return _run(torch.empty_like(x), x, EditArguments(*arguments), laid_out_like(gradient, x))


_in_x, _ = declare(
    "sae_edit_backward",
    f"(Tensor gradient, Tensor x, {_ARGUMENTS}) -> Tensor",
    _backward_forward,
    fake=lambda gradient, x, *_: torch.empty_like(x),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    given = EditArguments(*rest)
    ctx.options = given[-3:]
    ctx.save_for_backward(None if given.gate == "none" else x, *given[:-3])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    given = EditArguments(*tensors, *ctx.options)
    x = gradient if x is None else x  # without gates the values of x do not matter
    again = torch.is_grad_enabled()  # somebody differentiates the gradient, which plain torch can
    result = _gradient_in_plain_torch(gradient, x, given) if again else _in_x(gradient, x, *given)
    return (result, *[None] * len(given))


_plain, _differentiable = declare(
    "sae_edit", f"(Tensor x, {_ARGUMENTS}) -> Tensor", _forward, setup_context=_setup_context, backward=_backward
)


def _say(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_gate(x: Tensor, width: int, given: EditArguments) -> None:
    """Raise an InputError unless what the gate needs is there and fits."""
    gate, device = given.gate, x.device
    if gate not in GATES:
        raise InputError("gate", value=gate, allowed=", ".join(GATES))
    sets, edits = given.encoder_bias.shape
    level = given.level
    if level is None and gate == "threshold":
        raise InputError("level", value="None", allowed=f"float32 {[sets, edits]} for the gate 'threshold'")
    if level is not None:
        check_banks(x, encoder_bias=(given.encoder_bias, (edits,)), level=(level, (edits,)))
    if gate != "topk":
        return
    full, bias, latent = given.full_encoder, given.full_bias, given.latent
    if full is None or not full.dtype.is_floating_point or full.shape[1:] != (width,) or full.device != device:
        raise InputError("full_encoder", value=_say(full), allowed=f"floats ['M', {width}] on {device}")
    if bias is None or bias.dtype is not torch.float32 or bias.shape != full.shape[:1] or bias.device != device:
        raise InputError("full_bias", value=_say(bias), allowed=f"float32 [{full.shape[0]}] on {device}")
    if latent is None or latent.dtype is not torch.int32 or latent.shape != (sets, edits) or latent.device != device:
        raise InputError("latent", value=_say(latent), allowed=f"int32 {[sets, edits]} on {device}")
    if not 1 <= given.k <= full.shape[0]:
        raise InputError("k", value=given.k, allowed=f"1 to {full.shape[0]}, the number of latents")


def scale_and_add(mode: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return `scale` and `add` of `sae_edit` for edits of one mode.

    Args:
        mode: "multiply" the latent by the value, "add" the value to it, "set" it to the value (also called clamping),
            or "ablate" it (set it to 0; the value gives only the shape).
        value: fp32, of any shape.

    Raises:
        InputError: there is no such mode.
    """
    zero = torch.zeros_like(value)
    modes = {"multiply": (value, zero), "add": (zero + 1, value), "set": (zero, value), "ablate": (zero, zero)}
    if mode not in modes:
        raise InputError("mode", value=mode, allowed=", ".join(modes))
    return modes[mode]


def sae_edit(
    x: Tensor,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    scale: Tensor,
    add: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None = None,
    *,
    gate: str = "none",
    level: Tensor | None = None,
    full_encoder: Tensor | None = None,
    full_bias: Tensor | None = None,
    latent: Tensor | None = None,
    k: int = 0,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = x + s sum_e g_e ((scale_e - 1) a_e + add_e) decoder_e, an edit of E latents per parameter set.

    p_e = x·encoder_e + encoder_bias_e and a_e = relu(p_e). Gates g_e, 1 or 0:
        none: always 1, and a_e = p_e without relu: a linear edit of rank E.
        relu: p_e > 0, the latent is active.
        threshold: a_e > level_e.
        topk: the latent is among the k highest of all M pre-activations x·full_encoder_i + full_bias_i (of equal ones
            the lowest index), p_e > 0, and a_e > level_e where levels are given. Exact, by counting the latents above
            p_e for the tokens that pass the other conditions, until k are found; nothing of size M is stored.
    An edit with scale 1 and add 0, or level inf, is a free place: it changes nothing. See `scale_and_add` for
    multiplying, adding, setting and ablating. The steering table, rounding and errors are as for `affine_shift`; tokens
    whose changes are all 0 come back bit for bit. Differentiable in everything (gates count as constant), in `x` with
    the fast kernels.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        encoder: [P, E, D] fp32, rows of the encoder; set 0 is never used.
        encoder_bias: [P, E] fp32; for an encoder of x - c this is b - encoder·c.
        decoder: [P, E, D] fp32, the directions.
        scale, add: [P, E] fp32.
        slot, strength, clock, span: the steering table.
        gate: one of `GATES`.
        level: [P, E] fp32.
        full_encoder: [M, D] fp32, bf16 or fp16, all latents, for the gate "topk"; rows that are edited equal `encoder`.
        full_bias: [M] fp32, folded like `encoder_bias`.
        latent: [P, E] int32, which of the M latents an edit is.
        k: how many latents are active in a token.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: as for `affine_shift`; or what the gate needs is missing or does not fit.
    """
    width = check_activation(x, channel_dim, out)
    if encoder.dim() != 3 or not encoder.shape[1]:
        raise InputError("encoder", value=_say(encoder), allowed=f"float32 ['P', 'E', {width}], E >= 1, on {x.device}")
    edits = encoder.shape[1]
    row, places = (edits, width), (edits,)
    check_banks(
        x, encoder=(encoder, row), encoder_bias=(encoder_bias, places), decoder=(decoder, row), scale=(scale, places),
        add=(add, places),
    )  # fmt: skip
    check_table(x, slot, strength, clock, span)
    given = EditArguments(
        encoder, encoder_bias, decoder, scale, add, slot, strength, clock, span,
        level, full_encoder, full_bias, latent, gate, k, channel_dim,
    )  # fmt: skip
    check_gate(x, width, given)
    return _dispatch(x, out, given)


def _dispatch(x: Tensor, out: Tensor | None, given: EditArguments) -> Tensor:
    compiling = torch.compiler.is_compiling()
    if (compiling and not backends.choices(x.device.type)) or plain_torch_needed(
        given.encoder, given.encoder_bias, given.decoder, given.scale, given.add, given.strength
    ):
        y = _in_plain_torch(x, given)
        return y if out is None else out.copy_(y)
    return dispatch(
        x,
        out,
        given,
        wants_grad=x.requires_grad,
        plain=_plain,
        differentiable=_differentiable,
        run=lambda out, x, *_: _run(out, x, given),
    )


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    sets, edits, gate = case.sizes.get("sets", 4), case.sizes.get("edits", 2), case.options.get("gate", "none")
    latents = case.sizes.get("latents", max(12, 2 * edits))
    full = torch.randn(latents, case.width, generator=generator) / case.width**0.5
    full_bias = 0.1 * torch.randn(latents, generator=generator)
    latent = torch.stack([torch.randperm(latents, generator=generator)[:edits] for _ in range(sets)])
    full_bias[latent.unique()] += case.sizes.get("bias", 2)  # edited latents are mostly active
    scale = 2 * torch.randn(sets, edits, generator=generator)
    add = torch.randn(sets, edits, generator=generator)
    if edits > 1:  # a free place
        scale[-1, -1], add[-1, -1] = 1.0, 0.0
    extra: dict[str, Any] = {
        "level": torch.rand(sets, edits, generator=generator) / 2,
        "full_encoder": full.to(case.dtype),
        "full_bias": full_bias,
        "latent": latent.to(torch.int32),
        "k": case.sizes.get("k", 6),
    }
    if gate != "topk":
        extra = {"level": extra["level"]} if gate == "threshold" else {}
    banks = {
        "encoder": full.to(case.dtype).float()[latent],
        "encoder_bias": full_bias[latent],
        **extra,
        "scale": scale,
        "add": add,
        "decoder": torch.randn(sets, edits, case.width, generator=generator) / 2,
    }
    banks = {name: bank.to(case.device) if isinstance(bank, Tensor) else bank for name, bank in banks.items()}
    return {"x": x, **banks, **tables(case, sets), "channel_dim": channel_dim, **case.options}


def _arguments(inputs: dict[str, Any]) -> EditArguments:
    defaults: dict[str, Any] = {**SPEC.defaults, "channel_dim": -1}
    found: dict[str, Any] = {name: inputs.get(name, defaults.get(name)) for name in EditArguments._fields}
    return EditArguments(**found)


def _implementation(x: Tensor, out: Tensor | None = None, **inputs: Any) -> str:
    given = _arguments(inputs)
    return _choose(x, torch.empty_like(x) if out is None else out, given).backend


def _unsure(x: Tensor, **inputs: Any) -> Tensor:
    """Where a pre-activation lies so close to what its gate compares it with that rounding in fp32 decides."""
    given = _arguments(inputs)
    scored = _score(x.double(), given)
    close = torch.zeros_like(scored.score, dtype=torch.bool)
    if given.gate != "none":
        w = given.encoder.index_select(0, scored.which).double()
        margin = 1e-6 * (scored.tokens.abs() @ w.abs().transpose(1, 2) + 1)
        low, high = (_gates(scored.tokens, scored.score + each, scored.which, given) for each in (-margin, margin))
        assert low is not None
        assert high is not None
        close = low ^ high
    moved = x.movedim(given.channel_dim, -1)
    return close.any(-1).reshape(moved.shape[:-1]).unsqueeze(given.channel_dim)


_ALL = "every gate and its gradient in x; fp32, bf16, fp16, channels or tokens next to each other"
SPEC = SteeringSpec(
    name="sae_edit",
    function=sae_edit,
    reference=sae_edit_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _ALL, "triton": f"{_ALL}; up to {_MOST_EDITS} edits"},
    variants={
        "linear": {},
        "relu": {"gate": "relu"},
        "threshold": {"gate": "threshold"},
        "topk": {"gate": "topk"},
    },
    sizes=({"edits": 2}, {"edits": 1}, {"edits": 7}),
    defaults={
        "gate": "none",
        "k": 0,
        "level": None,
        "full_encoder": None,
        "full_bias": None,
        "latent": None,
    },
    unsure=_unsure,
    shared=("full_encoder", "full_bias"),
)
