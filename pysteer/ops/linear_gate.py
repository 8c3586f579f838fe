"""`linear_gate`: a number in [0, 1] per row, or per token, that says how far the steering should open.

Published gates mean over the tokens of a row, padding included, copy the rows that pass with a boolean index, which
waits for the device, and read the activation three times. Here the tokens that count are a span or a mask, one read of
the activation gives the means, and the gate stays a tensor, ready to be multiplied into the strengths.
"""

from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import backends
from pysteer.ops.checks import check_activation
from pysteer.ops.declare import declare, plain_torch_needed
from pysteer.ops.launch import Launch, addresses, choose, on_device, packed
from pysteer.ops.layouts import DTYPE_CODES
from pysteer.ops.lookup import full_precision
from pysteer.ops.registry import Case, OpSpec, activation

KINDS = ("gda", "ood", "min_max")
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? factor, Tensor? scale, Tensor? span, Tensor? mask, str kind,"
    " float? threshold, bool per_token, int channel_dim) -> Tensor"
)


def _counted(tokens: Tensor, span: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which tokens of `tokens` [R, L, D] count, [R, L] bool."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    counted = position.expand(tokens.shape[:2]) >= 0
    if span is not None:
        counted = (position >= span[:, :1]) & (position < span[:, 1:])
    return counted if mask is None else counted & mask.reshape(counted.shape)


def _margin(
    v: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None, scale: Tensor | None, kind: str
) -> Tensor:
    """P(class 0) for "gda", else what is >= 0 exactly where the gate opens, for the vectors `v` [..., D]."""
    if kind == "min_max":
        return torch.minimum(v - weight[0], weight[1] - v).amin(-1)
    assert bias is not None
    if kind == "gda":
        score = v @ weight.T + bias
        return torch.sigmoid(score[..., 0]) if len(weight) == 1 else torch.softmax(score, -1)[..., 0]
    difference = v - weight[0]
    square = difference.square().sum(-1)
    if factor is not None and factor.numel() > 0:
        square = square - (difference @ factor.T).square().sum(-1)
    return bias[0] - (square if scale is None else square * scale[0])


def _margins(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    scale: Tensor | None,
    span: Tensor | None,
    mask: Tensor | None,
    kind: str,
    per_token: bool,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """The margins [R] or [R, L], and where there is something to decide about."""
    high = torch.promote_types(x.dtype, torch.float32)
    moved = x.movedim(channel_dim, -1)
    tokens = moved.unsqueeze(1).flatten(1, -2)
    counted = _counted(tokens, span, mask)
    w, b, z, c = (None if each is None else each.to(high) for each in (weight, bias, factor, scale))
    assert w is not None
    with full_precision(x):
        if per_token:
            return _margin(tokens.to(high), w, b, z, c, kind), counted
        number = counted.sum(1)
        total = torch.where(counted.unsqueeze(-1), tokens, 0).sum(1, dtype=high)
        return _margin(total / number.clamp_min(1).unsqueeze(-1), w, b, z, c, kind), number > 0


def linear_gate_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    span: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: str = "gda",
    threshold: float | None = None,
    per_token: bool = False,
    channel_dim: int = -1,
) -> Tensor:
    """Return what `linear_gate` computes, in plain torch; fp64 `x` is computed in fp64."""
    margin, decided = _margins(x, weight, bias, factor, scale, span, mask, kind, per_token, channel_dim)
    if kind == "gda":
        gate = margin if threshold is None else (margin >= threshold).to(margin.dtype)
    else:
        gate = (margin >= 0).to(margin.dtype)
    gate = torch.where(decided, gate, 0)
    return gate.reshape(x.movedim(channel_dim, -1).shape[:-1]) if per_token else gate


def _choose(x: Tensor, kind: str, per_token: bool, channel_dim: int) -> Launch:
    if per_token:
        return Launch("reference")
    return choose("linear_gate", x, x, channel_dim)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    scale: Tensor | None,
    span: Tensor | None,
    mask: Tensor | None,
    kind: str,
    threshold: float | None,
    per_token: bool,
    channel_dim: int,
) -> Tensor:
    launch = _choose(x, kind, per_token, channel_dim)
    if launch.backend == "reference":
        return linear_gate_reference(
            x, weight, bias, factor, scale, span, mask,
            kind=kind, threshold=threshold, per_token=per_token, channel_dim=channel_dim,
        )  # fmt: skip
    assert launch.source is not None
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    tensors = packed(weight, bias, factor, scale, span, mask)
    rank = 0 if factor is None else factor.shape[0]
    number = KINDS.index(kind)
    if launch.backend == "triton":
        with on_device(x):
            backends.load_kernels("linear_gate").launch(out, x, *tensors, number, threshold, launch.source)
        return out
    sizes = (*launch.source, weight.shape[0], rank, number, DTYPE_CODES[x.dtype], torch.get_num_threads())
    limit = -1.0 if threshold is None else threshold
    backends.extension().linear_gate(*addresses(x, out, *tensors), *sizes, limit)
    return out


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    *_, per_token, channel_dim = arguments
    shape = x.movedim(channel_dim, -1).shape[:-1] if per_token else x.shape[:1]
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


