"""Triton kernel of `linear_shift`: a matrix product with the shift in its epilogue, see pysteer/ops/linear_shift.py.

One program computes a tile of tokens by outputs; the tokens of all rows stand in one line. Every token looks up its
parameter set and strength in the steering table, so that a tile may hold tokens of several rows.
"""

import triton
import triton.language as tl


@triton.jit
def linear_shift_kernel(
    x,
    weight,
    linear_bias,
    gain,
    bias,
    slot,
    strength,
    clock,
    span,
    y,
    lines,
    tokens,
    inputs,
    outputs,
    sets,
    steps,
    capacity,
    HAS_BIAS: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    left = x + m.to(tl.int64)[:, None] * inputs + k[None, :]
    right = weight + n.to(tl.int64)[None, :] * inputs + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        a = tl.load(left, mask=(m < lines)[:, None] & (k0 + k < inputs)[None, :], other=0.0)
        b = tl.load(right, mask=(n < outputs)[None, :] & (k0 + k < inputs)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K
    if HAS_BIAS:
        total += tl.load(linear_bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]

    row = m // tokens
    step = tl.load(clock) + tl.zeros([BLOCK_M], tl.int64)
    on_table = (step >= 0) & (step < steps) & (m < lines)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=1.0)
    active = (which != 0) & (s != 0.0)
    if HAS_SPAN:
        start = tl.load(span + 2 * row, mask=m < lines, other=0)
        end = tl.load(span + 2 * row + 1, mask=m < lines, other=0)
        active = active & (m - row * tokens >= start) & (m - row * tokens < end)
    # A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    known = (active & (which > 0) & (which < sets))[:, None] & (n < outputs)[None, :]
    bank = which.to(tl.int64)[:, None] * outputs + n[None, :]
    g = tl.load(gain + bank, mask=known, other=float("nan"))
    b = tl.load(bias + bank, mask=known, other=float("nan"))
    shifted = total + s[:, None] * ((g - 1.0) * total + b)
    result = tl.where(active[:, None], shifted, total).to(y.dtype.element_ty)
    inside = (m < lines)[:, None] & (n < outputs)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * outputs + n[None, :], result, mask=inside)


def tile(lines, inputs, size):
    """Return BLOCK_M, BLOCK_N, BLOCK_K and warps for elements of `size` bytes."""
    block_m = min(max(triton.next_power_of_2(lines), 16), 64)
    return block_m, 64, min(max(triton.next_power_of_2(inputs), 16), 128 // size), 4


def launch(out, x, weight, linear_bias, gain, bias, slot, strength, clock, span):
    """Write the result into `out`; everything is contiguous."""
    outputs, inputs = weight.shape
    lines = x.numel() // inputs
    block_m, block_n, block_k, warps = tile(lines, inputs, x.element_size())
    linear_shift_kernel[(triton.cdiv(lines, block_m) * triton.cdiv(outputs, block_n),)](
        x,
        weight,
        weight if linear_bias is None else linear_bias,
        gain,
        bias,
        slot,
        strength,
        clock,
        slot if span is None else span,
        out,
        lines,
        lines // len(x),
        inputs,
        outputs,
        gain.shape[0],
        slot.shape[0],
        slot.shape[1],
        HAS_BIAS=linear_bias is not None,
        HAS_SPAN=span is not None,
        PRECISION="ieee" if x.element_size() == 4 else "tf32",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
    )


_TABLE = {"gain": "*fp32", "bias": "*fp32", "slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}
_SIZES = ("lines", "tokens", "inputs", "outputs", "sets", "steps", "capacity")


def _ahead(name, element, lines, has_bias, span, wants):
    size = 4 if element == "fp32" else 2
    block_m, block_n, block_k, warps = tile(lines, 4096, size)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    pointers = dict.fromkeys(("x", "weight", "linear_bias", "y"), f"*{element}")
    return {
        "name": name,
        "kernel": linear_shift_kernel,
        "signature": {**pointers, **_TABLE, **dict.fromkeys(_SIZES, "i32")},
        "constants": {"HAS_BIAS": has_bias, "HAS_SPAN": span, "PRECISION": "ieee" if size == 4 else "tf32", **blocks},
        "divisible": (*pointers, *_TABLE, "lines", "inputs", "outputs"),
        "warps": warps,
        "wants": wants,
    }


# What the tests compile ahead of time, and what they look for in the machine code: copies into shared memory and
# reads and writes of 16 bytes, and the matrix units.
_WIDE = (r"LDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128", r"STG\.E\.128")
AHEAD_OF_TIME = [
    _ahead("bf16-64", "bf16", 64, True, False, (*_WIDE, "MMA")),
    _ahead("bf16-16-span", "bf16", 16, False, True, (*_WIDE, "MMA")),
    _ahead("fp32-64", "fp32", 64, True, False, _WIDE),
]
