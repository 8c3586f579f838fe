"""Triton kernels of `sae_edit` and its gradient in x, see pysteer/ops/sae_edit.py.

The main kernel takes a block of tokens of one row: products with the edited rows of the encoder, gates, then the sum,
with the tokens still in the cache. For the exact top k two kernels come before it: one scores the edited latents, one
ranks those edits that their other conditions let through among all latents, on the matrix units and until k higher ones
are found. What is left to rank is sorted to the front, so that whole blocks have nothing to do; nothing waits for the
host.
"""

import torch
import triton
import triton.language as tl

GATES = {"none": 0, "relu": 1, "threshold": 2, "topk": 3}
MOST_EDITS = 16  # whose weights fit in registers


@triton.jit
def products(
    source, stride, bank, edits, width, inside, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_T, BLOCK_E] products of tokens at `source` [BLOCK_T, 1] with the vectors at `bank`."""
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    e = tl.arange(0, BLOCK_E)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(
            source + d.to(tl.int64)[None, :] * stride, mask=inside[:, None] & (d < width)[None, :], other=0.0
        )
        w = tl.load(bank + e[:, None] * width + d[None, :], mask=(e < edits)[:, None] & (d < width)[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32)[:, None, :] * w[None, :, :], 2)
    return total


@triton.jit
def sae_edit_kernel(
    x,
    y,
    gradient,
    encoder,
    encoder_bias,
    decoder,
    scale,
    add,
    level,
    score,
    before,
    slot,
    strength,
    clock,
    span,
    tokens,
    width,
    sets,
    edits,
    k,
    steps,
    capacity,
    x_row,
    x_token,
    x_channel,
    y_row,
    y_token,
    y_channel,
    GATE: tl.constexpr,
    HAS_LEVEL: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (program // blocks_t).to(tl.int64)
    t = program % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=1.0)

    inside = t < tokens
    place = row * x_row + t.to(tl.int64)[:, None] * x_token
    source = (gradient if BACKWARD else x) + place
    target = y + row * y_row + t.to(tl.int64)[:, None] * y_token
    lanes = tl.arange(0, BLOCK_D)
    if (which == 0) | (s == 0.0):
        if not IN_PLACE:
            for first in range(0, width, BLOCK_D):
                d = (first + lanes).to(tl.int64)[None, :]
                mask = inside[:, None] & (d < width)
                tl.store(target + d * y_channel, tl.load(source + d * x_channel, mask=mask), mask=mask)
        return

    # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    known = (which > 0) & (which < sets)
    known_edits = tl.where(known, edits, 0)
    bank = which.to(tl.int64) * edits
    e = tl.arange(0, BLOCK_E)
    exists = e < known_edits
    pre = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    is_open = inside[:, None] & exists[None, :]
    if GATE == 3:
        pair = (row * tokens + t)[:, None] * edits + e[None, :]
        pre = tl.load(score + pair, mask=is_open, other=0.0)
        is_open = is_open & (tl.load(before + pair, mask=is_open, other=0) < k)
    elif (GATE > 0) | (not BACKWARD):
        pre = products(
            x + place, x_channel, encoder + bank * width, known_edits, width, inside, BLOCK_T, BLOCK_E, BLOCK_D
        )
        pre += tl.load(encoder_bias + bank + e, mask=exists, other=0.0)[None, :]
    active = pre
    if GATE > 0:
        active = tl.where(pre < 0.0, 0.0, pre)
        if GATE != 2:
            is_open = is_open & (pre > 0.0)
        if HAS_LEVEL and GATE > 1:
            is_open = is_open & (active > tl.load(level + bank + e, mask=exists, other=0.0)[None, :])
    factor = tl.load(scale + bank + e, mask=exists, other=1.0)[None, :] - 1.0
    if BACKWARD:
        along = products(
            source, x_channel, decoder + bank * width, known_edits, width, inside, BLOCK_T, BLOCK_E, BLOCK_D
        )
        weight = s * factor * along
        if GATE > 0:
            is_open = is_open & (pre > 0.0)
    else:
        weight = s * (factor * active + tl.load(add + bank + e, mask=exists, other=0.0)[None, :])
    weight = tl.where(is_open, weight, 0.0)
    weight = tl.where(known, weight, float("nan"))

    touched = inside & (tl.max((weight != 0.0).to(tl.int32), 1) > 0)
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
        touched = touched & (t >= start) & (t < end)
    vectors = (encoder if BACKWARD else decoder) + bank * width
    for first in range(0, width, BLOCK_D):
        d = first + lanes
        mask = inside[:, None] & (d < width)[None, :]
        raw = tl.load(source + d.to(tl.int64)[None, :] * x_channel, mask=mask)
        u = tl.load(vectors + e[:, None] * width + d[None, :], mask=exists[:, None] & (d < width)[None, :], other=0.0)
        shift = tl.sum(weight[:, :, None] * u[None, :, :], 1)
        changed = tl.where(touched[:, None], (raw.to(tl.float32) + shift).to(raw.dtype), raw)
        if IN_PLACE:
            mask = touched[:, None] & (d < width)[None, :]
        tl.store(target + d.to(tl.int64)[None, :] * y_channel, changed, mask=mask)


@triton.jit
def sae_edit_score_kernel(
    x,
    score,
    before,
    encoder,
    encoder_bias,
    level,
    slot,
    strength,
    clock,
    tokens,
    width,
    sets,
    edits,
    k,
    steps,
    capacity,
    x_row,
    x_token,
    x_channel,
    HAS_LEVEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pre-activations of the edits, and 0 latents before those that have to be ranked, k before the others."""
    program = tl.program_id(0)
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (program // blocks_t).to(tl.int64)
    t = program % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < tokens
    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=0.0)
    on = (which > 0) & (which < sets) & (s != 0.0)
    known_width = tl.where(on, width, 0)
    bank = which.to(tl.int64) * edits
    e = tl.arange(0, BLOCK_E)
    exists = e < tl.where(on, edits, 0)
    pre = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for first in range(0, known_width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tl.load(
            x + row * x_row + t.to(tl.int64)[:, None] * x_token + d.to(tl.int64)[None, :] * x_channel,
            mask=inside[:, None] & (d < width)[None, :],
            other=0.0,
        )
        w = tl.load(
            encoder + (bank + e)[None, :] * width + d[:, None],
            mask=exists[None, :] & (d < width)[:, None],
            other=0.0,
        )
        pre = tl.dot(tile.to(tl.float32), w, pre, input_precision="tf32x3")
    pre += tl.load(encoder_bias + bank + e, mask=exists, other=0.0)[None, :]
    ranked = exists[None, :] & (pre > 0.0)
    if HAS_LEVEL:
        ranked = ranked & (pre > tl.load(level + bank + e, mask=exists, other=0.0)[None, :])
    pair = (row * tokens + t)[:, None] * edits + e[None, :]
    mask = inside[:, None] & (e < edits)[None, :]
    tl.store(score + pair, pre, mask=mask)
    tl.store(before + pair, tl.where(ranked, 0, k), mask=mask)


@triton.jit
def sae_edit_rank_kernel(
    x,
    score,
    before,
    order,
    full_encoder,
    full_bias,
    latent,
    slot,
    clock,
    pairs,
    tokens,
    width,
    edits,
    k,
    latents,
    part,
    full_row,
    capacity,
    x_row,
    x_token,
    x_channel,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the latents of one part of all that come before an edit; whole numbers, so their order does not matter."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    pair = tl.load(order + p, mask=p < pairs, other=0)
    left = (p < pairs) & (tl.load(before + pair, mask=p < pairs, other=k) < k)
    token = pair // edits
    row = token // tokens
    which = tl.load(slot + tl.load(clock) * capacity + row, mask=left, other=0)
    own = tl.load(latent + which.to(tl.int64) * edits + pair % edits, mask=left, other=0)
    mine = tl.load(score + pair, mask=left, other=0.0)
    source = x + (row * x_row + token % tokens * x_token)[:, None]
    count = tl.where(left, 0, k)
    m = tl.program_id(1) * part
    end = tl.minimum(m + part, latents)
    while (m < end) & (tl.min(count) < k):
        index = m + tl.arange(0, BLOCK_M)
        others = tl.zeros([BLOCK_P, BLOCK_M], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            tile = tl.load(
                source + d.to(tl.int64)[None, :] * x_channel, mask=left[:, None] & (d < width)[None, :], other=0.0
            )
            w = tl.load(
                full_encoder + index.to(tl.int64)[None, :] * full_row + d[:, None],
                mask=(index < end)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            others = tl.dot(
                tile.to(tl.float32), w.to(tl.float32), others, input_precision="tf32x3" if EXACT else "tf32"
            )
        others += tl.load(full_bias + index, mask=index < end, other=0.0)[None, :]
        higher = (others > mine[:, None]) | ((others == mine[:, None]) & (index[None, :] < own[:, None]))
        higher = higher & (index[None, :] != own[:, None]) & (index < end)[None, :]
        count += tl.sum(higher.to(tl.int32), 1)
        m += BLOCK_M
    tl.atomic_add(before + pair, count, mask=left)


def blocks(tokens, edits, by_token):
    """Return BLOCK_T, BLOCK_E and BLOCK_D: long along what lies next to each other, small enough for registers."""
    block_e = triton.next_power_of_2(edits)
    if by_token:
        block_d = 512 if block_e == 1 else 256
        return min(max(4096 // (block_d * block_e), 2), triton.next_power_of_2(tokens)), block_e, block_d
    block_t = min(128 if block_e <= 4 else 64, triton.next_power_of_2(tokens))
    return block_t, block_e, max(4096 // (block_t * block_e), 4)


def rank(x, encoder, encoder_bias, level, full, full_bias, latent, slot, strength, clock, k, source):
    """Return the pre-activations of all edits and how many latents come before them; k or more are not in the top k."""
    edits, pairs = encoder.shape[1], source.rows * source.tokens * encoder.shape[1]
    score = torch.empty(pairs, dtype=torch.float32, device=x.device)
    before = torch.empty(pairs, dtype=torch.int32, device=x.device)
    block_t = min(max(triton.next_power_of_2(source.tokens), 16), 64)
    sizes = (source.tokens, source.width, encoder.shape[0], edits, k, *slot.shape)
    sae_edit_score_kernel[(source.rows * triton.cdiv(source.tokens, block_t),)](
        x,
        score,
        before,
        encoder,
        encoder_bias,
        score if level is None else level,
        slot,
        strength,
        clock,
        *sizes,
        *source[3:],
        HAS_LEVEL=level is not None,
        BLOCK_T=block_t,
        BLOCK_E=16,
        BLOCK_D=32,
        num_warps=4,
        num_stages=2,
    )
    order = (before >= k).to(torch.int8).argsort(stable=True)
    latents = full.shape[0]
    parts = min(triton.cdiv(latents, 256), 16)
    part = triton.cdiv(triton.cdiv(latents, parts), 64) * 64
    sae_edit_rank_kernel[(triton.cdiv(pairs, 64), triton.cdiv(latents, part))](
        x,
        score,
        before,
        order,
        full,
        full_bias,
        latent,
        slot,
        clock,
        pairs,
        source.tokens,
        source.width,
        edits,
        k,
        latents,
        part,
        full.stride(0),
        slot.shape[1],
        *source[3:],
        EXACT=x.element_size() > 2 or full.element_size() > 2,
        BLOCK_P=64,
        BLOCK_M=64,
        BLOCK_D=32,
        num_warps=8,
        num_stages=2,
    )
    return score, before


def launch(
    out, x, gradient, encoder, encoder_bias, decoder, scale, add, level, full, full_bias, latent,
    slot, strength, clock, span, gate, k, source, target,
):  # fmt: skip
    """Write the result, or the gradient in x where one is given, into `out`; `source`, `target`: frames of both."""
    score = before = slot
    if gate == "topk":
        score, before = rank(x, encoder, encoder_bias, level, full, full_bias, latent, slot, strength, clock, k, source)
    edits = encoder.shape[1]
    block_t, block_e, block_d = blocks(source.tokens, edits, source.channel_stride == 1)
    from_here = x if gradient is None else gradient
    sae_edit_kernel[(source.rows * triton.cdiv(source.tokens, block_t),)](
        x,
        out,
        from_here,
        encoder,
        encoder_bias,
        decoder,
        scale,
        add,
        scale if level is None else level,
        score,
        before,
        slot,
        strength,
        clock,
        slot if span is None else span,
        source.tokens,
        source.width,
        encoder.shape[0],
        edits,
        k,
        *slot.shape,
        *source[3:],
        *target[3:],
        GATE=GATES[gate],
        HAS_LEVEL=level is not None,
        BACKWARD=gradient is not None,
        HAS_SPAN=span is not None,
        IN_PLACE=from_here.data_ptr() == out.data_ptr(),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_D=block_d,
        num_warps=4,
    )


_TABLE = {"slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}
_STRIDES = ("x_row", "x_token", "x_channel", "y_row", "y_token", "y_channel")


def _ahead(name, element, edits, gate, by_token=True, **flags):
    unit = ("x_channel", "y_channel") if by_token else ("x_token", "y_token")
    sizes = ("tokens", "width", "sets", "edits", "k", "steps", "capacity", *_STRIDES)
    integers = {size: "i32" for size in sizes if size not in unit}
    block_t, block_e, block_d = blocks(1024, edits, by_token)
    floats = ("encoder", "encoder_bias", "decoder", "scale", "add", "level", "score")
    pointers = {**dict.fromkeys(("x", "y", "gradient"), f"*{element}"), **dict.fromkeys(floats, "*fp32")}
    return {
        "name": name,
        "kernel": sae_edit_kernel,
        "signature": {**pointers, "before": "*i32", **_TABLE, **integers},
        "constants": {
            "GATE": GATES[gate],
            "HAS_LEVEL": True,
            "BACKWARD": False,
            "HAS_SPAN": False,
            "IN_PLACE": False,
            **flags,
            "BLOCK_T": block_t,
            "BLOCK_E": block_e,
            "BLOCK_D": block_d,
            **dict.fromkeys(unit, 1),
        },
        "divisible": ("x", "y", "gradient", "encoder", "decoder", "tokens", "width", *_STRIDES),
        "warps": 4,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


def _ahead_rank(name, element):
    integers = ("pairs", "tokens", "width", "edits", "k", "latents", "part", "full_row", "capacity", "x_row", "x_token")
    return {
        "name": name,
        "kernel": sae_edit_rank_kernel,
        "signature": {
            "x": f"*{element}",
            "score": "*fp32",
            "before": "*i32",
            "order": "*i64",
            "full_encoder": f"*{element}",
            "full_bias": "*fp32",
            "latent": "*i32",
            "slot": "*i32",
            "clock": "*i64",
            **dict.fromkeys(integers, "i32"),
        },
        "constants": {"EXACT": element == "fp32", "BLOCK_P": 64, "BLOCK_M": 64, "BLOCK_D": 32, "x_channel": 1},
        "divisible": ("x", "full_encoder", "width", "full_row", "x_row", "x_token", "part"),
        "warps": 8,
        "stages": 2,
        "wants": ("LDG.E.128|LDGSTS.*128",),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-linear", "bf16", 1, "none"),
    _ahead("bf16-threshold-4-in-place", "bf16", 4, "threshold", IN_PLACE=True),
    _ahead("fp32-topk-16-span", "fp32", 16, "topk", HAS_SPAN=True),
    _ahead("bf16-relu-channels", "bf16", 2, "relu", by_token=False),
    _ahead("bf16-relu-2-backward", "bf16", 2, "relu", BACKWARD=True),
    _ahead_rank("rank-bf16", "bf16"),
    _ahead_rank("rank-fp32", "fp32"),
]
