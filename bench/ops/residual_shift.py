"""What is measured of `residual_shift`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BF16, BOTH, FP32, GPU, Row, elements
from pysteer.ops import Case
from pysteer.ops.affine_shift import affine_shift
from pysteer.ops.lookup import along

ROWS = [
    Row("residual_shift", Case(4, 1024, 2048, BF16, strength="one"), BOTH, "gate"),
    Row("residual_shift", Case(4, 1024, 2048, FP32, strength="one"), BOTH, "half"),
    Row("residual_shift", Case(16, 64, 192, FP32, strength="one"), variant="gate"),
    Row("residual_shift", Case(4, 4096, 320, BF16, "channels_first", "one"), BOTH, "plain"),
    Row("residual_shift", Case(64, 1, 2048, BF16, strength="one"), BOTH, "plain"),
    Row("residual_shift", Case(32, 4096, 2048, BF16, strength="one"), GPU, "gate"),
]


def cost(case: Case) -> tuple[int, int]:
    """Two reads, one write; two products and two sums per element."""
    return 3 * elements(case) * case.dtype.itemsize, 4 * elements(case)


def floor(inputs: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """A sum of two tensors into a third."""
    x, f = inputs["x"].clone(), inputs["f"].clone()
    return "add", partial(torch.add, x, f, out=torch.empty_like(x))


def naive(inputs: dict[str, Any]) -> tuple[str, Callable[[], Any]]:
    """Steering the output of the block, then the residual: what a hook on the block gives."""
    given = dict(inputs)
    x, f, gate = given.pop("x"), given.pop("f"), given.pop("gate", None)

    def call() -> Tensor:
        shifted = affine_shift(f, **given).to(x.dtype)
        if gate is None:
            return x + shifted
        return torch.addcmul(x, shifted, along(gate, x, given["channel_dim"]).to(x.dtype))

    return "affine_shift, then the sum", call
