"""What is measured of `sae_encode_mean`: the capture of a diffusion step, 256 tokens of width 1280 per image."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case

ROWS = [
    Row("sae_encode_mean", Case(4, 256, 1280, FP32, sizes={"latents": 20480}), BOTH, "relu"),
    Row("sae_encode_mean", Case(4, 256, 1280, BF16, sizes={"latents": 20480}), BOTH, "relu"),
    Row("sae_encode_mean", Case(4, 256, 1280, FP32, sizes={"latents": 5120}), BOTH, "relu"),
    Row("sae_encode_mean", Case(4, 256, 1280, BF16, sizes={"latents": 20480}), BOTH, "topk"),
    Row("sae_encode_mean", Case(80, 256, 1280, BF16, sizes={"latents": 20480}), GPU, "relu"),
]


def cost(case: Case) -> tuple[int, int]:
    """Activation and encoder once and the means; two operations per product."""
    latents = case.sizes["latents"]
    moved = (elements(case) + latents * case.width) * case.dtype.itemsize + 4 * case.rows * latents
    return moved, 2 * elements(case) * latents


def floor(inputs: dict[str, Any]) -> Timed:
    """The product alone, in the dtype of the activation, written to memory and left there."""
    tokens, weight = inputs["x"].flatten(0, -2), inputs["weight"].T
    return "matmul", partial(torch.mm, tokens, weight, out=tokens.new_empty(tokens.shape[0], weight.shape[1]))


def _dense(x: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, k: int | None) -> Tensor:
    a = torch.nn.functional.linear(x - pre_bias, weight, bias).relu()
    if k is not None:
        top = a.topk(k, sorted=False)
        a = torch.zeros_like(a).scatter_(-1, top.indices, top.values)
    return a.mean(1)


def naive(inputs: dict[str, Any]) -> Timed:
    """All activations, then their mean, in the dtype of the activation."""
    x = inputs["x"]
    vectors = (inputs["bias"].to(x.dtype), inputs["pre_bias"].to(x.dtype))
    return "relu(linear).mean", partial(_dense, x, inputs["weight"], *vectors, inputs.get("k"))
