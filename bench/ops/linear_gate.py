"""What is measured of `linear_gate`."""

from typing import Any

import torch

from bench.registry import BF16, BOTH, CPU, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case

ROWS = [
    Row("linear_gate", Case(8, 1024, 2048, BF16, sizes={"classes": 2}), BOTH, "soft"),
    Row("linear_gate", Case(8, 1024, 2048, FP32, sizes={"classes": 2}), CPU, "ood"),
    Row("linear_gate", Case(64, 121, 192, FP32, sizes={"classes": 2}), CPU, "hard-span"),
    Row("linear_gate", Case(8, 4096, 320, BF16, "channels_first", sizes={"classes": 2}), BOTH, "min_max"),
    Row("linear_gate", Case(64, 4096, 2048, BF16, sizes={"classes": 2}), GPU, "soft-mask"),
]


def cost(case: Case) -> tuple[int, int]:
    """One read of x; a sum per element."""
    return elements(case) * case.dtype.itemsize, elements(case)


def floor(inputs: dict[str, Any]) -> Timed:
    """The sum of everything."""
    return "sum", inputs["x"].sum


def naive(inputs: dict[str, Any]) -> Timed | None:
    """Mean over all tokens in fp32, gate, and a boolean index that gathers the rows that pass."""
    x, weight = inputs["x"], inputs["weight"]
    dim = 1 if inputs["channel_dim"] in (-1, x.dim() - 1) else -1
    kind, bias = inputs.get("kind", "gda"), inputs["bias"]

    def gate() -> torch.Tensor:
        v = x.float().mean(dim)
        if kind == "gda":
            passed = torch.softmax(v @ weight.T + bias, -1)[:, 0] >= 0.5
        elif kind == "ood":
            dense = torch.eye(x.shape[-1], device=x.device) - inputs["factor"].T @ inputs["factor"]
            difference = v - weight[0]
            passed = torch.einsum("nd,de,ne->n", difference, dense, difference) * inputs["scale"] <= bias
        else:
            passed = ((v >= weight[0]) & (v <= weight[1])).all(-1)
        return x[passed]

    return "mean, gate, boolean index", gate
