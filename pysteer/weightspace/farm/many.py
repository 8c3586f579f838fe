"""Many LoRAs of one layer as one layer: the frozen weight once over all rows, the factors as batched products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pysteer.errors import InputError


class ManyLinear(nn.Module):
    """`linear(x) + scale_a * up_a (down_a x)`, where the rows of `x` are shared out among A adapters.

    Rows go by adapter: the first I rows are of adapter 0, and so on. Where guidance doubles the rows
    (`[unconditional | conditional]`), both halves do.

    Args:
        base: the frozen layer.
        down: fp32 `[A, r, in]`; rows beyond an adapter's own rank are zeros.
        up: fp32 `[A, out, r]`.
        scale: fp32 `[A]`.
        rows: rows of `x` per adapter, in one half.
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: Tensor, rows: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.register_buffer("scale", scale)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """`x` [h A I, T, in] -> [h A I, T, out], in the dtype of `x`."""
        count = len(self.down)
        halves = x.shape[0] // (count * self.rows)
        if halves * count * self.rows != x.shape[0]:
            raise InputError("rows of many adapters", value=x.shape[0], allowed=f"multiples of {count * self.rows}")
        up = (self.up * self.scale.view(-1, 1, 1)).to(x.dtype)  # type: ignore[operator]
        flat = x.reshape(halves, count, -1, x.shape[-1])
        low = torch.matmul(flat, self.down.mT.to(x.dtype))
        return self.base(x) + torch.matmul(low, up.mT).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Factors:
    """The factors of A adapters by the path of their layer: down fp32 [A, r, in], up fp32 [A, out, r]."""

    down: dict[str, Tensor]
    up: dict[str, Tensor]

    def of(self, adapter: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Path -> (down [rank, in], up [out, rank]) of one adapter."""
        return {path: (self.down[path][adapter, :rank], self.up[path][adapter, :, :rank]) for path in self.down}


def find_layers(root: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Path -> linear layer whose last name is one of `targets`.

    Raises:
        InputError: no layer has such a name.
    """
    found = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets
    }
    if not found:
        names = sorted({path.rpartition(".")[2] for path, m in root.named_modules() if isinstance(m, nn.Linear)})
        raise InputError("targets", value=", ".join(targets), allowed=", ".join(names))
    return found


@contextmanager
def many_adapters(root: nn.Module, factors: Factors, scale: Tensor, rows: int) -> Iterator[dict[str, ManyLinear]]:
    """Put A adapters on the layers of `root` while the block runs; yields the layers by path."""
    made: dict[str, ManyLinear] = {}
    try:
        for path, down in factors.down.items():
            base = root.get_submodule(path)
            assert isinstance(base, nn.Linear)
            made[path] = ManyLinear(base, down, factors.up[path], scale, rows)
            _put(root, path, made[path])
        yield made
    finally:
        for path, layer in made.items():
            _put(root, path, layer.base)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
