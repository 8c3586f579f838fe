"""`sae_rebuild`: an edit of latents that does not keep what the autoencoder leaves unexplained.

Published hooks replace the activation by the decoded latents, which loses the error x - D(E(x)), or add that error with
the wrong sign. This op gives their results, for comparison. On a CPU it is put together from the kernels of `sae_edit`,
`sae_encode` and `sae_decode`; without k all M latents are multiplied by torch, some at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.by_mean import kernel_serves, launch_by_mean
from pysteer.ops.checks import check_activation, check_banks, check_table
from pysteer.ops.declare import refuse_out
from pysteer.ops.latents import largest
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import active_tokens, full_precision, laid_out_like, look_up
from pysteer.ops.registry import Case, SteeringSpec
from pysteer.ops.sae_decode import decode_into
from pysteer.ops.sae_edit import SPEC as EDIT
from pysteer.ops.sae_edit import EditArguments, check_gate, sae_edit, sae_edit_reference
from pysteer.ops.sae_encode import encode_topk

_KERNELS = ("sae_edit", "sae_encode", "sae_decode")
_TOGETHER = 1024  # latents that are multiplied at a time
ERRORS = {"drop": 1.0, "saeuron": 2.0}  # how often D(E(x)) - x is added to an edit that keeps the error


def _rebuilt(
    tokens: Tensor,
    full_encoder: Tensor,
    full_bias: Tensor,
    full_decoder: Tensor,
    decoder_bias: Tensor,
    full_level: Tensor | None,
    k: int,
) -> Tensor:
    """D(E(x)) of `tokens` [R, L, D]."""
    high = tokens.dtype
    latents = linear(tokens, full_encoder.to(high), full_bias.to(high)).relu()
    if k:
        chosen = torch.zeros_like(latents, dtype=torch.bool).scatter(-1, largest(latents, k).long(), True)
    else:
        chosen = latents > (0 if full_level is None else full_level.to(high))
    return torch.where(chosen, latents, 0) @ full_decoder.to(high) + decoder_bias.to(high)


def sae_rebuild_reference(
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
    error: str = "drop",
    gate: str = "none",
    level: Tensor | None = None,
    latent: Tensor | None = None,
    full_encoder: Tensor | None = None,
    full_bias: Tensor | None = None,
    full_decoder: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    full_level: Tensor | None = None,
    k: int = 0,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `sae_rebuild` computes; fp64 `x` is computed in fp64."""
    assert full_encoder is not None
    assert full_bias is not None
    assert full_decoder is not None
    assert decoder_bias is not None
    which, s = look_up(slot, strength, clock, x.shape[0])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    edited = sae_edit_reference(
        wide, encoder, encoder_bias, decoder, scale, add, slot, strength, clock, span, gate=gate, level=level,
        full_encoder=full_encoder, full_bias=full_bias, latent=latent, k=k, channel_dim=channel_dim,
    )  # fmt: skip
    moved = wide.movedim(channel_dim, -1)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    with full_precision(x):
        rebuilt = _rebuilt(tokens, full_encoder, full_bias, full_decoder, decoder_bias, full_level, k)
    away = ERRORS[error] * s.to(wide.dtype).reshape(-1, 1, 1) * (rebuilt - tokens)
    y = edited + away.reshape(moved.shape).movedim(-1, channel_dim)
    return laid_out_like(torch.where(active_tokens(x, which, s, span, channel_dim), y.to(x.dtype), x), x)


def _add_decoded(
    y: Tensor, tokens: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, level: Tensor | None
) -> None:
    """Add the decoded latents above their level to `y` [N, D], in buffers that are used again."""
    size = min(_TOGETHER, len(encoder))
    room = torch.empty(2, len(tokens) * size)
    for first in range(0, len(encoder), size):
        part = slice(first, min(first + size, len(encoder)))
        latents, above = (each[: len(tokens) * (part.stop - first)].view(len(tokens), -1) for each in room)
        torch.addmm(bias[part], tokens, encoder[part].float().T, out=latents)
        if level is None:
            latents.relu_()
        else:
            latents.mul_(torch.gt(latents, level[part].clamp_min(0), out=above))
        y.addmm_(latents, decoder[part].float())


def _are_rows_of_all(given: EditArguments, which: Tensor) -> bool:
    """Whether edited latents are rows of the full encoder, as they should be: they need no ranking of their own."""
    assert given.latent is not None
    assert given.full_encoder is not None
    assert given.full_bias is not None
    sets = which.unique()
    index = given.latent.index_select(0, sets).flatten()
    if bool(((index < 0) | (index >= len(given.full_encoder))).any()):
        return False
    rows = given.full_encoder.index_select(0, index).float()
    same = torch.equal(rows, given.encoder.index_select(0, sets).flatten(0, 1))
    return same and torch.equal(given.full_bias[index], given.encoder_bias.index_select(0, sets).flatten())