_plain, _ = declare("linear_gate", _SCHEMA, _forward, fake=_fake)


def _expect(x: Tensor, name: str, given: Tensor | None, allowed: list[Any], dtype: torch.dtype = torch.float32) -> None:
    """Raise unless `given` has the sizes `allowed`, where words stand for any size; None for leave it out."""
    kind = str(dtype).removeprefix("torch.")
    if given is None:
        raise InputError(name, value="nothing", allowed=f"{kind} {allowed} on {x.device}")
    fits = given.dim() == len(allowed) and all(
        isinstance(want, str) or size == want for size, want in zip(given.shape, allowed, strict=True)
    )
    if not fits or given.dtype is not dtype or given.device != x.device:
        got = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)} on {given.device}"
        raise InputError(name, value=got, allowed=f"{kind} {allowed} on {x.device}")


def _check(
    x: Tensor,
    width: int,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    scale: Tensor | None,
    kind: str,
    threshold: float | None,
) -> None:
    if kind not in KINDS:
        raise InputError("kind of gate", value=kind, allowed=", ".join(KINDS))
    count = weight.shape[0] if weight.dim() == 2 and len(weight) else 1
    _expect(x, "weight", weight, [{"gda": count, "ood": 1, "min_max": 2}[kind], width])
    if kind != "min_max":
        _expect(x, "bias", bias, [count])
    unused = [("bias", bias)] * (kind == "min_max") + [("factor", factor), ("scale", scale)] * (kind != "ood")
    for name, given in unused:
        if given is not None:
            raise InputError(name, value="given", allowed=f"nothing with kind {kind}")
    if factor is not None:
        _expect(x, "factor", factor, ["r", width])
    if scale is not None:
        _expect(x, "scale", scale, [1])
    if threshold is not None and (kind != "gda" or not 0 < threshold < 1):
        raise InputError("threshold", value=threshold, allowed="above 0 and below 1, with kind gda")


def linear_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    span: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: str = "gda",
    threshold: float | None = None,
    per_token: bool = False,
    channel_dim: int = -1,
) -> Tensor:
    """Return a gate in [0, 1] for every row, from the mean v of its tokens, or for every token v, in fp32.

    - "gda": with scores v·weight_c + bias_c, softmax(scores)_0, the probability of the first class; for a single score
      its sigmoid. With a `threshold`, 1 where that probability reaches it, else 0.
    - "ood": 1 where d²(v) <= bias, else 0, with d²(v) = c (|v - m|² - |Z(v - m)|²), m = weight, Z = `factor`, c =
      `scale`, as in `quadratic_distance`.
    - "min_max": 1 where every channel lies within [weight_0, weight_1], bounds included, else 0.

    Only tokens inside `span` and with a true `mask` count; a row without any, and with `per_token` every other token,
    has gate 0. A NaN stays NaN in a probability and closes the other gates. Nothing is read back from a GPU. Gates have
    no gradient.

    Args:
        x: [R, D], [R, *tokens, D], or [R, D, *tokens] with `channel_dim` 1; fp32, bf16 or fp16 (fp64 in plain torch).
        weight: [C, D] fp32 for "gda", [1, D] for "ood", [2, D] for "min_max".
        bias: [C] fp32 for "gda", [1] for "ood".
        factor: [r, D] fp32, "ood" only.
        scale: [1] fp32, "ood" only; 1 when left out.
        span: [R, 2] int32, the tokens [start, end) that count; None for all.
        mask: [R, L] bool, with L the number of tokens.
        kind: "gda", "ood" or "min_max".
        threshold: of the hard gate, in (0, 1).
        per_token: a gate for every token instead of every row.
        channel_dim: where the channels are, -1 or 1.

    Returns:
        [R] fp32, or [R, *tokens] with `per_token` ([R] for [R, D]).

    Raises:
        InputError: a shape, dtype, device or option does not fit.
    """
    width = check_activation(x, channel_dim, None)
    _check(x, width, weight, bias, factor, scale, kind, threshold)
    rows = x.shape[0]
    if span is not None:
        _expect(x, "span", span, [rows, 2], torch.int32)
    if mask is not None:
        tokens = x.movedim(channel_dim, -1).shape[1:-1].numel()
        _expect(x, "mask", mask, [rows, tokens], torch.bool)
    if plain_torch_needed():
        return linear_gate_reference(
            x, weight, bias, factor, scale, span, mask,
            kind=kind, threshold=threshold, per_token=per_token, channel_dim=channel_dim,
        )  # fmt: skip
    with torch.no_grad():
        return _plain(x, weight, bias, factor, scale, span, mask, kind, threshold, per_token, channel_dim)


