"""What is measured of `sae_encode`: the encoders of published diffusion models, 32 of 20480 or of 5120, width 1280."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case

SIZES = {"latents": 20480, "k": 32}
SMALL = {"latents": 5120, "k": 32}
ROWS = [
    Row("sae_encode", Case(4, 256, 1280, FP32, sizes=SIZES), BOTH, "topk"),
    Row("sae_encode", Case(4, 256, 1280, BF16, sizes=SIZES), BOTH, "topk"),
    Row("sae_encode", Case(4, 256, 1280, FP32, sizes=SMALL), BOTH, "topk"),
    Row("sae_encode", Case(4, 256, 1280, BF16, sizes=SMALL), BOTH, "topk"),
    Row("sae_encode", Case(4, 256, 1280, BF16, sizes=SIZES), BOTH, "batch"),
    Row("sae_encode", Case(4, 256, 1280, BF16, "channels_first", sizes=SMALL), BOTH, "topk"),
    Row("sae_encode", Case(1, 1, 1280, BF16, sizes=SIZES), BOTH, "topk"),
    Row("sae_encode", Case(80, 256, 1280, BF16, sizes=SIZES), GPU, "topk"),
]


def cost(case: Case) -> tuple[int, int]:
    """Activation and encoder once, the result once; two operations per product."""
    latents, tokens = case.sizes["latents"], case.rows * case.tokens
    moved = (elements(case) + latents * case.width) * case.dtype.itemsize
    return moved + tokens * case.sizes["k"] * (case.dtype.itemsize + 4), 2 * elements(case) * latents


def floor(inputs: dict[str, Any]) -> Timed:
    """The product alone, in the dtype of the activation, written to memory and left there."""
    tokens = inputs["x"].movedim(inputs["channel_dim"], -1).flatten(0, -2).contiguous()
    weight = inputs["weight"].T
    return "matmul", partial(torch.mm, tokens, weight, out=tokens.new_empty(tokens.shape[0], weight.shape[1]))


def _dense(x: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, k: int, shared: bool) -> tuple[Tensor, Tensor]:
    a = torch.nn.functional.linear(x - pre_bias, weight, bias).relu()
    if shared:
        a = a.flatten()
        k = k * (x.numel() // x.shape[-1])
    return tuple(a.topk(k, sorted=False))


def naive(inputs: dict[str, Any]) -> Timed:
    """All pre-activations, then `topk`, in the dtype of the activation."""
    x = inputs["x"]
    if inputs["channel_dim"] != -1:
        x = x.movedim(inputs["channel_dim"], -1)
    vectors = (inputs["bias"].to(x.dtype), inputs["pre_bias"].to(x.dtype))
    shared = inputs["mode"] == "batch_topk"
    return "relu(linear) + topk", partial(_dense, x, inputs["weight"], *vectors, inputs["k"], shared)
