"""Triton kernel of `quadratic_distance` with a low-rank factor, see pysteer/ops/quadratic_distance.py.

One program takes a block of tokens: products with the centres and the sums of squares along the factors stay in
registers, only the distances are written. The products are as exact as in fp32, see `add_product`.
"""

import triton
import triton.language as tl


@triton.jit
def add_product(tile, w, total, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Return total + tile @ w as exact as in fp32.

    SPLIT: `tile` is bf16 and `w` is taken apart in three bf16 numbers. UPCAST: the interpreter cannot multiply bf16.
    """
    if SPLIT:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            wide = tile.to(tl.float32)
            total = tl.dot(wide, low.to(tl.float32), total, input_precision="ieee")
            total = tl.dot(wide, middle.to(tl.float32), total, input_precision="ieee")
            total = tl.dot(wide, high.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(tile, low, total)
            total = tl.dot(tile, middle, total)
            total = tl.dot(tile, high, total)
    else:
        total = tl.dot(tile.to(tl.float32), w, total, input_precision="tf32x3")
    return total


@triton.jit
def tokens_at(source, inside, x_channel, middle, d, width, CENTRED: tl.constexpr):
    """Channels d of the tokens, zero outside."""
    mask = inside[:, None] & (d < width)[None, :]
    tile = tl.load(source + d.to(tl.int64)[None, :] * x_channel, mask=mask, other=0.0, eviction_policy="evict_last")
    if CENTRED:
        tile = tile.to(tl.float32) - tl.load(middle + d, mask=d < width, other=0.0)[None, :]
        tile = tl.where(mask, tile, 0.0)
    return tile


@triton.jit
def own_squares(
    source,
    inside,
    x_channel,
    middle,
    factor,
    prototypes,
    width,
    rank,
    CENTRED: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return |x|² - |F_k x|² of the tokens at `source` with the factors [K, r, D] of all prototypes, [T, K].

    CENTRED: x is counted from `middle`. SHARED: there is one factor for all.
    """
    BLOCK_R: tl.constexpr = 16
    k = tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_D)
    length = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, width, BLOCK_D):
        v = tokens_at(source, inside, x_channel, middle, first + lanes, width, CENTRED).to(tl.float32)
        length += tl.sum(v * v, 1)
    squares = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    blocks_r = tl.cdiv(rank, BLOCK_R)
    for i in range(prototypes * blocks_r):
        j = i // blocks_r
        r = i % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mine = factor + j.to(tl.int64) * rank * width
        along = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + lanes
            tile = tokens_at(source, inside, x_channel, middle, d, width, CENTRED)
            z = tl.load(
                mine + r[None, :] * width + d[:, None], mask=(r < rank)[None, :] & (d < width)[:, None], other=0.0
            )
            along = add_product(tile, z, along, SPLIT, UPCAST)
        squares += tl.where((k == j)[None, :] | SHARED, tl.sum(along * along, 1)[:, None], 0.0)
    return length[:, None] - squares


@triton.jit
def quadratic_distance_kernel(
    x,
    out,
    middle,
    weight,
    offset,
    factor,
    scale,
    tokens,
    width,
    centres,
    rank,
    x_row,
    x_token,
    x_channel,
    SHARED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    row = (tl.program_id(0) // blocks_t).to(tl.int64)
    t = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    first_k = tl.program_id(1) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    inside = t < tokens
    source = x + row * x_row + t.to(tl.int64)[:, None] * x_token
    score = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        tile = tokens_at(source, inside, x_channel, middle, d, width, True)
        w = tl.load(
            weight + k[None, :] * width + d[:, None], mask=(k < centres)[None, :] & (d < width)[:, None], other=0.0
        )
        score = add_product(tile, w, score, False, False)
    score += tl.load(offset + k, mask=k < centres, other=0.0)[None, :]
    mine = factor if SHARED else factor + first_k.to(tl.int64) * rank * width
    count = 1 if SHARED else tl.minimum(centres - first_k, BLOCK_K)
    squares = own_squares(
        source, inside, x_channel, middle, mine, count, width, rank, True, SHARED, False, False,
        BLOCK_T, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    if ONE_SCALE:
        squares *= tl.load(scale)
    else:
        squares *= tl.load(scale + k, mask=k < centres, other=0.0)[None, :]
    distance = squares - 2.0 * score
    distance = tl.where(distance < 0.0, 0.0, distance)
    place = out + (row * tokens + t)[:, None] * centres + k[None, :]
    tl.store(place, distance, mask=inside[:, None] & (k < centres)[None, :])


def _blocks(tokens, width, centres):
    """Return BLOCK_T, BLOCK_K, BLOCK_D and warps."""
    block_t = min(max(triton.next_power_of_2(tokens), 16), 64)
    block_k = min(max(triton.next_power_of_2(centres), 16), 64)
    return block_t, block_k, min(max(triton.next_power_of_2(width), 16), 32), 4


def launch(out, x, middle, weight, offset, factor, scale, source):
    """Write the distances into `out` [R, *tokens, K]; `source` is the frame of `x`."""
    centres = weight.shape[0]
    block_t, block_k, block_d, warps = _blocks(source.tokens, source.width, centres)
    grid = (source.rows * triton.cdiv(source.tokens, block_t), triton.cdiv(centres, block_k))
    quadratic_distance_kernel[grid](
        x,
        out,
        middle,
        weight,
        offset,
        factor,
        scale,
        source.tokens,
        source.width,
        centres,
        factor.shape[-2],
        *source[3:],
        SHARED=factor.dim() == 2,
        ONE_SCALE=scale.shape[0] == 1,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=warps,
        num_stages=2,
    )


def _ahead(name, element, centres, shared):
    pointers = ("out", "middle", "weight", "offset", "factor", "scale")
    sizes = ("tokens", "width", "centres", "rank", "x_row", "x_token")
    block_t, block_k, block_d, warps = _blocks(1024, 2048, centres)
    return {
        "name": name,
        "kernel": quadratic_distance_kernel,
        "signature": {"x": f"*{element}", **dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(sizes, "i32")},
        "constants": {
            "x_channel": 1,
            "SHARED": shared,
            "ONE_SCALE": shared,
            "BLOCK_T": block_t,
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
        },
        "divisible": ("x", "weight", "factor", "tokens", "width", "x_row", "x_token"),
        "warps": warps,
        "stages": 2,
        "wants": (r"LDG\.E\.(EL\.)?128|LDGSTS.*128",),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-shared", "bf16", 8, True),
    _ahead("fp32-own-k64", "fp32", 64, False),
]
