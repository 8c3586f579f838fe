"""Triton kernels of `sae_encode`, see pysteer/ops/sae_encode.py.

The first multiplies tokens with latents and writes the pre-activations of some tokens as integers in the same order,
with the largest of every 32 latents. The k largest of a token lie in the k groups with the largest maxima, so the
second reads those alone. Tokens are taken a tile at a time, so that memory does not grow with their number.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

GROUP = 32  # latents that share a maximum
TILE_BYTES = 1 << 27  # of pre-activations at a time
MOST = 128  # latents kept per token
SELECT_TOKENS = 32 if knobs.runtime.interpret else 1  # of a program; in the interpreter a program costs milliseconds
MOST_GROUPS = 8192
ABSENT = tl.constexpr(-(2**31))  # below the integer of every float
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def products(
    x, weight, inside, latent, latents, width, x_channel, w_stride, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tokens at the addresses `x` [BLOCK_T] times latents [BLOCK_M], summed in fp32."""
    lanes = tl.arange(0, BLOCK_K)
    rows = weight + latent.to(tl.int64)[None, :] * w_stride
    known = (latent < latents)[None, :]
    total = tl.zeros([x.shape[0], latent.shape[0]], tl.float32)
    for first in range(0, width, BLOCK_K):
        d = first + lanes
        a = tl.load(
            x[:, None] + d.to(tl.int64)[None, :] * x_channel, mask=inside[:, None] & (d < width)[None, :], other=0.0
        )
        b = tl.load(rows + d[:, None], mask=known & (d < width)[:, None], other=0.0)
        if UPCAST:
            total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="tf32x3")
        else:
            total = tl.dot(a, b, total)
    return total


