"""What is measured of `low_rank_shift`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, CPU, FP32, GPU, Row, Timed, copied, copy_of_x, elements
from pysteer.ops import Case


def _row(case: Case, rank: int, devices: tuple[str, ...] = CPU) -> Row:
    case = Case(case.rows, case.tokens, case.width, case.dtype, case.layout, "one", sizes={"rank": rank})
    return Row("low_rank_shift", case, devices)


ROWS = [
    _row(Case(4, 1024, 2048, BF16), 1),
    _row(Case(4, 1024, 2048, BF16), 8, BOTH),
    _row(Case(4, 1024, 2048, BF16), 64),
    _row(Case(4, 1024, 1024, FP32), 8),
    _row(Case(4, 4096, 320, BF16, "channels_first"), 8, BOTH),
    Row("low_rank_shift", Case(4, 1024, 1024, BF16, strength="one", sizes={"rank": 8}), CPU, "mean"),
    _row(Case(32, 4096, 2048, BF16), 8, GPU),
    _row(Case(32, 4096, 2048, BF16), 64, GPU),
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; two products and two sums per element and rank."""
    return copied(case), 4 * elements(case) * case.sizes["rank"]


def _dense(x: Tensor, matrix: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
    moved = x.movedim(channel_dim, -1)
    return torch.nn.functional.linear(moved, matrix, bias).movedim(-1, channel_dim)


def naive(inputs: dict[str, Any]) -> Timed:
    """The D x D matrix of one set applied to every token, as a linear layer does."""
    x, channel_dim = inputs["x"], inputs["channel_dim"]
    matrix = inputs["write"][1].T @ inputs["read"][1] + torch.eye(x.shape[channel_dim], device=x.device)
    given = {"matrix": matrix.to(x.dtype), "bias": inputs["bias"][1].to(x.dtype), "channel_dim": channel_dim}
    return "dense matrix", partial(_dense, x, **given)
