"""Triton kernel of `prototype_shift`, see pysteer/ops/prototype_shift.py.

One program takes a block of tokens of one row. Its scores with all prototypes stay in registers, whether one of them is
to be found or all are to be weighed: no [tokens, K] matrix is in memory. The activation comes from memory once, marked
to be kept; the second look, which adds the shift and goes backwards, finds it in the cache.

Scores are as exact as in fp32, so that near ties fall the same way. For bf16 activations the prototypes are split in
three bf16 numbers, which hold all 24 bits of a float: three products on the bf16 matrix units, which run at twice the
rate of TF32. fp32 and fp16 activations take three products in TF32.
"""

import torch
import triton
import triton.language as tl

from pysteer.kernels.quadratic_distance import add_product, own_squares


@triton.jit
def shift_of(
    source,
    shifts,
    choice,
    nearest,
    inside,
    first,
    width,
    known_width,
    prototypes,
    x_channel,
    SOFT: tl.constexpr,
    PULL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Elements and shifts of the channels from `first` on; a set that is not known gives NaN."""
    d = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < width)[None, :]
    raw = tl.load(source + d.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0, eviction_policy="evict_first")
    if SOFT:
        k = tl.arange(0, BLOCK_K)
        rows = tl.load(
            shifts + k[:, None] * width + d[None, :],
            mask=(k < prototypes)[:, None] & (d < known_width)[None, :],
            other=0.0,
        )
        u = tl.dot(choice, rows, tl.zeros([BLOCK_T, BLOCK_D], tl.float32), input_precision="tf32x3")
        u = tl.where((d < known_width)[None, :], u, float("nan"))
    else:
        places = shifts + nearest[:, None] * width + d[None, :]
        u = tl.load(places, mask=inside[:, None] & (d < known_width)[None, :], other=float("nan"))
    if PULL:
        u = u - raw.to(tl.float32)
    return d, mask, raw, u


@triton.jit
def prototype_shift_kernel(
    x,
    y,
    weight,
    offset,
    delta,
    slot,
    strength,
    clock,
    span,
    factor,
    scale,
    tokens,
    width,
    sets,
    prototypes,
    rank,
    steps,
    capacity,
    per_temperature,
    x_row,
    x_token,
    x_channel,
    y_row,
    y_token,
    y_channel,
    HAS_SPAN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PULL: tl.constexpr,
    SOFT: tl.constexpr,
    OWN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    long_t = t.to(tl.int64)[:, None]
    source = x + row * x_row + long_t * x_token
    target = y + row * y_row + long_t * y_token

    if (which == 0) | (s == 0.0):
        if not IN_PLACE:
            for first in range(0, width, BLOCK_D):
                d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
                mask = inside[:, None] & (d < width)
                tl.store(target + d * y_channel, tl.load(source + d * x_channel, mask=mask), mask=mask)
        return

    # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    known = (which > 0) & (which < sets)
    known_width = tl.where(known, width, 0)
    known_prototypes = tl.where(known, prototypes, 0)
    bank = which.to(tl.int64) * prototypes
    k = tl.arange(0, BLOCK_K)

    score = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        place = source + d.to(tl.int64)[None, :] * x_channel
        tile = tl.load(place, mask=inside[:, None] & (d < width)[None, :], other=0.0, eviction_policy="evict_last")
        w = tl.load(
            weight + (bank + k)[None, :] * width + d[:, None],
            mask=(k < prototypes)[None, :] & (d < known_width)[:, None],
            other=0.0,
        )
        score = add_product(tile, w, score, SPLIT, UPCAST)
    score += tl.load(offset + bank + k, mask=k < known_prototypes, other=float("-inf"))[None, :]
    if OWN:
        c = tl.load(scale + bank + k, mask=k < known_prototypes, other=0.0)
        squares = own_squares(
            source, inside, x_channel, x, factor + bank * rank * width, known_prototypes, known_width, rank,
            False, False, SPLIT, UPCAST, BLOCK_T, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        score -= 0.5 * c[None, :] * squares

    touched = inside
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
        touched = inside & (t >= start) & (t < end)

    nearest = tl.zeros([BLOCK_T], tl.int32)
    if SOFT:
        choice = tl.exp((score - tl.max(score, 1)[:, None]) * per_temperature)
        choice = choice / tl.sum(choice, 1)[:, None]
    else:
        choice = score
        _, nearest = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.minimum(nearest, prototypes - 1)
    shifts = delta + bank * width

    length = tl.zeros([BLOCK_T], tl.float32)
    if NORMALIZE > 0:
        own = tl.zeros([BLOCK_T], tl.float32)
        for first in range(0, width, BLOCK_D):
            d, mask, raw, u = shift_of(
                source, shifts, choice, nearest, inside, first, width, known_width, prototypes, x_channel,
                SOFT, PULL, BLOCK_T, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            value = tl.where(mask, raw.to(tl.float32), 0.0)
            u = tl.where((d < width)[None, :], u, 0.0)
            length += tl.sum(u * u, 1)
            own += tl.sum(value * value, 1)
        length = tl.sqrt(length)
        length = tl.where(length < 1.17549435e-38, 1.17549435e-38, length)  # keeps NaN
        length = (tl.sqrt(own) if NORMALIZE == 2 else 1.0) / length

    last = (tl.cdiv(width, BLOCK_D) - 1) * BLOCK_D
    for back in range(0, width, BLOCK_D):  # what was read last is the likeliest to be in the cache
        first = last - back
        d, mask, raw, u = shift_of(
            source, shifts, choice, nearest, inside, first, width, known_width, prototypes, x_channel,
            SOFT, PULL, BLOCK_T, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if NORMALIZE > 0:
            u = u * length[:, None]
        shifted = (raw.to(tl.float32) + s * u).to(y.dtype.element_ty)
        if HAS_SPAN:
            shifted = tl.where(touched[:, None], shifted, raw)
        if IN_PLACE:
            mask = touched[:, None] & (d < width)[None, :]
        tl.store(target + d.to(tl.int64)[None, :] * y_channel, shifted, mask=mask, eviction_policy="evict_first")


_NORMALIZE = {"none": 0, "unit": 1, "input": 2}


def blocks(tokens, width, prototypes, size, soft):
    """Return BLOCK_T, BLOCK_K, BLOCK_D and warps for elements of `size` bytes.

    The matrix units want at least 16 of each, writing 16 bytes at a time tiles that are large enough; registers set the
    top.
    """
    block_k = min(max(triton.next_power_of_2(prototypes), 16), 256)
    block_t = min(max(triton.next_power_of_2(tokens), 16), 64 if block_k <= (32 if soft else 64) else 32)
    block_d = min(max(triton.next_power_of_2(width), 16), 64 if size == 2 and block_t <= 32 else 32)
    return block_t, block_k, block_d, 8 if block_k >= 64 else 4


def launch(
    out, x, weight, offset, delta, slot, strength, clock, span, factor, scale, pull, temperature, normalize,
    source, target,
):  # fmt: skip
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    prototypes = weight.shape[1]
    block_t, block_k, block_d, warps = blocks(
        source.tokens, source.width, prototypes, x.element_size(), temperature > 0
    )
    grid = (source.rows * triton.cdiv(source.tokens, block_t),)
    prototype_shift_kernel[grid](
        x,
        out,
        weight,
        offset,
        delta,
        slot,
        strength,
        clock,
        slot if span is None else span,
        weight if factor is None else factor,
        offset if scale is None else scale,
        source.tokens,
        source.width,
        weight.shape[0],
        prototypes,
        0 if factor is None else factor.shape[2],
        slot.shape[0],
        slot.shape[1],
        1.0 / temperature if temperature > 0 else 0.0,
        *source[3:],
        *target[3:],
        HAS_SPAN=span is not None,
        IN_PLACE=x.data_ptr() == out.data_ptr(),
        PULL=pull,
        SOFT=temperature > 0,
        OWN=factor is not None,
        NORMALIZE=_NORMALIZE[normalize],
        SPLIT=x.dtype is torch.bfloat16,
        UPCAST=not x.is_cuda,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=2,
    )


_POINTERS = {
    **dict.fromkeys(("weight", "offset", "delta", "strength", "factor", "scale"), "*fp32"),
    "slot": "*i32",
    "clock": "*i64",
    "span": "*i32",
    "per_temperature": "fp32",
}


def _ahead(name, element, prototypes, **flags):
    unit = ("x_channel", "y_channel")
    sizes = ("tokens", "width", "sets", "prototypes", "rank", "steps", "capacity", "x_row", "x_token", "y_row")
    block_t, block_k, block_d, warps = blocks(
        1024, 2048, prototypes, 4 if element == "fp32" else 2, flags.get("SOFT", False)
    )
    off = dict.fromkeys(("HAS_SPAN", "IN_PLACE", "PULL", "SOFT", "OWN", "UPCAST"), False)
    constants = {**off, "NORMALIZE": 0, "SPLIT": element == "bf16", **flags}
    return {
        "name": name,
        "kernel": prototype_shift_kernel,
        "signature": {
            "x": f"*{element}",
            "y": f"*{element}",
            **_POINTERS,
            **dict.fromkeys((*sizes, "y_token"), "i32"),
        },
        "constants": {
            **constants,
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
            **dict.fromkeys(unit, 1),
        },
        "divisible": ("x", "y", "weight", "delta", "tokens", "width", "x_row", "x_token", "y_row", "y_token"),
        "warps": warps,
        "stages": 2,
        "wants": (r"LDG\.E\.(E[LF]\.)?128|LDGSTS.*128", r"STG\.E\.EF\.128"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-k64", "bf16", 64),
    _ahead("bf16-k8-pull-in-place", "bf16", 8, PULL=True, IN_PLACE=True),
    _ahead("fp32-k256-span", "fp32", 256, HAS_SPAN=True),
    _ahead("bf16-k256", "bf16", 256),
    _ahead("bf16-k64-soft-unit", "bf16", 64, SOFT=True, PULL=True, NORMALIZE=1),
    _ahead("bf16-k16-own", "bf16", 16, OWN=True),
]
