"""Triton kernel of `residual_shift`: y = x + gate (f + s ((g - 1) f + b)), see pysteer/ops/residual_shift.py.

One program adds a tile of tokens by channels of one row. Parameter set and strength are looked up in the steering table
by the program itself, so nothing waits for the host.
"""

import triton
import triton.language as tl

from pysteer.kernels.affine_shift import blocks


@triton.jit
def residual_shift_kernel(
    x,
    f,
    y,
    gate,
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
    f_row,
    f_token,
    f_channel,
    y_row,
    y_token,
    y_channel,
    HAS_GATE: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_d = tl.cdiv(width, BLOCK_D)
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (program // (blocks_d * blocks_t)).to(tl.int64)
    t = (program // blocks_d) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    long_t = t.to(tl.int64)[:, None]
    long_d = d.to(tl.int64)[None, :]
    raw = tl.load(x + row * x_row + long_t * x_token + long_d * x_channel, mask=inside)
    branch = tl.load(f + row * f_row + long_t * f_token + long_d * f_channel, mask=inside).to(tl.float32)

    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=1.0)
    if (which != 0) & (s != 0.0):
        # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
        known = d < tl.where((which > 0) & (which < sets), width, 0)
        bank = which.to(tl.int64) * width + d
        g = tl.load(gain + bank, mask=known, other=float("nan"))
        b = tl.load(bias + bank, mask=known, other=float("nan"))
        shifted = branch + s * ((g[None, :] - 1.0) * branch + b[None, :])
        if HAS_SPAN:
            start = tl.load(span + 2 * row)
            end = tl.load(span + 2 * row + 1)
            shifted = tl.where(((t >= start) & (t < end))[:, None], shifted, branch)
        branch = shifted
    if HAS_GATE:
        branch = tl.load(gate + row * width + d, mask=d < width, other=0.0)[None, :] * branch
    result = (raw.to(tl.float32) + branch).to(raw.dtype)
    tl.store(y + row * y_row + long_t * y_token + long_d * y_channel, result, mask=inside)


def launch(out, x, f, gate, gain, bias, slot, strength, clock, span, source, branch, target):
    """Write the result into `out`; `source`, `branch` and `target` are the frames of `x`, `f` and `out`."""
    by_token = source.channel_stride == 1
    block_t, block_d = blocks(source.tokens, source.width, by_token)
    grid = (source.rows * triton.cdiv(source.tokens, block_t) * triton.cdiv(source.width, block_d),)
    residual_shift_kernel[grid](
        x,
        f,
        out,
        gain if gate is None else gate,
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
        *branch[3:],
        *target[3:],
        HAS_GATE=gate is not None,
        HAS_SPAN=span is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )


_TABLE = {"slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}
_BANKS = dict.fromkeys(("gate", "gain", "bias"), "*fp32")
_OF_TABLE = ("sets", "steps", "capacity")


def _ahead(name, element, branch, by_token, gate=True, span=False):
    unit = tuple(f"{each}_{'channel' if by_token else 'token'}" for each in "xfy")
    strides = [f"{each}_{kind}" for each in "xfy" for kind in ("row", "token", "channel")]
    integers = {size: "i32" for size in ("tokens", "width", *_OF_TABLE, *strides) if size not in unit}
    block_t, block_d = blocks(1024, 2048, by_token)
    constants = {"HAS_GATE": gate, "HAS_SPAN": span, "BLOCK_T": block_t, "BLOCK_D": block_d}
    pointers = {"x": f"*{element}", "f": f"*{branch}", "y": f"*{element}"}
    return {
        "name": name,
        "kernel": residual_shift_kernel,
        "signature": {**pointers, **_BANKS, **_TABLE, **integers},
        "constants": {**constants, **dict.fromkeys(unit, 1)},
        "divisible": (*pointers, *_BANKS, *(size for size in integers if size not in _OF_TABLE)),
        "warps": 4,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-tokens", "bf16", "bf16", True),
    _ahead("bf16-tokens-no-gate-span", "bf16", "bf16", True, gate=False, span=True),
    _ahead("fp32-tokens-bf16-branch", "fp32", "bf16", True),
    _ahead("bf16-channels", "bf16", "bf16", False, span=True),
]
