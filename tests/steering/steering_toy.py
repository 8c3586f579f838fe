"""A small residual model, a family for it, and plans; fast enough to be compiled in every test."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.families import Family
from pysteer.steering import Plan, Site, SiteParameters

WIDTH, LAYERS, STEPS = 8, 3, 4


class FeedForward(nn.Module):
    """Not a bare nn.Linear: torch.compile does not compile the forward of torch's own modules by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Toy(nn.Module):
    """Residual blocks; `run` walks through the steps with 1, 2, 3, ... tokens, as a generator over scales does."""

    def __init__(self, blocks: int = LAYERS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.pool = nn.Linear(WIDTH, WIDTH)
        self.clock = torch.zeros((), dtype=torch.int64)
        self.listeners: list[Callable[..., None]] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def announce(self, cond: int, uncond: int = 0, lengths: Tensor | None = None, part: str = "visual") -> None:
        for listener in list(self.listeners):
            listener(part, cond, uncond, lengths)

    @torch.no_grad()
    def run(self, x: Tensor, uncond: int = 0, model: Any = None) -> list[Tensor]:
        self.announce(len(x) - uncond, uncond)
        outputs = []
        for step in range(STEPS):
            self.clock.fill_(step)
            outputs.append((self if model is None else model)(x[:, : step + 1]))
        return outputs


class ToyFamily(Family):
    """Sites `ffn.i` and `block.i`; part "text" has the pooled vector, which runs by itself."""

    name = "toy"

    def matches(self, obj: Any) -> bool:
        return isinstance(obj, Toy)

    def sites(self, obj: Toy) -> dict[str, Site]:
        found = [Site(f"ffn.{i}", f"blocks.{i}.ffn", width=WIDTH) for i in range(len(obj.blocks))]
        found += [Site(f"block.{i}", f"blocks.{i}", width=WIDTH) for i in range(len(obj.blocks))]
        found += [Site("pool", "pool", part="text", layout="rows", width=WIDTH)]
        return {site.name: site for site in found}

    def root(self, obj: Toy, part: str) -> nn.Module:
        return obj

    def steps(self, obj: Toy, part: str) -> int:
        return STEPS if part == "visual" else 1

    def clock(self, obj: Toy, part: str) -> Tensor:
        return obj.clock if part == "visual" else _TEXT_CLOCK

    def connect(self, obj: Toy, on_rows: Callable[..., None]) -> Callable[[], None]:
        obj.listeners.append(on_rows)
        return lambda: obj.listeners.remove(on_rows)


_TEXT_CLOCK = torch.zeros((), dtype=torch.int64)


class Shift:
    """The simplest thing that can be attached: adds a tensor."""

    def __init__(self, amount: float = 1.0) -> None:
        self.amount = torch.full((WIDTH,), amount)

    def apply(self, x: Tensor) -> Tensor:
        return x + self.amount.to(x.dtype)

    def to(self, device: torch.device) -> "Shift":
        self.amount = self.amount.to(device)
        return self


def shift(site: str, value: float | Tensor = 1.0, steps: tuple[int, ...] | None = None) -> SiteParameters:
    """Mean shift by `value` at a site, the same at each of `steps`."""
    sets = len(steps) if steps else 1
    bias = torch.as_tensor(value, dtype=torch.float32).expand(sets, WIDTH).clone()
    return SiteParameters(site, "affine_shift", steps, {"gain": torch.ones(sets, WIDTH), "bias": bias})


def plan(*sites: str, value: float = 1.0, rows: str = "both") -> Plan:
    return Plan.build([shift(site, value) for site in sites], rows=rows)


def counter() -> tuple[Callable[..., Any], list[Any]]:
    """A compile backend that counts its graphs and runs them eagerly."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend, graphs
