"""What is measured of `linear_shift`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, elements
from pysteer.ops import Case
from pysteer.ops.affine_shift import affine_shift

ROWS = [
    Row("linear_shift", Case(2, 512, 2048, BF16, strength="one", sizes={"outputs": 2048}), BOTH, "plain"),
    Row("linear_shift", Case(16, 64, 768, FP32, strength="one", sizes={"outputs": 192}), variant="plain"),
    Row("linear_shift", Case(8, 1, 2048, BF16, strength="one", sizes={"outputs": 2048}), BOTH, "plain"),
    Row("linear_shift", Case(16, 4096, 2048, BF16, strength="one", sizes={"outputs": 2048}), GPU, "plain"),
]


def cost(case: Case) -> tuple[int, int]:
    """Input, weight and output once; a product and a sum for each input of each output."""
    outputs = case.sizes["outputs"]
    tokens = case.rows * case.tokens
    moved = (elements(case) + outputs * (case.width + tokens)) * case.dtype.itemsize
    return moved, 2 * elements(case) * outputs


def floor(inputs: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """The layer without the shift."""
    return "linear", partial(F.linear, inputs["x"], inputs["weight"], inputs["linear_bias"])


def naive(inputs: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """The layer, then its output steered into another tensor: what a hook on the layer gives."""
    given = dict(inputs)
    x, weight, bias = given.pop("x"), given.pop("weight"), given.pop("linear_bias")

    def call() -> Tensor:
        return affine_shift(F.linear(x, weight, bias), **given)

    return "the layer, then affine_shift", call
