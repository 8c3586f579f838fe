"""What is measured of `gram_accumulate`."""

from functools import partial
from typing import Any

from torch import Tensor

from bench.registry import BF16, BOTH, CPU, FP32, Row, Timed, elements
from pysteer.ops import Case

ROWS = [
    Row("gram_accumulate", Case(4, 2048, 512, FP32), CPU),
    Row("gram_accumulate", Case(4, 2048, 1536, FP32), BOTH),
    Row("gram_accumulate", Case(4, 2048, 1536, BF16), BOTH),
]


def cost(case: Case) -> tuple[int, int]:
    """One read; a product and a sum per pair of channels, of which a half is enough."""
    return elements(case) * case.dtype.itemsize, elements(case) * case.width


def floor(inputs: dict[str, Any]) -> Timed:
    """The bare matrix product in fp32."""
    vectors = inputs["x"].flatten(0, -2).float()
    return "matmul", lambda: vectors.T @ vectors


def _in_double(x: Tensor) -> tuple[Tensor, Tensor]:
    vectors = x.flatten(0, -2).double()
    return vectors.mean(0), vectors.T.cov()


def naive(inputs: dict[str, Any]) -> Timed:
    """Mean and covariance in fp64, for the precision."""
    return "fp64 covariance", partial(_in_double, inputs["x"])
