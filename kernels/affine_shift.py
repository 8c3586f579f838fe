"""Triton kernel of `affine_shift`: y = x + s ((g - 1) x + b), see pysteer/ops/affine_shift.py.

One program changes a tile of tokens by channels of one row. Parameter set and strength are looked up in the steering
table by the program itself, so nothing waits for the host; a row that is off is copied and left. For the shift of the
mean the sums over tokens are taken first, in parts that are added in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def affine_shift_kernel(
    x,
    y,
    gain,
    bias,
    slot,
    strength,
    clock,
    span,
    low,
    high,
    sums,
    tokens,
    width,
    sets,
    steps,
    capacity,
    x_row,
    x_token,
    x_channel,
    y_row,
    y_token,
    y_channel,
    HAS_SPAN: tl.constexpr,
    BOUNDED: tl.constexpr,
    OF_MEAN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_d = tl.cdiv(width, BLOCK_D)
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (program // (blocks_d * blocks_t)).to(tl.int64)
    t = (program // blocks_d) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)

    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=1.0)

    inside = (t < tokens)[:, None] & (d < width)[None, :]
    long_t = t.to(tl.int64)[:, None]
    long_d = d.to(tl.int64)[None, :]
    source = x + row * x_row + long_t * x_token + long_d * x_channel
    target = y + row * y_row + long_t * y_token + long_d * y_channel

    if (which == 0) | (s == 0.0):
        if not IN_PLACE:
            tl.store(target, tl.load(source, mask=inside), mask=inside)
        return

    # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    known = d < tl.where((which > 0) & (which < sets), width, 0)
    bank = which.to(tl.int64) * width + d
    g = tl.load(gain + bank, mask=known, other=float("nan"))
    b = tl.load(bias + bank, mask=known, other=float("nan"))
    raw = tl.load(source, mask=inside)
    value = raw.to(tl.float32)
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
    if BOUNDED:  # a row without a set is within them, so that it comes out as NaN
        below = tl.load(low + bank, mask=known, other=float("-inf"))
        above = tl.load(high + bank, mask=known, other=float("inf"))
    if OF_MEAN:
        count = tokens
        if HAS_SPAN:
            count = tl.maximum(tl.minimum(end, tokens) - tl.maximum(start, 0), 1)
        mean = tl.load(sums + row * width + d, mask=d < width, other=0.0) / count
        shifted = (value + (s * ((g - 1.0) * mean + b))[None, :]).to(raw.dtype)
        if BOUNDED:
            shifted = tl.where(((mean > below) & (mean < above))[None, :], shifted, raw)
    else:
        shifted = (value + s * ((g[None, :] - 1.0) * value + b[None, :])).to(raw.dtype)
        if BOUNDED:
            shifted = tl.where((value > below[None, :]) & (value < above[None, :]), shifted, raw)
    if HAS_SPAN:
        touched = ((t >= start) & (t < end))[:, None]
        if IN_PLACE:
            inside = inside & touched
        else:
            shifted = tl.where(touched, shifted, raw)
    tl.store(target, shifted, mask=inside)


@triton.jit
def affine_shift_sums_kernel(
    x,
    sums,
    slot,
    strength,
    clock,
    span,
    rows,
    tokens,
    width,
    part_tokens,
    steps,
    capacity,
    x_row,
    x_token,
    x_channel,
    HAS_SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum up one part of the tokens of one row, for a block of channels: sums[part, row, d]."""
    program = tl.program_id(0)
    blocks_d = tl.cdiv(width, BLOCK_D)
    row = ((program // blocks_d) % rows).to(tl.int64)
    part = program // (blocks_d * rows)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)

    first = part * part_tokens
    last = tl.minimum(first + part_tokens, tokens)
    start = first
    end = last
    if HAS_SPAN:
        start = tl.maximum(tl.load(span + 2 * row), first)
        end = tl.minimum(tl.load(span + 2 * row + 1), last)
    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=0)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=0.0)
    if (which == 0) | (s == 0.0):
        last = first  # nobody looks at the sum

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    source = x + row * x_row + d.to(tl.int64)[None, :] * x_channel
    for begin in range(first, last, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        inside = (t < last)[:, None] & (d < width)[None, :]
        value = tl.load(source + t.to(tl.int64)[:, None] * x_token, mask=inside, other=0.0).to(tl.float32)
        if HAS_SPAN:
            value = tl.where(((t >= start) & (t < end))[:, None], value, 0.0)
        total += value
    place = (part * rows + row) * width + d
    tl.store(sums + place, tl.sum(total, 0), mask=d < width)


@triton.jit
def affine_shift_finish_kernel(sums, count, parts, BLOCK: tl.constexpr):
    """Add the parts, in order, into the first of them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    source = sums + i
    for _ in range(parts):
        total += tl.load(source, mask=i < count, other=0.0)
        source += count
    tl.store(sums + i, total, mask=i < count)


TILE = 4096  # elements of a program: 16 bytes per load and several loads per thread in flight


def blocks(tokens, width, by_token):
    """Return BLOCK_T and BLOCK_D: long along the dimension whose elements are next to each other."""
    if by_token:
        block_d = min(triton.next_power_of_2(width), 1024)
        return min(TILE // block_d, triton.next_power_of_2(tokens)), block_d
    block_t = min(triton.next_power_of_2(tokens), 1024)
    return block_t, min(TILE // block_t, triton.next_power_of_2(width))


def blocks_of_sum(tokens, width, by_token):
    """As `blocks`, for the kernel that sums: narrower, because few programs share the work."""
    if by_token:
        block_d = min(triton.next_power_of_2(width), 256)
        return min(TILE // block_d, triton.next_power_of_2(tokens)), block_d
    return min(triton.next_power_of_2(tokens), 2048), 1


def add_up(x, slot, strength, clock, span, sums, source):
    """Write the sums over the tokens into `sums[0]`; `sums` has a place for every part."""
    parts = len(sums)
    block_t, block_d = blocks_of_sum(source.tokens, source.width, source.channel_stride == 1)
    part_tokens = triton.cdiv(triton.cdiv(source.tokens, parts), block_t) * block_t
    affine_shift_sums_kernel[(source.rows * parts * triton.cdiv(source.width, block_d),)](
        x,
        sums,
        slot,
        strength,
        clock,
        slot if span is None else span,
        source.rows,
        source.tokens,
        source.width,
        part_tokens,
        slot.shape[0],
        slot.shape[1],
        *source[3:],
        HAS_SPAN=span is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )
    if parts > 1:
        count = source.rows * source.width
        affine_shift_finish_kernel[(triton.cdiv(count, 512),)](sums, count, parts, BLOCK=512, num_warps=4)


def launch(out, x, gain, bias, slot, strength, clock, span, low, high, sums, source, target):
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    by_token = source.channel_stride == 1
    block_t, block_d = blocks(source.tokens, source.width, by_token)
    grid = (source.rows * triton.cdiv(source.tokens, block_t) * triton.cdiv(source.width, block_d),)
    if sums is not None:
        add_up(x, slot, strength, clock, span, sums, source)
    affine_shift_kernel[grid](
        x,
        out,
        gain,
        bias,
        slot,
        strength,
        clock,
        slot if span is None else span,
        gain if low is None else low,
        gain if high is None else high,
        gain if sums is None else sums,
        source.tokens,
        source.width,
        gain.shape[0],
        slot.shape[0],
        slot.shape[1],
        *source[3:],
        *target[3:],
        HAS_SPAN=span is not None,
        BOUNDED=low is not None,
        OF_MEAN=sums is not None,
        IN_PLACE=x.data_ptr() == out.data_ptr(),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )


_TABLE = {"slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}
_BANKS = dict.fromkeys(("gain", "bias", "low", "high", "sums"), "*fp32")
_OF_TABLE = ("sets", "steps", "capacity")


def _ahead(name, element, by_token, span=False, in_place=False, bounded=False, of_mean=False):
    unit = ("x_channel", "y_channel") if by_token else ("x_token", "y_token")
    sizes = ("tokens", "width", *_OF_TABLE, "x_row", "x_token", "x_channel", "y_row", "y_token", "y_channel")
    integers = {size: "i32" for size in sizes if size not in unit}
    block_t, block_d = blocks(1024, 2048, by_token)
    flags = {"HAS_SPAN": span, "IN_PLACE": in_place, "BOUNDED": bounded, "OF_MEAN": of_mean}
    return {
        "name": name,
        "kernel": affine_shift_kernel,
        "signature": {"x": f"*{element}", "y": f"*{element}", **_BANKS, **_TABLE, **integers},
        "constants": {**flags, "BLOCK_T": block_t, "BLOCK_D": block_d, **dict.fromkeys(unit, 1)},
        "divisible": ("x", "y", *_BANKS, *(size for size in integers if size not in _OF_TABLE)),
        "warps": 4,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


def _ahead_of_sums(name, element, by_token, span):
    unit = "x_channel" if by_token else "x_token"
    sizes = ("rows", "tokens", "width", "part_tokens", "steps", "capacity", "x_row", "x_token", "x_channel")
    integers = {size: "i32" for size in sizes if size != unit}
    block_t, block_d = blocks_of_sum(1024, 2048, by_token)
    return {
        "name": name,
        "kernel": affine_shift_sums_kernel,
        "signature": {"x": f"*{element}", "sums": "*fp32", **_TABLE, **integers},
        "constants": {"HAS_SPAN": span, "BLOCK_T": block_t, "BLOCK_D": block_d, unit: 1},
        "divisible": ("x", "sums", "tokens", "width", "part_tokens", "x_row", "x_token", "x_channel"),
        "warps": 4,
        "wants": ("LDG.E.128",),
    }


_FINISH = {
    "name": "finish",
    "kernel": affine_shift_finish_kernel,
    "signature": {"sums": "*fp32", "count": "i32", "parts": "i32"},
    "constants": {"BLOCK": 512},
    "divisible": ("sums", "count"),
    "warps": 4,
    "wants": ("LDG.E.128", "STG.E.128"),
}

# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-tokens", "bf16", True),
    _ahead("bf16-tokens-in-place", "bf16", True, in_place=True),
    _ahead("fp32-tokens-span", "fp32", True, span=True),
    _ahead("bf16-channels", "bf16", False, span=True),
    _ahead("bf16-tokens-bounded", "bf16", True, bounded=True),
    _ahead("bf16-channels-bounded-mean", "bf16", False, bounded=True, of_mean=True),
    _ahead_of_sums("bf16-tokens-sums", "bf16", True, True),
    _ahead_of_sums("bf16-channels-sums", "bf16", False, False),
    _FINISH,
]
