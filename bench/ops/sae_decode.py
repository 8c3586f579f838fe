"""What is measured of `sae_decode`: the autoencoders of published diffusion models, 32 of 20480 latents, width 1280."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case

SIZES = {"latents": 20480, "k": 32, "padded": 0}
ROWS = [
    Row("sae_decode", Case(4, 256, 1280, FP32, sizes=SIZES), BOTH),
    Row("sae_decode", Case(4, 256, 1280, BF16, sizes=SIZES), BOTH),
    Row("sae_decode", Case(80, 256, 1280, BF16, sizes=SIZES), GPU),
    Row("sae_decode", Case(80, 256, 1280, BF16, sizes={**SIZES, "latents": 5120, "k": 10}), GPU),
]


def cost(case: Case) -> tuple[int, int]:
    """k rows of the decoder a token, the residual and the result; two operations per element of a row."""
    tokens, count = case.rows * case.tokens, case.sizes["k"]
    moved = elements(case) * (count + 2) * case.dtype.itemsize + tokens * count * (case.dtype.itemsize + 4)
    return moved, 2 * elements(case) * count


def _embedding_bag(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    flat = (each.flatten(0, -2) for each in (indices, values))
    y = torch.nn.functional.embedding_bag(next(flat), decoder, mode="sum", per_sample_weights=next(flat))
    return y.reshape(residual.shape) + bias + residual


def floor(inputs: dict[str, Any]) -> Timed:
    """The fastest that torch has for the gather alone."""
    return "embedding_bag", partial(_embedding_bag, **inputs)


def _dense(values: Tensor, indices: Tensor, decoder: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    latents = values.new_zeros(*values.shape[:-1], decoder.shape[0])
    return latents.scatter_(-1, indices.long(), values) @ decoder + bias + residual


def naive(inputs: dict[str, Any]) -> Timed:
    """A dense code and a dense product."""
    return "scatter + dense matmul", partial(_dense, **inputs)
