"""What is measured of `prototype_shift`."""

import torch

from bench.registry import BF16, CPU, FP32, GPU, Row, copied, copy_of_x, elements
from pysteer.ops import Case


def _row(rows: int, tokens: int, width: int, dtype: torch.dtype, count: int, devices: tuple[str, ...] = CPU) -> Row:
    case = Case(rows, tokens, width, dtype, strength="one", sizes={"prototypes": count})
    return Row("prototype_shift", case, devices, "hard")


ROWS = [
    _row(16, 64, 192, FP32, 64),
    _row(64, 121, 192, FP32, 64),
    _row(64, 121, 192, FP32, 256),
    _row(2, 1024, 2048, BF16, 4),
    _row(2, 1024, 2048, BF16, 16),
    _row(2, 1024, 2048, BF16, 64),
    _row(2, 256, 1536, FP32, 256),
    *[_row(16, 4096, 2048, BF16, count, GPU) for count in (4, 16, 64, 256)],
]
floor = copy_of_x


def cost(case: Case) -> tuple[int, int]:
    """One read, one write; a dot product per token and prototype."""
    return copied(case), 2 * elements(case) * case.sizes["prototypes"]
