"""Triton kernels of `linear_gate` for rows, see pysteer/ops/linear_gate.py.

The first reads the activation once and adds up blocks of tokens; the second adds up the sums of a row, always in the
same order, and makes the gate.
"""

import torch
import triton
import triton.language as tl

BLOCK_D = 128
BLOCK_L = 32
RUN = 256  # tokens of one program


@triton.jit
def sum_kernel(
    x,
    span,
    mask,
    sums,
    tokens,
    width,
    runs,
    x_row,
    x_token,
    x_channel,
    HAS_SPAN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // runs).to(tl.int64)
    run = tl.program_id(0) % runs
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = 0
    end = tokens
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.minimum(tl.load(span + 2 * row + 1), tokens)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for first in range(0, RUN, BLOCK_L):
        t = run * RUN + first + tl.arange(0, BLOCK_L)
        counted = (t >= start) & (t < end)
        if HAS_MASK:
            counted = counted & (tl.load(mask + row * tokens + t, mask=counted, other=0) != 0)
        place = x + row * x_row + t.to(tl.int64)[:, None] * x_token + d.to(tl.int64)[None, :] * x_channel
        total += tl.load(place, mask=counted[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    tl.store(sums + (row * runs + run) * width + d, tl.sum(total, 0), mask=d < width)


@triton.jit
def mean_of(sums, runs, width, number, d):
    total = tl.zeros(d.shape, tl.float32)
    for run in range(runs):
        total += tl.load(sums + run * width + d, mask=d < width, other=0.0)
    return total / tl.maximum(number, 1).to(tl.float32)


@triton.jit
def gate_kernel(
    sums,
    weight,
    bias,
    factor,
    scale,
    span,
    mask,
    out,
    tokens,
    width,
    runs,
    count,
    rank,
    threshold,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = 0
    end = tokens
    if HAS_SPAN:
        start = tl.maximum(tl.load(span + 2 * row), 0)
        end = tl.minimum(tl.load(span + 2 * row + 1), tokens)
    number = tl.maximum(end - start, 0)
    if HAS_MASK:
        found = tl.zeros([BLOCK_L], tl.int32)
        for first in range(0, tokens, BLOCK_L):
            t = first + tl.arange(0, BLOCK_L)
            found += tl.load(mask + row * tokens + t, mask=(t >= start) & (t < end), other=0).to(tl.int32)
        number = tl.sum(found, 0)
    mine = sums + row * runs * width
    lanes = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_C)
    if KIND == 2:
        outside = tl.zeros([BLOCK_D], tl.int32)
        for first in range(0, width, BLOCK_D):
            d = first + lanes
            v = mean_of(mine, runs, width, number, d)
            low = tl.load(weight + d, mask=d < width, other=float("-inf"))
            high = tl.load(weight + width + d, mask=d < width, other=float("inf"))
            outside += tl.where((v >= low) & (v <= high), 0, 1)
        gate = tl.where(tl.sum(outside, 0) == 0, 1.0, 0.0)
    elif KIND == 1:
        square = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + lanes
            v = mean_of(mine, runs, width, number, d)
            v -= tl.load(weight + d, mask=d < width, other=0.0)
            square += tl.where(d < width, v * v, 0.0)
        distance = tl.sum(square, 0)
        for j in range(0, rank, BLOCK_C):
            along = tl.zeros([BLOCK_C], tl.float32)
            for first in range(0, width, BLOCK_D):
                d = first + lanes
                v = mean_of(mine, runs, width, number, d) - tl.load(weight + d, mask=d < width, other=0.0)
                inside = (j + c < rank)[:, None] & (d < width)[None, :]
                z = tl.load(factor + (j + c)[:, None] * width + d[None, :], mask=inside, other=0.0)
                along += tl.sum(tl.where(inside, z * v[None, :], 0.0), 1)
            distance -= tl.sum(along * along, 0)
        if HAS_SCALE:
            distance *= tl.load(scale)
        gate = tl.where(distance <= tl.load(bias), 1.0, 0.0)
    else:
        score = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + lanes
            v = mean_of(mine, runs, width, number, d)
            inside = (c < count)[:, None] & (d < width)[None, :]
            w = tl.load(weight + c[:, None] * width + d[None, :], mask=inside, other=0.0)
            score += tl.sum(tl.where(inside, w * v[None, :], 0.0), 1)
        score += tl.load(bias + c, mask=c < count, other=0.0)
        first_score = tl.sum(tl.where(c == 0, score, 0.0), 0)
        # The others in units of the first; a single score stands against zero.
        others = tl.where((c > 0) & (c < count), tl.exp(score - first_score), 0.0)
        rest = tl.where(count == 1, tl.exp(-first_score), tl.sum(others, 0))
        gate = 1.0 / (1.0 + rest)
        if HARD:
            gate = tl.where(gate >= threshold, 1.0, 0.0)
    tl.store(out + row, tl.where(number > 0, gate, 0.0))


def launch(out, x, weight, bias, factor, scale, span, mask, kind, threshold, source):
    """Write the gates into `out`; `source` is the frame of `x`, `kind` the place in KINDS."""
    runs = triton.cdiv(source.tokens, RUN)
    sums = torch.empty(source.rows * runs * source.width, dtype=torch.float32, device=x.device)
    given = weight  # stands in for what is left out
    span_, mask_ = (given if each is None else each for each in (span, mask))
    mask_ = mask_ if mask is None else mask_.view(torch.uint8)
    flags = {"HAS_SPAN": span is not None, "HAS_MASK": mask is not None}
    by_token = source.channel_stride == 1
    block_l, block_d = (BLOCK_L, BLOCK_D) if by_token else (BLOCK_D, BLOCK_L)
    sum_kernel[(source.rows * runs, triton.cdiv(source.width, block_d))](
        x,
        span_,
        mask_,
        sums,
        source.tokens,
        source.width,
        runs,
        *source[3:],
        **flags,
        RUN=RUN,
        BLOCK_L=block_l,
        BLOCK_D=block_d,
        num_warps=4,
    )
    classes = weight.shape[0] if kind == 0 else 8
    gate_kernel[(source.rows,)](
        sums,
        weight,
        given if bias is None else bias,
        given if factor is None else factor,
        given if scale is None else scale,
        span_,
        mask_,
        out,
        source.tokens,
        source.width,
        runs,
        weight.shape[0],
        0 if factor is None else factor.shape[0],
        0.0 if threshold is None else threshold,
        KIND=kind,
        HARD=threshold is not None,
        HAS_SCALE=scale is not None,
        **flags,
        BLOCK_C=triton.next_power_of_2(max(classes, 2)),
        BLOCK_L=1024,
        BLOCK_D=512,
        num_warps=4,
    )


def _sums_ahead(name, element, by_token=True, mask=False):
    unit = "x_channel" if by_token else "x_token"
    sizes = [size for size in ("tokens", "width", "runs", "x_row", "x_token", "x_channel") if size != unit]
    block_l, block_d = (BLOCK_L, BLOCK_D) if by_token else (BLOCK_D, BLOCK_L)
    return {
        "name": name,
        "kernel": sum_kernel,
        "signature": {
            "x": f"*{element}",
            "span": "*i32",
            "mask": "*u8",
            "sums": "*fp32",
            **dict.fromkeys(sizes, "i32"),
        },
        "constants": {
            unit: 1,
            "HAS_SPAN": mask,
            "HAS_MASK": mask,
            "RUN": RUN,
            "BLOCK_L": block_l,
            "BLOCK_D": block_d,
        },
        "divisible": ("x", "sums", "tokens", "width", "x_row", "x_token", "x_channel"),
        "warps": 4,
        "wants": ("LDG.E.128",),
    }


def _gate_ahead(name, kind):
    pointers = ("sums", "weight", "bias", "factor", "scale", "out")
    sizes = ("tokens", "width", "runs", "count", "rank")
    return {
        "name": name,
        "kernel": gate_kernel,
        "signature": {
            **dict.fromkeys(pointers, "*fp32"),
            "span": "*i32",
            "mask": "*u8",
            **dict.fromkeys(sizes, "i32"),
            "threshold": "fp32",
        },
        "constants": {
            "KIND": kind,
            "HARD": True,
            "HAS_SCALE": True,
            "HAS_SPAN": True,
            "HAS_MASK": True,
            "BLOCK_C": 8,
            "BLOCK_L": 1024,
            "BLOCK_D": 512,
        },
        "divisible": ("sums", "weight", "factor", "tokens", "width"),
        "warps": 4,
        "wants": ("LDG.E.128",),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _sums_ahead("sums-bf16", "bf16"),
    _sums_ahead("sums-fp32-mask", "fp32", mask=True),
    _sums_ahead("sums-bf16-channels-first", "bf16", by_token=False),
    _gate_ahead("gate-gda", 0),
    _gate_ahead("gate-ood", 1),
    _gate_ahead("gate-min-max", 2),
]
