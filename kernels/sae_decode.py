"""Triton kernels of `sae_decode` and its gradients, see pysteer/ops/sae_decode.py.

The channels are split over programs in blocks that fit the width, so that no lane is idle at a width such as 1280. Rows
of the decoder are independent reads of one loop body, so several of them are on their way at any time; sums are in the
order of the indices.
"""

import torch
import triton
import triton.language as tl

ROWS = tl.constexpr(4)  # reads on their way at a time


@triton.jit
def sae_decode_kernel(
    y,
    values,
    indices,
    decoder,
    bias,
    residual,
    count,
    latents,
    width,
    stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_D)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    total = tl.zeros([BLOCK_D], tl.float32)
    outside = tl.zeros([], tl.int32)
    for first in range(0, count, ROWS):
        for i in tl.static_range(ROWS):
            exists = first + i < count
            index = tl.load(indices + token * count + first + i, mask=exists, other=-1)
            outside += ((index < -1) | (index >= latents)).to(tl.int32)
            exists = (index >= 0) & (index < latents)
            value = tl.load(values + token * count + first + i, mask=exists, other=0.0).to(tl.float32)
            known = d < tl.where(exists, width, 0)
            row = decoder + index.to(tl.int64) * stride
            total += value * tl.load(row + d, mask=known, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual + token * width + d, mask=inside, other=0.0).to(tl.float32)
    # An index outside cannot be reported from here without waiting for the device: the token comes out as NaN.
    total = tl.where(outside > 0, float("nan"), total)
    tl.store(y + token * width + d, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sae_decode_values_backward_kernel(
    out, gradient, indices, decoder, count, latents, width, stride, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    blocks = tl.cdiv(count, BLOCK_K)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index = tl.load(indices + token * count + i, mask=i < count, other=-1)
    known = ((index >= 0) & (index < latents))[:, None]
    rows = decoder + index.to(tl.int64)[:, None] * stride
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = d < width
        g = tl.load(gradient + token * width + d, mask=inside, other=0.0).to(tl.float32)
        total += g[None, :] * tl.load(rows + d[None, :], mask=known & inside[None, :], other=0.0).to(tl.float32)
    tl.store(out + token * count + i, tl.sum(total, 1), mask=i < count)


@triton.jit
def sae_decode_weight_backward_kernel(out, gradient, values, order, starts, count, width, BLOCK_D: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK_D)
    latent = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < width
    total = tl.zeros([BLOCK_D], tl.float32)
    place = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    while place < end:
        for i in tl.static_range(ROWS):
            exists = place + i < end
            use = tl.load(order + place + i, mask=exists, other=0)
            value = tl.load(values + use, mask=exists, other=0.0).to(tl.float32)
            row = gradient + use // count * width
            total += value * tl.load(row + d, mask=d < tl.where(exists, width, 0), other=0.0).to(tl.float32)
        place += ROWS
    tl.store(out + latent * width + d, total.to(out.dtype.element_ty), mask=inside)


def blocks(width, size):
    """Return BLOCK_D and warps: the longest power of two that wastes little of the width, 16 bytes a lane."""
    smallest = 32 * (16 // size)
    block = smallest
    for candidate in (2 * smallest, 4 * smallest):
        if width % candidate == 0 or width > 8 * candidate:
            block = candidate
    return min(block, max(triton.next_power_of_2(width), 16)), block // smallest


def launch(out, values, indices, decoder, bias, residual):
    """Write the result into `out`; all contiguous but for the rows of the decoder."""
    count, width = values.shape[-1], decoder.shape[1]
    block, warps = blocks(width, decoder.element_size())
    grid = (values.numel() // count * triton.cdiv(width, block),)
    sae_decode_kernel[grid](
        out,
        values,
        indices,
        decoder,
        decoder if bias is None else bias,
        decoder if residual is None else residual,
        count,
        decoder.shape[0],
        width,
        decoder.stride(0),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_D=block,
        num_warps=warps,
    )


def launch_values_backward(out, gradient, indices, decoder):
    """Write the gradient of the values into `out`, fp32."""
    count, width = indices.shape[-1], decoder.shape[1]
    block_k = min(triton.next_power_of_2(count), 8)
    grid = (indices.numel() // count * triton.cdiv(count, block_k),)
    sae_decode_values_backward_kernel[grid](
        out,
        gradient,
        indices,
        decoder,
        count,
        decoder.shape[0],
        width,
        decoder.stride(0),
        BLOCK_K=block_k,
        BLOCK_D=min(triton.next_power_of_2(width), 256),
        num_warps=4,
    )


def launch_weight_backward(out, gradient, values, indices):
    """Write the gradient of the decoder into `out`: uses sorted by latent, then one sum for each."""
    latents, width = out.shape
    found, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(latents + 1, device=out.device, dtype=found.dtype))
    block, warps = blocks(width, gradient.element_size())
    sae_decode_weight_backward_kernel[(latents * triton.cdiv(width, block),)](
        out, gradient, values, order, starts, indices.shape[-1], width, BLOCK_D=block, num_warps=warps
    )


def _ahead(name, element, bias=True, residual=True):
    block, warps = blocks(1280, 4 if element == "fp32" else 2)
    integers = dict.fromkeys(("count", "latents", "width", "stride"), "i32")
    pointers = {"y": element, "values": element, "indices": "i32", "decoder": element, "bias": "fp32"}
    return {
        "name": name,
        "kernel": sae_decode_kernel,
        "signature": {
            **{pointer: f"*{kind}" for pointer, kind in pointers.items()},
            "residual": f"*{element}",
            **integers,
        },
        "constants": {"HAS_BIAS": bias, "HAS_RESIDUAL": residual, "BLOCK_D": block},
        "divisible": ("y", "decoder", "bias", "residual", "width", "stride"),
        "warps": warps,
        "wants": ("LDG.E.128", "STG.E.128"),
    }


_GRADIENTS = [
    {
        "name": "values-backward-bf16",
        "kernel": sae_decode_values_backward_kernel,
        "signature": {
            "out": "*fp32",
            "gradient": "*bf16",
            "indices": "*i32",
            "decoder": "*bf16",
            **dict.fromkeys(("count", "latents", "width", "stride"), "i32"),
        },
        "constants": {"BLOCK_K": 8, "BLOCK_D": 256},
        "divisible": ("gradient", "decoder", "width", "stride"),
        "warps": 4,
        "wants": ("LDG.E.128",),
    },
    {
        "name": "weight-backward-bf16",
        "kernel": sae_decode_weight_backward_kernel,
        "signature": {
            "out": "*bf16",
            "gradient": "*bf16",
            "values": "*bf16",
            "order": "*i64",
            "starts": "*i64",
            "count": "i32",
            "width": "i32",
        },
        "constants": {"BLOCK_D": 256},
        "divisible": ("out", "gradient", "width"),
        "warps": 1,
        "wants": ("LDG.E.128", "STG.E.128"),
    },
]

# What the tests compile ahead of time, and what they look for in the machine code.
AHEAD_OF_TIME = [_ahead("bf16", "bf16"), _ahead("fp32-plain", "fp32", bias=False, residual=False), *_GRADIENTS]
