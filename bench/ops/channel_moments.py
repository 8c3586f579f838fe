"""What is measured of `channel_moments`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, CPU, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case

ROWS = [
    Row("channel_moments", Case(8, 64 * 64, 128, FP32, "channels_first"), BOTH),
    Row("channel_moments", Case(8, 128 * 128, 128, FP32, "channels_first"), CPU),
    Row("channel_moments", Case(8, 128 * 128, 128, BF16, "channels_first"), CPU),
    Row("channel_moments", Case(8, 64 * 64, 128, FP32, "channels_last"), CPU),
    Row("channel_moments", Case(8, 1024, 2048, FP32), CPU),
    Row("channel_moments", Case(8, 1024, 2048, BF16), BOTH),
    Row("channel_moments", Case(64, 64 * 64, 1280, BF16, "channels_first"), GPU),
    Row("channel_moments", Case(32, 4096, 2048, BF16), GPU),
]


def cost(case: Case) -> tuple[int, int]:
    """One read; about ten operations per element."""
    return elements(case) * case.dtype.itemsize, 10 * elements(case)


def floor(inputs: dict[str, Any]) -> Timed:
    """One statistic of the whole tensor."""
    return "sum", partial(torch.sum, inputs["x"])


def _composed(x: Tensor, eps: float, channel_dim: int) -> tuple[Tensor, ...]:
    dims = [dim for dim in range(x.dim()) if dim != channel_dim % x.dim()]
    size = x.abs()
    return (
        x.mean(dims), x.var(dims), x.amin(dims), x.amax(dims), size.mean(dims), (size < eps).sum(dims),
        (x == 0).sum(dims),
    )  # fmt: skip


def naive(inputs: dict[str, Any]) -> Timed:
    """One reduction of torch per statistic."""
    return "torch reductions", partial(_composed, **inputs)
