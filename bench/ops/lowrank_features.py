"""What is measured of `lowrank_features`: LoRAs of one shape at a time."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.registry import BOTH, CPU, FP32, Row, Timed
from pysteer.ops import Case


def _row(count: int, size: int, rank: int, variant: str, devices: tuple[str, ...] = CPU) -> Row:
    return Row("lowrank_features", Case(count, size, size, FP32, sizes={"rank": rank}), devices, variant)


ROWS = [
    _row(64, 640, 4, "closed", BOTH),
    _row(64, 320, 1, "plain"),
    _row(16, 640, 4, "plain"),
    _row(8, 1280, 16, "median"),
]


def cost(case: Case) -> tuple[int, int]:
    """One read of the factors, and their Gram matrices."""
    rank = case.sizes["rank"]
    read = case.rows * rank * (case.tokens + case.width)
    return read * case.dtype.itemsize, 2 * read * rank


def floor(inputs: dict[str, Any]) -> Timed:
    """The two Gram matrices of the factors."""
    up, down = inputs["up"], inputs["down"]
    return "Gram matrices", lambda: (up.mT @ up, down @ down.mT)


def _by_product(up: Tensor, down: Tensor, scale: Tensor, quantiles: list[float]) -> list[Any]:
    found = []
    for b, a, s in zip(up, down, scale, strict=True):
        product = s * (b @ a)
        values = torch.linalg.svdvals(product)
        order = [product.flatten().kthvalue(max(1, round(q * product.numel()))).values for q in quantiles]
        found.append((values, product.sum(), product.mean(), product.std(), product.norm(), order))
    return found


def naive(inputs: dict[str, Any]) -> Timed:
    """Every product formed, its singular values from a full SVD and its quantiles from a selection each."""
    given = {"quantiles": [0.0, 0.25, 0.5, 0.75, 1.0], **inputs}
    return "SVD of the products", partial(_by_product, **given)
