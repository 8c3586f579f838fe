"""Triton kernels of `norm_affine`: a norm and the shift of `affine_shift` behind it, see pysteer/ops/norm_affine.py.

RMS and layer norm: one program takes some whole tokens of one row and reads them once. Group norm: one program takes
one group of channels of one row, reads it for mean and variance and once more, from the cache, for the result.
Parameter set and strength are looked up in the steering table by the program itself, so nothing waits for the host.
"""

import triton
import triton.language as tl


@triton.jit
def row_of_table(slot, strength, clock, row, steps, capacity):
    """Parameter set and strength of a row; set -1 where the clock is outside the table."""
    step = tl.load(clock)
    on_table = (step >= 0) & (step < steps)
    which = tl.load(slot + step * capacity + row, mask=on_table, other=-1)
    s = tl.load(strength + step * capacity + row, mask=on_table, other=1.0)
    return which, s


@triton.jit
def norm_maps(weight, norm_bias, d, width, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Gain and bias of the norm for channels d."""
    w = tl.full(d.shape, 1.0, tl.float32)
    c = tl.full(d.shape, 0.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + d, mask=d < width, other=0.0)
        if PLUS_ONE:
            w += 1.0
    if HAS_BIAS:
        c = tl.load(norm_bias + d, mask=d < width, other=0.0)
    return w, c


@triton.jit
def shift_maps(gain, bias, d, which, sets, width):
    """Gain and bias of the shift for channels d.

    A set outside the bank cannot be reported from here without waiting for the device: the row comes out as NaN.
    """
    known = d < tl.where((which > 0) & (which < sets), width, 0)
    bank = which.to(tl.int64) * width + d
    g = tl.load(gain + bank, mask=known, other=float("nan"))
    b = tl.load(bias + bank, mask=known, other=float("nan"))
    return g, b


@triton.jit
def norm_tokens_kernel(
    x,
    y,
    weight,
    norm_bias,
    gain,
    bias,
    slot,
    strength,
    clock,
    span,
    eps,
    tokens,
    width,
    sets,
    steps,
    capacity,
    x_row,
    x_token,
    y_row,
    y_token,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (tl.program_id(0) // blocks_t).to(tl.int64)
    t = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    raw = tl.load(x + row * x_row + t.to(tl.int64)[:, None] * x_token + d[None, :], mask=inside, other=0.0)
    value = raw.to(tl.float32)
    if CENTRED:
        value = tl.where((d < width)[None, :], value - (tl.sum(value, 1) / width)[:, None], 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    w, c = norm_maps(weight, norm_bias, d, width, HAS_WEIGHT, HAS_BIAS, PLUS_ONE)
    value = value * w[None, :] + c[None, :]

    which, s = row_of_table(slot, strength, clock, row, steps, capacity)
    if (which != 0) & (s != 0.0):
        g, b = shift_maps(gain, bias, d, which, sets, width)
        shifted = value + s * ((g[None, :] - 1.0) * value + b[None, :])
        if HAS_SPAN:
            touched = (t >= tl.load(span + 2 * row)) & (t < tl.load(span + 2 * row + 1))
            shifted = tl.where(touched[:, None], shifted, value)
        value = shifted
    target = y + row * y_row + t.to(tl.int64)[:, None] * y_token + d[None, :]
    tl.store(target, value.to(raw.dtype), mask=inside)


@triton.jit
def norm_groups_kernel(
    x,
    y,
    weight,
    norm_bias,
    gain,
    bias,
    slot,
    strength,
    clock,
    span,
    eps,
    tokens,
    width,
    channels,
    sets,
    steps,
    capacity,
    x_row,
    x_channel,
    y_row,
    y_channel,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    groups = width // channels
    row = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * channels
    last = first + channels

    # Mean and sum of squares around it, merged tile by tile.
    count = 0.0
    mean = 0.0
    squares = 0.0
    for c0 in range(first, last, BLOCK_C):
        d = c0 + tl.arange(0, BLOCK_C)
        for t0 in range(0, tokens, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            inside = (d < last)[:, None] & (t < tokens)[None, :]
            source = x + row * x_row + d.to(tl.int64)[:, None] * x_channel + t[None, :]
            value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            n = (tl.minimum(last - c0, BLOCK_C) * tl.minimum(tokens - t0, BLOCK_T)).to(tl.float32)
            m = tl.sum(value) / n
            away = tl.where(inside, value - m, 0.0)
            total = count + n
            squares += tl.sum(away * away) + (m - mean) * (m - mean) * (count * n / total)
            mean += (m - mean) * (n / total)
            count = total
    root = tl.rsqrt(squares / count + eps)

    which, s = row_of_table(slot, strength, clock, row, steps, capacity)
    for c0 in range(first, last, BLOCK_C):
        d = c0 + tl.arange(0, BLOCK_C)
        w, c = norm_maps(weight, norm_bias, d, width, HAS_WEIGHT, HAS_BIAS, PLUS_ONE)
        g = w
        b = c
        if (which != 0) & (s != 0.0):
            g, b = shift_maps(gain, bias, d, which, sets, width)
        for t0 in range(0, tokens, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            inside = (d < last)[:, None] & (t < tokens)[None, :]
            raw = tl.load(x + row * x_row + d.to(tl.int64)[:, None] * x_channel + t[None, :], mask=inside, other=0.0)
            value = (raw.to(tl.float32) - mean) * root * w[:, None] + c[:, None]
            if (which != 0) & (s != 0.0):
                shifted = value + s * ((g[:, None] - 1.0) * value + b[:, None])
                if HAS_SPAN:
                    touched = (t >= tl.load(span + 2 * row)) & (t < tl.load(span + 2 * row + 1))
                    shifted = tl.where(touched[None, :], shifted, value)
                value = shifted
            target = y + row * y_row + d.to(tl.int64)[:, None] * y_channel + t[None, :]
            tl.store(target, value.to(raw.dtype), mask=inside)


def tile_of_tokens(tokens, width):
    """Return BLOCK_T, BLOCK_D and warps: whole tokens, several of them where they are short."""
    block_d = triton.next_power_of_2(width)
    block_t = max(1, min(2048 // block_d, triton.next_power_of_2(tokens)))
    return block_t, block_d, 4 if block_d <= 2048 else 8 if block_d <= 8192 else 16


def tile_of_group(tokens, channels):
    """Return BLOCK_C, BLOCK_T and warps."""
    block_t = min(triton.next_power_of_2(tokens), 4096)
    block_c = min(triton.next_power_of_2(channels), max(4096 // block_t, 1))
    return block_c, block_t, 8


def launch(
    out, x, weight, norm_bias, gain, bias, slot, strength, clock, span, kind, eps, plus_one, groups, source, target
):
    """Write the result into `out`; `source` and `target` are the frames of `x` and `out`."""
    pointers = (
        x,
        out,
        gain if weight is None else weight,
        gain if norm_bias is None else norm_bias,
        gain,
        bias,
        slot,
        strength,
        clock,
        slot if span is None else span,
    )
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": norm_bias is not None, "PLUS_ONE": plus_one}
    flags["HAS_SPAN"] = span is not None
    table = (gain.shape[0], slot.shape[0], slot.shape[1])
    if kind == "group":
        channels = source.width // groups
        block_c, block_t, warps = tile_of_group(source.tokens, channels)
        norm_groups_kernel[(source.rows * groups,)](
            *pointers,
            float(eps),
            source.tokens,
            source.width,
            channels,
            *table,
            source.row_stride,
            source.channel_stride,
            target.row_stride,
            target.channel_stride,
            **flags,
            BLOCK_C=block_c,
            BLOCK_T=block_t,
            num_warps=warps,
        )
        return
    block_t, block_d, warps = tile_of_tokens(source.tokens, source.width)
    norm_tokens_kernel[(source.rows * triton.cdiv(source.tokens, block_t),)](
        *pointers,
        float(eps),
        source.tokens,
        source.width,
        *table,
        source.row_stride,
        source.token_stride,
        target.row_stride,
        target.token_stride,
        CENTRED=kind == "layer",
        **flags,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=warps,
    )


_TABLE = {"slot": "*i32", "strength": "*fp32", "clock": "*i64", "span": "*i32"}
_BANKS = dict.fromkeys(("weight", "norm_bias", "gain", "bias"), "*fp32")
_OF_TABLE = ("sets", "steps", "capacity")


def _ahead(name, kernel, element, blocks, warps, sizes, span=False, plus_one=False, **more):
    integers = dict.fromkeys((*sizes, *_OF_TABLE), "i32")
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": not plus_one, "PLUS_ONE": plus_one, "HAS_SPAN": span}
    return {
        "name": name,
        "kernel": kernel,
        "signature": {"x": f"*{element}", "y": f"*{element}", **_BANKS, **_TABLE, "eps": "fp32", **integers},
        "constants": {**flags, **blocks, **more},
        "divisible": ("x", "y", *_BANKS, *(size for size in sizes if size != "channels")),
        "warps": warps,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


def _ahead_of_tokens(name, element, width, centred, **more):
    block_t, block_d, warps = tile_of_tokens(1024, width)
    sizes = ("tokens", "width", "x_row", "x_token", "y_row", "y_token")
    blocks = {"BLOCK_T": block_t, "BLOCK_D": block_d}
    return _ahead(name, norm_tokens_kernel, element, blocks, warps, sizes, CENTRED=centred, **more)


def _ahead_of_groups(name, element, tokens, channels, **more):
    block_c, block_t, warps = tile_of_group(tokens, channels)
    sizes = ("tokens", "width", "channels", "x_row", "x_channel", "y_row", "y_channel")
    return _ahead(name, norm_groups_kernel, element, {"BLOCK_C": block_c, "BLOCK_T": block_t}, warps, sizes, **more)


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead_of_tokens("bf16-rms-2048", "bf16", 2048, False, plus_one=True),
    _ahead_of_tokens("bf16-layer-768-span", "bf16", 768, True, span=True),
    _ahead_of_tokens("fp32-layer-8192", "fp32", 8192, True),
    _ahead_of_groups("bf16-group-64x64", "bf16", 4096, 10),
    _ahead_of_groups("bf16-group-16x16-span", "bf16", 256, 40, span=True),
]
