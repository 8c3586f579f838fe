"""Triton kernels of `channel_moments`: eight statistics per channel, see pysteer/ops/channel_moments.py.

A first kernel gives every program a run of tiles of one group of channels, a second merges the partial results in fp64
and in order. How x is cut depends on its shape alone. Sums of squares are taken around the mean of the program's first
tile, so that a mean far from zero does not cancel: with k values in that tile and n in all, at most a factor 1 + n / k
of precision is lost, whatever the values are.
"""

import triton
import triton.language as tl

PIECES = 1024  # programs of the first kernel, where there are enough tiles
TILE = 2048  # values of a tile


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _most(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def channel_moments_kernel(
    x,
    partial,
    eps,
    tokens,
    width,
    tiles,
    pieces,
    x_row,
    x_token,
    x_channel,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_T)
    columns = d.to(tl.int64)[None, :] * x_channel
    tiles_of_row = tl.cdiv(tokens, BLOCK_T)
    first = (piece.to(tl.int64) * tiles // pieces).to(tl.int32)
    last = ((piece + 1).to(tl.int64) * tiles // pieces).to(tl.int32)

    t = first % tiles_of_row * BLOCK_T + lanes
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    place = x + (first // tiles_of_row).to(tl.int64) * x_row + t.to(tl.int64)[:, None] * x_token + columns
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    found = tl.sum(inside.to(tl.float32), 0)
    shift = tl.sum(value, 0) / tl.maximum(found, 1.0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    sizes = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    low = tl.full([BLOCK_T, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
    near = tl.zeros([BLOCK_T, BLOCK_D], tl.int32)
    zero = tl.zeros([BLOCK_T, BLOCK_D], tl.int32)
    count = piece * 0
    for index in range(first, last):
        tile = index + piece * 0
        start = tile % tiles_of_row * BLOCK_T
        t = start + lanes
        inside = (t < tokens)[:, None] & (d < width)[None, :]
        place = x + (tile // tiles_of_row).to(tl.int64) * x_row + t.to(tl.int64)[:, None] * x_token + columns
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(value)
        off = tl.where(inside, value - shift[None, :], 0.0)
        total += off
        squares += off * off
        sizes += size
        low = _least(low, tl.where(inside, value, float("inf")))
        high = _most(high, tl.where(inside, value, float("-inf")))
        near += (inside & (size < eps)).to(tl.int32)
        zero += (inside & (size == 0.0)).to(tl.int32)
        count += tl.minimum(tokens - start, BLOCK_T)

    n = count.to(tl.float64)
    moved = tl.sum(total, 0).to(tl.float64)
    target = partial + piece.to(tl.int64) * 8 * width + d
    here = d < width
    tl.store(target, tl.zeros([BLOCK_D], tl.float64) + n, mask=here)
    tl.store(target + width, shift.to(tl.float64) + moved / n, mask=here)
    tl.store(target + 2 * width, tl.sum(squares, 0).to(tl.float64) - moved * moved / n, mask=here)
    tl.store(target + 3 * width, tl.reduce(low, 0, _least).to(tl.float64), mask=here)
    tl.store(target + 4 * width, tl.reduce(high, 0, _most).to(tl.float64), mask=here)
    tl.store(target + 5 * width, tl.sum(sizes, 0).to(tl.float64) / n, mask=here)
    tl.store(target + 6 * width, tl.sum(near, 0).to(tl.float64), mask=here)
    tl.store(target + 7 * width, tl.sum(zero, 0).to(tl.float64), mask=here)


@triton.jit
def merge_moments_kernel(partial, out, width, pieces, INTO: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = d < width
    n = tl.zeros([BLOCK_D], tl.float64)
    mean = tl.zeros([BLOCK_D], tl.float64)
    m2 = tl.zeros([BLOCK_D], tl.float64)
    low = tl.full([BLOCK_D], float("inf"), tl.float64)
    high = tl.full([BLOCK_D], float("-inf"), tl.float64)
    size = tl.zeros([BLOCK_D], tl.float64)
    near = tl.zeros([BLOCK_D], tl.float64)
    zero = tl.zeros([BLOCK_D], tl.float64)
    if INTO:
        n = tl.load(out + d, mask=here, other=0.0)
        mean = tl.load(out + width + d, mask=here, other=0.0)
        m2 = tl.load(out + 2 * width + d, mask=here, other=0.0)
        low = tl.load(out + 3 * width + d, mask=here, other=0.0)
        high = tl.load(out + 4 * width + d, mask=here, other=0.0)
        size = tl.load(out + 5 * width + d, mask=here, other=0.0)
        near = tl.load(out + 6 * width + d, mask=here, other=0.0)
        zero = tl.load(out + 7 * width + d, mask=here, other=0.0)
    source = partial + d
    for _ in range(pieces):
        more = tl.load(source, mask=here, other=1.0)
        other = tl.load(source + width, mask=here, other=0.0)
        every = n + more
        share = more / every
        away = other - mean
        m2 += tl.load(source + 2 * width, mask=here, other=0.0) + away * away * (n * share)
        mean = mean * (n / every) + other * share
        low = _least(low, tl.load(source + 3 * width, mask=here, other=0.0))
        high = _most(high, tl.load(source + 4 * width, mask=here, other=0.0))
        size = size * (n / every) + tl.load(source + 5 * width, mask=here, other=0.0) * share
        near += tl.load(source + 6 * width, mask=here, other=0.0)
        zero += tl.load(source + 7 * width, mask=here, other=0.0)
        n = every
        source += 8 * width
    tl.store(out + d, n, mask=here)
    tl.store(out + width + d, mean, mask=here)
    tl.store(out + 2 * width + d, m2, mask=here)
    tl.store(out + 3 * width + d, low, mask=here)
    tl.store(out + 4 * width + d, high, mask=here)
    tl.store(out + 5 * width + d, size, mask=here)
    tl.store(out + 6 * width + d, near, mask=here)
    tl.store(out + 7 * width + d, zero, mask=here)


def blocks(tokens, width, by_token):
    """Return BLOCK_T and BLOCK_D: long along the dimension whose elements are next to each other."""
    if by_token:
        block_d = min(max(triton.next_power_of_2(width), 16), 128)
        return min(TILE // block_d, max(triton.next_power_of_2(tokens), 16)), block_d
    block_t = min(max(triton.next_power_of_2(tokens), 16), TILE)
    return block_t, min(TILE // block_t, triton.next_power_of_2(width))


def launch(out, x, eps, accumulate, source):
    """Write the moments of `x`, of frame `source`, into `out` [8, D], or add them to it."""
    rows, tokens, width, x_row, x_token, x_channel = source
    by_token = x_channel == 1
    if by_token and (tokens == 1 or x_row == tokens * x_token):  # rows are more tokens
        rows, tokens, x_token = 1, rows * tokens, x_row if tokens == 1 else x_token
    block_t, block_d = blocks(tokens, width, by_token)
    groups, tiles = triton.cdiv(width, block_d), rows * triton.cdiv(tokens, block_t)
    pieces = min(tiles, triton.cdiv(PIECES, groups))
    partial = out.new_empty(pieces, 8, width)
    channel_moments_kernel[(pieces, groups)](
        x,
        partial,
        eps,
        tokens,
        width,
        tiles,
        pieces,
        x_row,
        x_token,
        x_channel,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=8,
    )
    block_d = min(triton.next_power_of_2(width), 64)
    merge_moments_kernel[(triton.cdiv(width, block_d),)](
        partial, out, width, pieces, INTO=accumulate, BLOCK_D=block_d, num_warps=2
    )


def _ahead(name, element, by_token):
    unit = "x_channel" if by_token else "x_token"
    integers = ("tokens", "width", "tiles", "pieces", "x_row", "x_token", "x_channel")
    block_t, block_d = blocks(4096, 2048, by_token)
    return {
        "name": name,
        "kernel": channel_moments_kernel,
        "signature": {
            "x": f"*{element}",
            "partial": "*fp64",
            "eps": "fp32",
            **{each: "i32" for each in integers if each != unit},
        },
        "constants": {"BLOCK_T": block_t, "BLOCK_D": block_d, unit: 1},
        "divisible": ("x", "partial", *(each for each in integers if each not in (unit, "tiles", "pieces"))),
        "warps": 8,
        "wants": ("LDG.E.128",),
    }


def _ahead_merge(accumulate):
    return {
        "name": "merge-into" if accumulate else "merge",
        "kernel": merge_moments_kernel,
        "signature": {"partial": "*fp64", "out": "*fp64", "width": "i32", "pieces": "i32"},
        "constants": {"INTO": accumulate, "BLOCK_D": 64},
        "divisible": ("partial", "out", "width"),
        "warps": 2,
        "wants": (),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16-tokens", "bf16", True),
    _ahead("fp32-tokens", "fp32", True),
    _ahead("bf16-channels", "bf16", False),
    _ahead("fp32-channels", "fp32", False),
    _ahead_merge(False),
    _ahead_merge(True),
]
