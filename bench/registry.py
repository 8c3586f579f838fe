"""What is measured: shapes of every op, and the bytes and operations that no implementation can do without.

An op that is not named here is measured at a standard shape, by the bytes of its activation alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pysteer.ops import Case, specs

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Row:
    """One line of the table: an op at one shape.

    Attributes:
        op: name of the op.
        case: shape, dtype, layout and sizes.
        devices: where it is measured, "cpu" or "cuda".
        variant: of the op, see its `OpSpec`.
    """

    op: str
    case: Case
    devices: tuple[str, ...] = ("cpu",)
    variant: str = ""

    @property
    def title(self) -> str:
        """Such as `bf16 4x1024x2048 K=64`."""
        case = self.case
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
        parts = [short, f"{case.rows}x{case.tokens}x{case.width}"]
        parts += [] if case.layout == "tokens" else [case.layout.replace("_", " ")]
        parts += [f"K={case.sizes['prototypes']}"] if "prototypes" in case.sizes else []
        return " ".join(parts)


def elements(case: Case) -> int:
    """R L D."""
    return case.rows * case.tokens * case.width


def copied(case: Case) -> int:
    """Bytes of reading the activation once and writing it once."""
    return 2 * elements(case) * case.dtype.itemsize


OPERATIONS: dict[str, Callable[[Case], int]] = {
    "affine_shift": lambda case: 2 * elements(case),
    "prototype_shift": lambda case: 2 * elements(case) * case.sizes.get("prototypes", 8),
}


def cost(row: Row) -> tuple[int, int]:
    """Floors per call: bytes moved, and operations where they are known (else 0)."""
    return copied(row.case), OPERATIONS.get(row.op, lambda case: 0)(row.case)


def _prototypes(rows: int, tokens: int, width: int, dtype: torch.dtype, count: int) -> Case:
    return Case(rows, tokens, width, dtype, strength="one", sizes={"prototypes": count})


BOTH, GPU = ("cpu", "cuda"), ("cuda",)
ROWS = [
    Row("affine_shift", Case(4, 1024, 2048, BF16, strength="one"), BOTH),
    Row("affine_shift", Case(16, 1024, 2048, BF16, strength="one")),
    Row("affine_shift", Case(4, 1024, 2048, FP32, strength="one")),
    Row("affine_shift", Case(4, 4096, 320, BF16, "channels_first", "one"), BOTH),
    Row("affine_shift", Case(16, 64, 192, FP32, strength="one")),
    Row("affine_shift", Case(32, 4096, 2048, BF16, strength="one"), GPU),
    Row("affine_shift", Case(32, 4096, 2048, FP32, strength="one"), GPU),
    Row("affine_shift", Case(64, 4096, 1280, BF16, "channels_first", "one"), GPU),
    Row("prototype_shift", _prototypes(16, 64, 192, FP32, 64), variant="hard"),
    Row("prototype_shift", _prototypes(2, 1024, 2048, BF16, 4), variant="hard"),
    Row("prototype_shift", _prototypes(2, 1024, 2048, BF16, 16), variant="hard"),
    Row("prototype_shift", _prototypes(2, 1024, 2048, BF16, 64), variant="hard"),
    Row("prototype_shift", _prototypes(2, 256, 1536, FP32, 256), variant="hard"),
    Row("prototype_shift", _prototypes(16, 4096, 2048, BF16, 4), GPU, "hard"),
    Row("prototype_shift", _prototypes(16, 4096, 2048, BF16, 16), GPU, "hard"),
    Row("prototype_shift", _prototypes(16, 4096, 2048, BF16, 64), GPU, "hard"),
    Row("prototype_shift", _prototypes(16, 4096, 2048, BF16, 256), GPU, "hard"),
]
_NAMED = {row.op for row in ROWS}
ROWS += [
    Row(name, Case(2, 512, 1024, BF16, strength="one", sizes=spec.sizes[0]), BOTH, next(iter(spec.variants)))
    for name, spec in specs().items()
    if name not in _NAMED
]
