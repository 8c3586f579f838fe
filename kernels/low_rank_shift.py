"""Triton kernel of `low_rank_shift`: y = x + s (U V'x + b), see pysteer/ops/low_rank_shift.py.

One program takes a block of tokens of one row: V'x on the matrix units (fp32 split in three TF32 products), then the
product with U added to the tokens while they are still in the cache.
"""

import triton
import triton.language as tl


@triton.jit
def low_rank_shift_kernel(
    x,
    y,
    read,
    write,
    bias,
    slot,
    strength,
    clock,
    span,
    tokens,
    width,
    sets,
    rank,
    steps,
    capacity,
    x_row,
    x_token,
    x_channel,
    y_row,
    y_token,
    y_channel,
    HAS_SPAN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    lanes = tl.arange(0, BLOCK_D)

    if (which == 0) | (s == 0.0):
        if not IN_PLACE:
            for first in range(0, width, BLOCK_D):
                d = (first + lanes).to(tl.int64)[None, :]
                mask = inside[:, None] & (d < width)
                tl.store(target + d * y_channel, tl.load(source + d * x_channel, mask=mask), mask=mask)
        return

    # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    known_width = tl.where((which > 0) & (which < sets), width, 0)
    k = tl.arange(0, BLOCK_R)
    bank = (which.to(tl.int64) * rank + k) * width
    z = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + lanes
        tile = tl.load(
            source + d.to(tl.int64)[None, :] * x_channel, mask=inside[:, None] & (d < width)[None, :], other=0.0
        )
        v = tl.load(read + bank[None, :] + d[:, None], mask=(k < rank)[None, :] & (d < known_width)[:, None], other=0.0)
        z = tl.dot(tile.to(tl.float32), v, z, input_precision="tf32x3")

    touched = inside
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
        touched = inside & (t >= start) & (t < end)
    for first in range(0, width, BLOCK_D):
        d = first + lanes
        mask = inside[:, None] & (d < width)[None, :]
        raw = tl.load(source + d.to(tl.int64)[None, :] * x_channel, mask=mask)
        u = tl.load(
            write + bank[:, None] + d[None, :], mask=(k < rank)[:, None] & (d < known_width)[None, :], other=0.0
        )
        b = tl.load(bias + which.to(tl.int64) * width + d, mask=d < known_width, other=float("nan"))
        shift = tl.dot(z, u, input_precision="tf32x3") + b[None, :]
        shifted = (raw.to(tl.float32) + s * shift).to(raw.dtype)
        if HAS_SPAN:
            shifted = tl.where(touched[:, None], shifted, raw)
        if IN_PLACE:
            mask = touched[:, None] & (d < width)[None, :]
        tl.store(target + d.to(tl.int64)[None, :] * y_channel, shifted, mask=mask)


def blocks(tokens, width, rank):
    """Return BLOCK_T, BLOCK_R, BLOCK_D and warps; the matrix units want at least 16 of each, registers set the top."""
    block_r = max(triton.next_power_of_2(rank), 16)
    block_t = min(max(triton.next_power_of_2(tokens), 16), 64)
    return block_t, block_r, min(max(triton.next_power_of_2(width), 16), 32), 8 if block_r >= 64 else 4


def launch(out, x, read, write, bias, slot, strength, clock, span, source, target):
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    block_t, block_r, block_d, warps = blocks(source.tokens, source.width, read.shape[1])
    grid = (source.rows * triton.cdiv(source.tokens, block_t),)
    low_rank_shift_kernel[grid](
        x,
        out,
        read,
        write,
        bias,
        slot,
        strength,
        clock,
        slot if span is None else span,
        source.tokens,
        source.width,
        read.shape[0],
        read.shape[1],
        slot.shape[0],
        slot.shape[1],
        *source[3:],
        *target[3:],
        HAS_SPAN=span is not None,
        IN_PLACE=x.data_ptr() == out.data_ptr(),
        BLOCK_T=block_t,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=2,
    )


_POINTERS = {
    "read": "*fp32",
    "write": "*fp32",
    "bias": "*fp32",
    "slot": "*i32",
    "strength": "*fp32",
    "clock": "*i64",
    "span": "*i32",
}


def _ahead(name, element, rank, span=False, in_place=False):
    unit = ("x_channel", "y_channel")
    sizes = ("tokens", "width", "sets", "rank", "steps", "capacity", "x_row", "x_token", "y_row", "y_token")
    block_t, block_r, block_d, warps = blocks(1024, 2048, rank)
    return {
        "name": name,
        "kernel": low_rank_shift_kernel,
        "signature": {"x": f"*{element}", "y": f"*{element}", **_POINTERS, **dict.fromkeys(sizes, "i32")},
        "constants": {
            "HAS_SPAN": span,
            "IN_PLACE": in_place,
            "BLOCK_T": block_t,
            "BLOCK_R": block_r,
            "BLOCK_D": block_d,
            **dict.fromkeys(unit, 1),
        },
        "divisible": ("x", "y", "read", "write", "bias", "tokens", "width", "x_row", "x_token", "y_row", "y_token"),
        "warps": warps,
        "stages": 2,
        "wants": ("LDG.E.128|LDGSTS.*128", "STG.E.128"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-r4", "bf16", 4),
    _ahead("bf16-r32-in-place", "bf16", 32, in_place=True),
    _ahead("fp32-r64-span", "fp32", 64, span=True),
]
