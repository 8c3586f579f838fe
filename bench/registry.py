"""What is measured, one file `bench/ops/<op>.py` per op, found by being there.

Such a file has

    ROWS                          what is measured: a list of `Row`
    cost(case)                    bytes that have to move and operations, per call; 0 where nobody knows
    floor(inputs)                 a label and a call: the least that the hardware has to do, timed in the same run
    naive(inputs)                 optional: a label and a call, the way the field usually does it

where `inputs` are the keyword arguments of the op. An op without a file is measured at a standard shape against a copy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pysteer.ops import Case, SteeringSpec, specs

BF16, FP32 = torch.bfloat16, torch.float32
CPU, GPU = ("cpu",), ("cuda",)
BOTH = CPU + GPU
Timed = tuple[str, Callable[[], Any]]


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
    devices: tuple[str, ...] = CPU
    variant: str = ""

    @property
    def title(self) -> str:
        """Such as `bf16 4x1024x2048 K=64`."""
        case = self.case
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
        parts = [short, f"{case.rows}x{case.tokens}x{case.width}"]
        parts += [] if case.layout == "tokens" else [case.layout.replace("_", " ")]
        parts += [self.variant] if self.variant not in ("", "plain", "hard") else []
        known = {"prototypes": "K"}
        parts += [f"{known.get(name, name)}={value}" for name, value in case.sizes.items()]
        return " ".join(parts)


def elements(case: Case) -> int:
    """R L D."""
    return case.rows * case.tokens * case.width


def copied(case: Case) -> int:
    """Bytes of reading the activation once and writing it once."""
    return 2 * elements(case) * case.dtype.itemsize


def copy_of_x(inputs: dict[str, Any]) -> Timed:
    """The floor of an op that reads and writes an activation."""
    x = inputs["x"]
    return "copy", partial(torch.empty_like(x).copy_, x.clone())


def _standard(name: str) -> list[Row]:
    spec = specs()[name]
    case = Case(2, 512, 1024, BF16, spec.layouts[0], "one", sizes=spec.sizes[0])
    return [Row(name, case, BOTH, next(iter(spec.variants)))]


@cache
def measured() -> dict[str, SimpleNamespace]:
    """For every op its rows, cost, floor and naive."""
    files = {each.name for each in pkgutil.iter_modules([str(Path(__file__).parent / "ops")])}
    found = {}
    for name, spec in specs().items():
        module = importlib.import_module(f"bench.ops.{name}") if name in files else SimpleNamespace()
        found[name] = SimpleNamespace(
            rows=getattr(module, "ROWS", None) or _standard(name),
            cost=getattr(module, "cost", lambda case: (copied(case), 0)),
            floor=getattr(module, "floor", copy_of_x),
            naive=getattr(module, "naive", lambda inputs: None),
            steers=isinstance(spec, SteeringSpec),
        )
    return found