def _add_edits(y: Tensor, values: Tensor, indices: Tensor, given: EditArguments, which: Tensor, s: Tensor) -> None:
    """Add what `sae_edit` with the gate "topk" adds, from the first k latents of every token; y: [R, L, D]."""
    latent, scale, add = (each.index_select(0, which).unsqueeze(1) for each in (given.latent, given.scale, given.add))  # type: ignore[union-attr]
    rows, tokens, edits = len(y), y.shape[1], latent.shape[-1]
    found = (indices.view(rows, tokens, 1, -1) == latent.unsqueeze(-1)) & (values > 0).view(rows, tokens, 1, -1)
    active = torch.where(found, values.view(rows, tokens, 1, -1), 0).sum(-1)
    change = s.reshape(-1, 1, 1) * ((scale - 1) * active + add)
    level = 0.0 if given.level is None else given.level.index_select(0, which).unsqueeze(1)
    change = torch.where(found.any(-1) & (active > level), change, 0).view(rows, tokens, edits)
    directions = given.decoder.index_select(0, which)
    for edit in range(edits):
        y.addcmul_(change[..., edit : edit + 1], directions[:, edit : edit + 1])


def _on_cpu(x: Tensor, out: Tensor | None, error: str, given: EditArguments, full: dict[str, Any]) -> Tensor:
    """The same from kernels, in fp32 with one rounding at the end."""
    dim, decoder, rows = given.channel_dim, full["full_decoder"], x.shape[0]
    encoder, bias, centre = given.full_encoder, given.full_bias, full["decoder_bias"].float()
    assert encoder is not None
    assert bias is not None
    moved = x.movedim(dim, -1)
    wide = torch.empty(rows, x.numel() // (rows * moved.shape[-1]), moved.shape[-1])
    wide.view(moved.shape).copy_(moved)
    which, s = look_up(given.slot, given.strength, given.clock, rows)
    ranked = given.k > 0 and given.gate == "topk" and _are_rows_of_all(given, which)
    y = wide.clone() if ranked else sae_edit(wide, *given._replace(channel_dim=-1)[:9], **_options(given))
    with full_precision(x):
        if given.k:
            values, indices = encode_topk(wide.flatten(0, 1), encoder, bias, None, given.k, -1)
            if ranked:
                _add_edits(y, values, indices, given, which, s)
            away = torch.sub(centre, wide, out=wide)
            decode_into(away, values, indices, decoder, None, away)
        else:
            away = centre - wide
            _add_decoded(away.flatten(0, 1), wide.flatten(0, 1), encoder, bias, decoder, full["full_level"])
    y.addcmul_(away, (ERRORS[error] * s).reshape(-1, 1, 1))
    result = torch.empty_like(x) if out is None else out
    return _write(result, x, y.view(moved.shape).movedim(-1, dim), which, s, given.span, dim)


def _write(
    out: Tensor, x: Tensor, y: Tensor, which: Tensor, s: Tensor, span: Tensor | None, channel_dim: int
) -> Tensor:
    """Write `y` where the table is active and `x` everywhere else."""
    if span is not None:
        return torch.where(active_tokens(x, which, s, span, channel_dim), y.to(x.dtype), x, out=out)
    for row, active in enumerate(((which != 0) & (s != 0)).tolist()):
        if active or out is not x:
            out[row].copy_(y[row] if active else x[row])
    return out


def _options(given: EditArguments) -> dict[str, Any]:
    names = ("level", "full_encoder", "full_bias", "latent", "gate", "k")
    return {name: getattr(given, name) for name in names}


def _backend(x: Tensor, out: Tensor | None, channel_dim: int, *full: Tensor) -> str:
    known = all(each.dtype in DTYPE_CODES and each.numel() for each in (x, *full))
    kernels = all(backends.provides("cpu", name) for name in _KERNELS)
    return launch_by_mean("sae_edit", x, out, channel_dim).backend if known and kernels else "reference"


def sae_rebuild(
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
    error: str = "drop",
    gate: str = "none",
    level: Tensor | None = None,
    latent: Tensor | None = None,
    full_encoder: Tensor | None = None,
    full_bias: Tensor | None = None,
    full_decoder: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    full_level: Tensor | None = None,
    k: int = 0,
    channel_dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return y = z + c s (D(E(x)) - x), with z the result of `sae_edit` for the same arguments.

    "drop" has c = 1: at s = 1 the result is the decoded edited latents. "saeuron" has c = 2: the error comes back with
    the wrong sign, as in the published hook of SAeUron. Differentiable in everything (choices count as constant).

    Args:
        x, encoder, encoder_bias, decoder, scale, add, slot, strength, clock, span, gate, level, latent: of `sae_edit`.
        error: "drop" or "saeuron".
        full_encoder, full_decoder: [M, D], all latents.
        full_bias: [M] fp32, with the centre folded in; decoder_bias: [D] fp32.
        full_level: [M] fp32, active are latents above it; None for above 0. Not with k.
        k: active are the k highest of each token; 0 for those above their level.
        channel_dim: where the channels are, -1 or 1.
        out: where to write, like `x`, or `x` itself to work in place.

    Returns:
        A fresh tensor like `x`, or `out`.

    Raises:
        InputError: a shape, dtype, device or option does not fit.
    """
    width, edits = check_activation(x, channel_dim, out), encoder.shape[1] if encoder.dim() == 3 else 0
    check_banks(x, encoder=(encoder, (edits, width)), encoder_bias=(encoder_bias, (edits,)), scale=(scale, (edits,)),
                add=(add, (edits,)), decoder=(decoder, (edits, width)))  # fmt: skip
    check_table(x, slot, strength, clock, span)
    if error not in ERRORS:
        raise InputError("error", value=error, allowed=", ".join(ERRORS))
    count = 0 if full_encoder is None else full_encoder.shape[0]
    shapes = {"full_encoder": [count, width], "full_bias": [count], "full_decoder": [count, width]}
    given = {"full_encoder": full_encoder, "full_bias": full_bias, "full_decoder": full_decoder}
    for name, tensor in {**given, "decoder_bias": decoder_bias}.items():
        if tensor is None or list(tensor.shape) != shapes.get(name, [width]) or tensor.device != x.device:
            shape = None if tensor is None else list(tensor.shape)
            raise InputError(name, value=shape, allowed=f"{shapes.get(name, [width])} on {x.device}")
    if not 0 <= k <= count or (k and full_level is not None):
        raise InputError("k", value=k, allowed=f"0 to {count}, and 0 with full_level")
    common: dict[str, Any] = {"level": level, "latent": latent, "gate": gate, "k": k, "channel_dim": channel_dim}
    common |= {"full_encoder": full_encoder, "full_bias": full_bias}
    banks = (encoder, encoder_bias, decoder, scale, add, slot, strength, clock, span)
    edit = EditArguments(*banks, level, full_encoder, full_bias, latent, gate, k, channel_dim)
    check_gate(x, width, edit)
    if out is not None and x.requires_grad and torch.is_grad_enabled():
        refuse_out(x)
    full = {"full_decoder": full_decoder, "decoder_bias": decoder_bias, "full_level": full_level}
    common |= full
    floats = [each for each in (*edit[:-3], *full.values()) if each is not None and each.is_floating_point()]
    layers = [each for each in (full_encoder, full_decoder) if each is not None]
    served = kernel_serves("sae_edit", x, out, channel_dim, floats)
    if served and _backend(x, out, channel_dim, *layers) == "cpu":
        return _on_cpu(x, out, error, edit, full)
    y = sae_rebuild_reference(x, *banks, error=error, **common)
    return y if out is None else out.copy_(y)


def _make_inputs(case: Case) -> dict[str, Any]:
    options = {name: value for name, value in case.options.items() if name != "error"}
    inputs = EDIT.make_inputs(Case(**{**vars(case), "options": {**options, "gate": "topk"}}))
    latents, width = inputs["full_encoder"].shape
    generator = torch.Generator().manual_seed(case.seed + 3)
    decoder = torch.randn(latents, width, generator=generator) / latents**0.5
    more = {"full_decoder": decoder, "decoder_bias": torch.randn(width, generator=generator)}
    k = inputs.pop("k")
    if case.options.get("gate") == "threshold":
        more["full_level"], k = torch.full((latents,), 0.25), 0
    add = inputs.pop("add")  # the tests differentiate the last one
    gate = case.options.get("gate", "topk")
    more = {name: tensor.to(case.device) for name, tensor in more.items()}
    return {**inputs, **more, "k": k, "gate": gate, "error": case.options.get("error", "drop"), "add": add}


def _unsure(x: Tensor, **inputs: Any) -> Tensor:
    """Where rounding decides which latents are active, of the edits or of all."""
    names = ("full_decoder", "decoder_bias", "full_level", "error")
    close = EDIT.unsure(x=x, **{name: value for name, value in inputs.items() if name not in names})
    moved = x.movedim(inputs["channel_dim"], -1).double()
    latents = linear(moved, inputs["full_encoder"].double(), inputs["full_bias"].double())
    if inputs["k"]:
        ordered = latents.relu().topk(min(inputs["k"] + 1, latents.shape[-1]), -1).values
        near = (ordered[..., -2] - ordered[..., -1] < 1e-4) & (ordered[..., -2] > 0)
    else:
        near = ((latents - inputs["full_level"].double()).abs() < 1e-4).any(-1)
    return close | near.unsqueeze(inputs["channel_dim"])


def _implementation(x: Tensor, out: Tensor | None = None, channel_dim: int = -1, **inputs: Any) -> str:
    return _backend(x, out, channel_dim, inputs["full_encoder"], inputs["full_decoder"])


SPEC = SteeringSpec(
    name="sae_rebuild",
    function=sae_rebuild,
    reference=sae_rebuild_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": "as sae_edit, sae_encode and sae_decode; eager code without gradients"},
    variants={
        "drop": {"error": "drop"},
        "saeuron": {"error": "saeuron", "gate": "topk"},
        "threshold": {"error": "drop", "gate": "threshold"},
    },
    unsure=_unsure,
    shared=("full_encoder", "full_bias", "full_decoder", "decoder_bias", "full_level"),
)
