"""Triton kernel of `affine_shift`: y = x + s ((g - 1) x + b), see pysteer/ops/affine_shift.py.

One program changes a tile of tokens by channels of one row. Parameter set and strength are looked up in the steering
table by the program itself, so nothing waits for the host; a row that is off is copied and left.
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
    shifted = (value + s * ((g[None, :] - 1.0) * value + b[None, :])).to(raw.dtype)
    if HAS_SPAN:
        start = tl.load(span + 2 * row)
        end = tl.load(span + 2 * row + 1)
        touched = ((t >= start) & (t < end))[:, None]
        if IN_PLACE:
            inside = inside & touched
        else:
            shifted = tl.where(touched, shifted, raw)
    tl.store(target, shifted, mask=inside)


TILE = 4096  # elements of a program: 16 bytes per load and several loads per thread in flight


def blocks(tokens, width, by_token):
    """Return BLOCK_T and BLOCK_D: long along the dimension whose elements are next to each other."""
    if by_token:
        block_d = min(triton.next_power_of_2(width), 1024)
        return min(TILE // block_d, triton.next_power_of_2(tokens)), block_d
    block_t = min(triton.next_power_of_2(tokens), 1024)
    return block_t, min(TILE // block_t, triton.next_power_of_2(width))


def launch(out, x, gain, bias, slot, strength, clock, span, source, target):
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    by_token = source.channel_stride == 1
    block_t, block_d = blocks(source.tokens, source.width, by_token)
    grid = (source.rows * triton.cdiv(source.tokens, block_t) * triton.cdiv(source.width, block_d),)
    affine_shift_kernel[grid](
        x,
        out,
        gain,
        bias,
        slot,
        strength,
        clock,
        slot if span is None else span,
        source.tokens,
        source.width,
        gain.shape[0],
        slot.shape[0],
        slot.shape[1],
        *source[3:],
        *target[3:],
        HAS_SPAN=span is not None,
        IN_PLACE=x.data_ptr() == out.data_ptr(),
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )


_POINTERS = {"gain": "*fp32", "bias": "*fp32", "slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}


def _ahead(name, element, by_token, span, in_place):
    unit = ("x_channel", "y_channel") if by_token else ("x_token", "y_token")
    sizes = ("tokens", "width", "sets", "steps", "capacity", "x_row", "x_token", "x_channel")
    integers = {size: "i32" for size in (*sizes, "y_row", "y_token", "y_channel") if size not in unit}
    block_t, block_d = blocks(1024, 2048, by_token)
    constants = {"HAS_SPAN": span, "IN_PLACE": in_place, "BLOCK_T": block_t, "BLOCK_D": block_d}
    return {
        "name": name,
        "kernel": affine_shift_kernel,
        "signature": {"x": f"*{element}", "y": f"*{element}", **_POINTERS, **integers},
        "constants": {**constants, **dict.fromkeys(unit, 1)},
        "divisible": (
            "x",
            "y",
            "gain",
            "bias",
            *(size for size in integers if size not in ("sets", "steps", "capacity")),
        ),
        "warps": 4,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-tokens", "bf16", True, False, False),
    _ahead("bf16-tokens-in-place", "bf16", True, False, True),
    _ahead("fp32-tokens-span", "fp32", True, True, False),
    _ahead("bf16-channels", "bf16", False, True, False),
]
