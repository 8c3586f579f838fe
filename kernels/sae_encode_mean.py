"""Triton kernel of `sae_encode_mean`, see pysteer/ops/sae_encode_mean.py.

A program takes a block of latents and all tokens of a row: products, activation and sum stay in registers.
"""

import torch
import triton
import triton.language as tl

from pysteer.kernels.sae_encode import as_rows, folded, products
from pysteer.kernels.sae_encode import blocks as encode_blocks


@triton.jit
def sae_encode_mean_kernel(
    out,
    x,
    weight,
    bias,
    threshold,
    tokens,
    latents,
    width,
    x_row,
    x_token,
    x_channel,
    w_stride,
    HAS_THRESHOLD: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_m = tl.cdiv(latents, BLOCK_M)
    row = (tl.program_id(0) // blocks_m).to(tl.int64)
    latent = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    known = latent < latents
    b = tl.load(bias + latent, mask=known, other=0.0)[None, :]
    limit = tl.zeros([1, BLOCK_M], tl.float32)
    if HAS_THRESHOLD:
        limit = tl.load(threshold + latent, mask=known, other=0.0)[None, :]
    mean = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = t < tokens
        places = x + row * x_row + t.to(tl.int64) * x_token
        a = products(places, weight, inside, latent, latents, width, x_channel, w_stride, UPCAST, BLOCK_K) + b
        # What is not a number is not below the limit and stays.
        mean += tl.sum(tl.where((a <= limit) | (t >= tokens)[:, None], 0.0, a), 0)
    tl.store(out + row * latents + latent, mean / tokens, mask=known)


def blocks(upcast, tokens):
    """Return BLOCK_T, BLOCK_M, BLOCK_K, warps and stages; fewer tokens than in `sae_encode`, for want of registers."""
    block_t, *others = encode_blocks(upcast, tokens)
    return min(block_t, 32) if upcast else block_t, *others


def launch(out, x, weight, bias, pre_bias, threshold, source):
    """Write the means [R, M] into `out`; `source` is the frame of `x`."""
    weight = as_rows(weight)
    bias = folded(weight, bias, pre_bias)
    latents, width = weight.shape
    limits = bias if threshold is None else threshold.to(torch.float32).expand(latents).contiguous()
    upcast = x.dtype != weight.dtype or x.dtype == torch.float32
    block_t, block_m, block_k, warps, stages = blocks(upcast, source.tokens)
    sae_encode_mean_kernel[(source.rows * triton.cdiv(latents, block_m),)](
        out, x, weight, bias, limits, source.tokens, latents, width, *source[3:], weight.stride(0),
        HAS_THRESHOLD=threshold is not None, UPCAST=upcast, BLOCK_T=block_t, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _ahead(name, element, threshold=False):
    upcast = element == "fp32"
    block_t, block_m, block_k, warps, stages = blocks(upcast, 256)
    sizes = ("tokens", "latents", "width", "x_row", "x_token", "w_stride")
    pointers = {"out": "*fp32", "x": f"*{element}", "weight": f"*{element}", "bias": "*fp32", "threshold": "*fp32"}
    constants = {"HAS_THRESHOLD": threshold, "UPCAST": upcast, "x_channel": 1}
    return {
        "name": name,
        "kernel": sae_encode_mean_kernel,
        "signature": {**pointers, **dict.fromkeys(sizes, "i32")},
        "constants": {**constants, "BLOCK_T": block_t, "BLOCK_M": block_m, "BLOCK_K": block_k},
        "divisible": (*pointers, *sizes),
        "warps": warps,
        "stages": stages,
        "wants": ("LDG.E.128|LDGSTS.*128", "MMA"),
    }


# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [_ahead("bf16", "bf16"), _ahead("fp32-threshold", "fp32", threshold=True)]
