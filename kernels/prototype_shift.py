"""Triton kernel of `prototype_shift` with the hard choice, see pysteer/ops/prototype_shift.py.

One program takes a block of tokens of one row: scores on the matrix units (fp32 split in three TF32 products, so that
near ties fall as in fp32), a running argmax over the prototypes, then the shift of the chosen one, gathered and added
while the tokens are still in the cache.
"""

import triton
import triton.language as tl


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
    tokens,
    width,
    sets,
    prototypes,
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
    PULL: tl.constexpr,
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
    known_width = tl.where(known, width, 0)
    known_prototypes = tl.where(known, prototypes, 0)
    bank = which.to(tl.int64) * prototypes
    best = tl.full([BLOCK_T], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_T], tl.int32)
    for first_k in range(0, prototypes, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        score = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + lanes
            tile = tl.load(
                source + d.to(tl.int64)[None, :] * x_channel, mask=inside[:, None] & (d < width)[None, :], other=0.0
            )
            w = tl.load(
                weight + (bank + k)[None, :] * width + d[:, None],
                mask=(k < prototypes)[None, :] & (d < known_width)[:, None],
                other=0.0,
            )
            score = tl.dot(tile.to(tl.float32), w, score, input_precision="tf32x3")
        o = tl.load(offset + bank + k, mask=k < known_prototypes, other=float("-inf"))
        top, index = tl.max(score + o[None, :], axis=1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.where(top > best, first_k + index, nearest)
        best = tl.where(top > best, top, best)
    nearest = tl.minimum(nearest, prototypes - 1)

    touched = inside
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
        touched = inside & (t >= start) & (t < end)
    shifts = delta + (bank + nearest)[:, None] * width
    for first in range(0, width, BLOCK_D):
        d = first + lanes
        mask = inside[:, None] & (d < width)[None, :]
        raw = tl.load(source + d.to(tl.int64)[None, :] * x_channel, mask=mask)
        u = tl.load(shifts + d[None, :], mask=inside[:, None] & (d < known_width)[None, :], other=float("nan"))
        value = raw.to(tl.float32)
        if PULL:
            u = u - value
        shifted = (value + s * u).to(raw.dtype)
        if HAS_SPAN:
            shifted = tl.where(touched[:, None], shifted, raw)
        if IN_PLACE:
            mask = touched[:, None] & (d < width)[None, :]
        tl.store(target + d.to(tl.int64)[None, :] * y_channel, shifted, mask=mask)


def blocks(tokens, width, prototypes):
    """Return BLOCK_T, BLOCK_K, BLOCK_D and warps; the matrix units want at least 16 of each, registers set the top."""
    block_k = min(max(triton.next_power_of_2(prototypes), 16), 64)
    block_t = min(max(triton.next_power_of_2(tokens), 16), 64)
    return block_t, block_k, min(max(triton.next_power_of_2(width), 16), 32), 8 if block_k >= 64 else 4


def launch(out, x, weight, offset, delta, slot, strength, clock, span, pull, source, target):
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    prototypes = weight.shape[1]
    block_t, block_k, block_d, warps = blocks(source.tokens, source.width, prototypes)
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
        source.tokens,
        source.width,
        weight.shape[0],
        prototypes,
        slot.shape[0],
        slot.shape[1],
        *source[3:],
        *target[3:],
        HAS_SPAN=span is not None,
        IN_PLACE=x.data_ptr() == out.data_ptr(),
        PULL=pull,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=2,
    )


_POINTERS = {
    "weight": "*fp32",
    "offset": "*fp32",
    "delta": "*fp32",
    "slot": "*i32",
    "strength": "*fp32",
    "clock": "*i64",
    "span": "*i32",
}


def _ahead(name, element, prototypes, pull=False, span=False, in_place=False):
    unit = ("x_channel", "y_channel")
    sizes = ("tokens", "width", "sets", "prototypes", "steps", "capacity", "x_row", "x_token", "y_row", "y_token")
    block_t, block_k, block_d, warps = blocks(1024, 2048, prototypes)
    constants = {"HAS_SPAN": span, "IN_PLACE": in_place, "PULL": pull}
    return {
        "name": name,
        "kernel": prototype_shift_kernel,
        "signature": {"x": f"*{element}", "y": f"*{element}", **_POINTERS, **dict.fromkeys(sizes, "i32")},
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
        "wants": ("LDG.E.128|LDGSTS.*128", "STG.E.128"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-k64", "bf16", 64),
    _ahead("bf16-k8-pull-in-place", "bf16", 8, pull=True, in_place=True),
    _ahead("fp32-k256-span", "fp32", 256, span=True),
]
