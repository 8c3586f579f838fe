"""What is measured of `quadratic_distance`."""

from functools import partial
from typing import Any

import torch

from bench.registry import BF16, BOTH, FP32, GPU, Row, Timed, elements
from pysteer.ops import Case


def _row(
    rows: int, tokens: int, width: int, dtype: torch.dtype, variant: str, devices: tuple[str, ...] = BOTH, **sizes: int
) -> Row:
    return Row("quadratic_distance", Case(rows, tokens, width, dtype, sizes=sizes), devices, variant)


ROWS = [
    _row(2, 1024, 2048, BF16, "low-rank", centres=4, rank=64),
    _row(4, 1024, 768, FP32, "dense", centres=4),
    _row(16, 64, 192, FP32, "per-cluster", centres=16, rank=8),
    _row(2, 1024, 2048, BF16, "euclid", centres=64),
    _row(16, 4096, 2048, BF16, "low-rank", GPU, centres=4, rank=64),
    _row(16, 4096, 2048, BF16, "per-cluster", GPU, centres=16, rank=16),
]


def cost(case: Case) -> tuple[int, int]:
    """One read of x; the vectors that every token is multiplied with are counted as centres and factors, shared."""
    count, rank = case.sizes["centres"], case.sizes.get("rank", 0)
    written = case.rows * case.tokens * count * 4
    return elements(case) * case.dtype.itemsize + written, 2 * elements(case) * (count + rank)


def floor(inputs: dict[str, Any]) -> Timed:
    """The matrix product with everything that a token meets: factors and centres, or the dense matrix."""
    x, factor, precision = inputs["x"], inputs["factor"], inputs["precision"]
    vectors = [inputs["centre"], *(each.flatten(0, -2) for each in (factor, precision) if each is not None)]
    matrix = torch.cat(vectors).T.contiguous()
    return "matmul", partial(torch.matmul, x.float().flatten(0, -2), matrix)


def naive(inputs: dict[str, Any]) -> Timed | None:
    """A loop over the centres with the dense matrix, as published code does it."""
    x, centre, factor = inputs["x"], inputs["centre"], inputs["factor"]
    if x.device.type == "cpu" and x.numel() > 1 << 22:
        return None  # seconds
    eye = torch.eye(x.shape[-1], device=x.device)
    if inputs["precision"] is not None:
        dense = [inputs["precision"]] * len(centre)
    elif factor is None:
        dense = [eye] * len(centre)
    else:
        dense = [eye - z.T @ z for z in (factor if factor.dim() == 3 else [factor] * len(centre))]
    scale = inputs["scale"].expand(len(centre))

    def loop() -> torch.Tensor:
        found = []
        for m, p, c in zip(centre, dense, scale, strict=True):
            difference = x.float() - m
            found.append(c * torch.einsum("...d,de,...e->...", difference, p, difference))
        return torch.stack(found, -1)

    return "loop over dense", loop