def _make_inputs(case: Case) -> dict[str, Any]:
    x, channel_dim = activation(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    options = dict(case.options)
    kind, partial = options.get("kind", "gda"), options.pop("part", "span")
    width, classes = case.width, case.sizes.get("classes", 3)
    length = case.tokens if case.layout != "rows" and not options.get("per_token") else 1
    given: dict[str, Any] = {"bias": None, "factor": None, "scale": None, "span": None, "mask": None}
    if kind == "gda":
        given["weight"] = torch.randn(classes, width, generator=generator) * (length / width) ** 0.5
        given["bias"] = torch.randn(classes, generator=generator)
    elif kind == "ood":
        given["weight"] = torch.randn(1, width, generator=generator) * 0.3
        directions = torch.randn(3, width, generator=generator)
        given["factor"] = directions * (0.5 / directions.norm(dim=-1, keepdim=True))
        given["scale"] = torch.rand(1, generator=generator) + 0.5
        given["bias"] = given["scale"] * width * (1 / length + 0.09)  # about the mean of the squared distance
    else:
        edge = (1.0 + torch.tensor(2.0 * width).log().mul(2).sqrt()) * 0.8 / length**0.5
        given["weight"] = torch.stack((-edge.expand(width), edge.expand(width)))
    rows, tokens = case.rows, 1 if case.layout == "rows" else case.tokens
    if partial == "span":
        start = torch.arange(rows, dtype=torch.int32) % max(tokens // 2, 1)
        given["span"] = torch.stack([start, start + (tokens + 1) // 2], 1).to(torch.int32)
    if partial == "mask":
        given["mask"] = torch.rand(rows, tokens, generator=generator) < 0.6
    given = {name: value.to(case.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    return {"x": x, **given, "channel_dim": channel_dim, **options}


def _compare(result: Tensor, truth: Tensor, inputs: dict[str, Any], limit: Any) -> None:
    """Soft gates are held against the truth, hard ones where rounding does not decide."""
    assert result.shape == truth.shape
    kind, threshold = inputs.get("kind", "gda"), inputs.get("threshold")
    w, b, z, c, span, mask = (inputs[name] for name in ("weight", "bias", "factor", "scale", "span", "mask"))
    per_token, x = inputs.get("per_token", False), inputs["x"].double()
    margin, decided = _margins(x, w, b, z, c, span, mask, kind, per_token, inputs["channel_dim"])
    if kind == "gda" and threshold is None:
        far = (result.double() - truth).abs() > limit.absolute + limit.relative * truth.abs()
        assert not far.any(), f"{int(far.sum())} of {far.numel()} gates are off"
        return
    size = 1.0 if kind == "gda" else float((w if b is None else b).abs().max())
    sure = ((margin - (threshold or 0.0)).abs() > 1e-5 * size).reshape(truth.shape) | ~decided.reshape(truth.shape)
    assert sure.sum() >= 0.5 * sure.numel()
    assert torch.equal(result[sure].double(), truth[sure])


def _implementation(x: Tensor, kind: str = "gda", per_token: bool = False, channel_dim: int = -1, **_: Any) -> str:
    return _choose(x, kind, per_token, channel_dim).backend


_POOLED = "gates of rows; fp32, bf16, fp16 in all layouts with channels or tokens next to each other"
SPEC = OpSpec(
    name="linear_gate",
    function=linear_gate,
    reference=linear_gate_reference,
    make_inputs=_make_inputs,
    implementation=_implementation,
    backends={"cpu": _POOLED, "triton": _POOLED},
    variants={
        "soft": {"part": "all"},
        "hard-span": {"threshold": 0.4},
        "soft-mask": {"part": "mask"},
        "ood": {"kind": "ood", "part": "all"},
        "ood-span": {"kind": "ood"},
        "min_max": {"kind": "min_max", "part": "all"},
        "min_max-mask": {"kind": "min_max", "part": "mask"},
        "tokens": {"per_token": True, "part": "mask"},
        "tokens-ood": {"kind": "ood", "per_token": True},
    },
    sizes=({"classes": 3}, {"classes": 1}),
    defaults={"kind": "gda", "threshold": None, "per_token": False},
    rowwise=("span",),
    compare=_compare,
)
