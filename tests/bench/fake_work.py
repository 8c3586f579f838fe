"""Contenders for the tests of a contest: some of them cheat."""

from pathlib import Path

import torch

from bench.serving import Prepared

X = torch.arange(12.0).view(3, 4)


def prepare(kind: str, folder: Path, work_name: str) -> Prepared:
    """`x + 1` is the work."""
    if kind == "breaks" or (kind == "once" and work_name == "second"):
        raise RuntimeError("cannot be prepared")
    others = {"unsteered": X, "right": X + 1.001, "idle": X, "wrong": X + 2, "nan": X * torch.nan}
    made = others.get(kind, X + 1)
    run = (lambda: X.sum().item()) if kind == "right" else (lambda: X @ X.T)  # reading a number waits for a GPU
    return Prepared(run, lambda: made, units=3)