@triton.jit
def sae_encode_fold_kernel(
    out, weight, bias, pre_bias, latents, width, w_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out = bias - weight pre_bias: subtracting from the tokens would round them."""
    latent = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = latent < latents
    rows = weight + latent.to(tl.int64)[:, None] * w_stride
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, width, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        w = tl.load(rows + d[None, :], mask=known[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(w * tl.load(pre_bias + d, mask=d < width, other=0.0)[None, :], 1)
    tl.store(out + latent, tl.load(bias + latent, mask=known, other=0.0) - total, mask=known)


@triton.jit
def sae_encode_kernel(
    keys,
    maxima,
    x,
    weight,
    bias,
    threshold,
    first,
    count,
    tokens,
    latents,
    groups,
    width,
    x_row,
    x_token,
    x_channel,
    w_stride,
    HAS_THRESHOLD: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share tokens and latents: eight blocks of tokens before the next block of latents.
    program = tl.program_id(0)
    blocks_t = tl.cdiv(count, BLOCK_T)
    blocks_m = tl.cdiv(latents, BLOCK_M)
    band = program // (8 * blocks_m) * 8
    height = tl.minimum(blocks_t - band, 8)
    block_t = band + program % (8 * blocks_m) % height
    block_m = program % (8 * blocks_m) // height

    n = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    latent = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = n < count
    token = (first + n).to(tl.int64)
    places = x + token // tokens * x_row + token % tokens * x_token
    total = products(places, weight, inside, latent, latents, width, x_channel, w_stride, UPCAST, BLOCK_K)

    known = latent < latents
    # Adding zero makes -0 a 0; the integers of floats below zero run backwards.
    a = total + tl.load(bias + latent, mask=known, other=0.0)[None, :] + 0.0
    bits = a.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(a == a, key, 0x7FFFFFFF)
    if HAS_THRESHOLD:
        limit = tl.load(threshold + latent, mask=known, other=0.0)
        key = tl.where(a > limit[None, :], key, ABSENT)
    key = tl.where(known[None, :], key, ABSENT)
    row = n.to(tl.int64)[:, None]
    tl.store(keys + row * latents + latent[None, :], key, mask=inside[:, None] & known[None, :])
    group = block_m * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
    best = tl.max(tl.reshape(key, [BLOCK_T, BLOCK_M // GROUP, GROUP]), 2)
    tl.store(maxima + row * groups + group[None, :], best, mask=inside[:, None] & (group < groups)[None, :])


@triton.jit
def largest(both, count, BLOCK_C: tl.constexpr):
    """The `count` largest of every row of distinct integers, largest first: as many maxima, which beats sorting."""
    slot = tl.arange(0, BLOCK_C)[None, :]
    found = NOTHING + tl.zeros([both.shape[0], BLOCK_C], tl.int64)
    for i in range(count):
        top = tl.max(both, 1)[:, None]
        found = tl.where(slot == i, top, found)
        both = tl.where(both == top, NOTHING, both)
    return found


@triton.jit
def sae_encode_select_kernel(
    values,
    indices,
    keys,
    maxima,
    tokens,
    latents,
    groups,
    count,
    RELU: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    inside = n < tokens
    # Key above, then the place counted backwards: the largest has the largest key, and the lowest place among equals.
    place = tl.arange(0, BLOCK_G)[None, :]
    best = tl.load(maxima + n * groups + place, mask=inside & (place < groups), other=ABSENT).to(tl.int64)
    chosen = 0x7FFFFFFF - (largest((best << 32) | (0x7FFFFFFF - place).to(tl.int64), count, BLOCK_C) & 0xFFFFFFFF)
    latent = tl.reshape(chosen[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :], [TOKENS, BLOCK_C * GROUP])
    known = latent < latents
    key = tl.load(keys + n * latents + latent, mask=inside & known, other=ABSENT).to(tl.int64)
    both = largest(tl.where(known, (key << 32) | (0x7FFFFFFF - latent), NOTHING), count, BLOCK_C)
    found = (both >> 32).to(tl.int32)
    index = (0x7FFFFFFF - (both & 0xFFFFFFFF)).to(tl.int32)
    value = tl.where(found < 0, found ^ 0x7FFFFFFF, found).to(tl.float32, bitcast=True)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    there = (found != ABSENT) & (index < latents)
    slot = tl.arange(0, BLOCK_C)[None, :]
    value = tl.where(there, value, 0.0).to(values.dtype.element_ty)
    mask = inside & (slot < count)
    tl.store(values + n * count + slot, value, mask=mask)
    tl.store(indices + n * count + slot, tl.where(there, index, -1), mask=mask)


def serves(weight, room):
    """Whether `launch` takes this many latents, and keeps this many."""
    return room <= MOST and triton.cdiv(weight.shape[0], GROUP) <= MOST_GROUPS


def blocks(upcast, tokens):
    """Return BLOCK_T, BLOCK_M, BLOCK_K, warps and stages."""
    block_t = min(max(triton.next_power_of_2(tokens), 16), 64 if upcast else 128)
    return (block_t, 64, 32, 4, 2) if upcast else (block_t, 128, 64, 8 if block_t > 64 else 4, 3)


def select_blocks(groups, room):
    """Return BLOCK_G, BLOCK_C and warps."""
    block_c = triton.next_power_of_2(room)
    block_g = max(triton.next_power_of_2(groups), block_c)
    return block_g, block_c, min(max(max(block_g, block_c * GROUP) // 1024, 1), 8)


def folded(weight, bias, pre_bias):
    """Return the bias [M] in fp32 with what `pre_bias` subtracts from all tokens."""
    latents, width = weight.shape
    if bias is None:
        bias = torch.zeros(latents, device=weight.device)
    bias = bias.to(torch.float32).contiguous()
    if pre_bias is None:
        return bias
    out = torch.empty_like(bias)
    pre_bias = pre_bias.to(torch.float32).contiguous()
    sae_encode_fold_kernel[(triton.cdiv(latents, 16),)](
        out, weight, bias, pre_bias, latents, width, weight.stride(0), BLOCK_M=16, BLOCK_K=256, num_warps=4
    )
    return out


def as_rows(weight):
    """Return the weights with the channels of a latent next to each other."""
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


def launch(x, weight, bias, pre_bias, threshold, relu, out, source):
    """Write values [N, C] and indices [N, C] of the C largest latents of every token into `out`."""
    values, indices = out
    count, room = values.shape
    weight = as_rows(weight)
    bias = folded(weight, bias, pre_bias)
    latents, width = weight.shape
    limits = bias if threshold is None else threshold.to(torch.float32).expand(latents).contiguous()
    groups = triton.cdiv(latents, GROUP)
    upcast = x.dtype != weight.dtype or x.dtype == torch.float32
    tile = min(count, max(TILE_BYTES // (4 * latents) // 128 * 128, 128))
    keys = torch.empty(tile, latents, dtype=torch.int32, device=x.device)
    maxima = torch.empty(tile, groups, dtype=torch.int32, device=x.device)
    block_t, block_m, block_k, warps, stages = blocks(upcast, tile)
    block_g, block_c, select_warps = select_blocks(groups, room)
    for first in range(0, count, tile):
        here = min(tile, count - first)
        sae_encode_kernel[(triton.cdiv(here, block_t) * triton.cdiv(latents, block_m),)](
            keys, maxima, x, weight, bias, limits, first, here, source.tokens, latents, groups, width, *source[3:],
            weight.stride(0), HAS_THRESHOLD=threshold is not None, UPCAST=upcast, GROUP=GROUP, BLOCK_T=block_t,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        sae_encode_select_kernel[(triton.cdiv(here, SELECT_TOKENS),)](
            values[first:], indices[first:], keys, maxima, here, latents, groups, room, RELU=relu,
            TOKENS=SELECT_TOKENS, GROUP=GROUP, BLOCK_G=block_g, BLOCK_C=block_c, num_warps=select_warps,
        )  # fmt: skip


_SIZES = ("first", "count", "tokens", "latents", "groups", "width", "x_row", "x_token", "w_stride")


def _ahead(name, element, threshold=False, by_token=True):
    upcast = element == "fp32"
    block_t, block_m, block_k, warps, stages = blocks(upcast, 1024)
    unit, other = ("x_channel", "x_token") if by_token else ("x_token", "x_channel")
    integers = {size: "i32" for size in (*_SIZES, "x_channel") if size != unit}
    constants = {"HAS_THRESHOLD": threshold, "UPCAST": upcast, "GROUP": GROUP, unit: 1}
    return {
        "name": name,
        "kernel": sae_encode_kernel,
        "signature": {
            "keys": "*i32", "maxima": "*i32", "x": f"*{element}", "weight": f"*{element}", "bias": "*fp32",
            "threshold": "*fp32", **integers,
        },
        "constants": {**constants, "BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_K": block_k},
        "divisible": ("keys", "maxima", "x", "weight", "bias", "threshold", "latents", "width", "x_row", other,
                      "w_stride", "tokens", "count", "first"),
        "warps": warps,
        "stages": stages,
        "wants": ("LDG.E.128|LDGSTS.*128", "STG.E.128", "MMA"),
    }  # fmt: skip


def _select_ahead(name, element, latents, room):
    groups = triton.cdiv(latents, GROUP)
    block_g, block_c, warps = select_blocks(groups, room)
    integers = dict.fromkeys(("tokens", "latents", "groups", "count"), "i32")
    return {
        "name": name,
        "kernel": sae_encode_select_kernel,
        "signature": {"values": f"*{element}", "indices": "*i32", "keys": "*i32", "maxima": "*i32", **integers},
        "constants": {"RELU": True, "TOKENS": 1, "GROUP": GROUP, "BLOCK_G": block_g, "BLOCK_C": block_c},
        "divisible": ("values", "indices", "keys", "maxima", "latents", "groups", "count"),
        "warps": warps,
        "wants": ("LDG.E",),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [
    _ahead("bf16", "bf16"),
    _ahead("bf16-threshold-channels", "bf16", threshold=True, by_token=False),
    _ahead("fp32", "fp32"),
    _select_ahead("select-bf16-20480-k32", "bf16", 20480, 32),
    _select_ahead("select-fp32-131072-k128", "fp32", 131072, 128),
]
