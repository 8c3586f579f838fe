"""Perceptrons of several runs trained side by side, as batched products.

Adam, a learning rate that halves when the validation loss stays, and early stopping run for every network on its own;
each ends with the weights of its best epoch. Few are trained at a time: weights, gradients and moments of two networks
stay in the cache, where those of ten are read from memory in every step, and no network waits long for the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.weightspace.coordinates import Coordinates


@dataclass(frozen=True)
class MlpConfig:
    """Widths of the hidden layers and the training: batch rows, learning rate, epochs, and patience in epochs."""

    widths: tuple[int, ...] = (512, 512)
    batch: int = 32
    lr: float = 1e-3
    epochs: int = 200
    patience: int = 20
    halve_after: int = 5


class _Networks:
    """R networks of the same widths, weights `[R, in, out]`."""

    def __init__(self, sizes: Sequence[int], seeds: Sequence[int]) -> None:
        self.weights: list[Tensor] = []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for width, out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(width)
            for shape in ((width, out), (1, out)):
                drawn = torch.stack([torch.rand(shape, generator=g) for g in generators])
                self.weights.append((drawn * 2 - 1).mul_(bound).requires_grad_(True))
        # Views per network, as parameter groups of their own: one fused pass over memory, a learning rate each.
        self.own = [[w.detach()[i] for w in self.weights] for i in range(len(seeds))]
        self.adam = torch.optim.Adam([{"params": own, "lr": 0.0} for own in self.own], fused=True)

    def __call__(self, x: Tensor) -> Tensor:
        """`[R, n, in]` -> logits `[R, n, classes]`."""
        for i in range(0, len(self.weights), 2):
            x = torch.baddbmm(self.weights[i + 1], x, self.weights[i])
            x = F.relu(x) if i + 2 < len(self.weights) else x
        return x

    def step(self, rates: Tensor) -> None:
        """One step of Adam; `rates` [R] is 0 for networks that have stopped."""
        for i, (own, group) in enumerate(zip(self.own, self.adam.param_groups, strict=True)):
            group["lr"] = float(rates[i])
            for view, w in zip(own, self.weights, strict=True):
                assert w.grad is not None
                view.grad = w.grad[i] if group["lr"] > 0 else None
        self.adam.step()
        for w in self.weights:
            w.grad = None


def _padded(parts: Sequence[Tensor], rows: int, width: int) -> Tensor:
    return torch.stack([F.pad(part, (0, width - part.shape[1], 0, rows - len(part))) for part in parts])


def train_mlps(
    data: Sequence[Coordinates], targets: Sequence[tuple[Tensor, Tensor]], classes: int, config: MlpConfig,
    seeds: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Train a network per run; returns its class probabilities fp32 `[n, classes]` of the test part.

    What a network becomes depends on its own data and seed alone, up to rounding.

    Args:
        data: coordinates of the parts of every run.
        targets: class indices int64 of the training and of the validation part of every run.
        classes: their number.
        config: widths and training.
        seeds: of weights and order, one per run.
    """
    few = 2 * torch.get_num_threads()
    return [
        chances
        for i in range(0, len(data), few)
        for chances in _train_few(data[i : i + few], targets[i : i + few], classes, config, seeds[i : i + few])
    ]


def _train_few(
    data: Sequence[Coordinates], targets: Sequence[tuple[Tensor, Tensor]], classes: int, config: MlpConfig,
    seeds: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    count, width = len(data), max(each.train.shape[1] for each in data)
    rows = [max(len(getattr(each, part)) for each in data) for part in ("train", "val", "test")]
    train, val, test = (
        _padded([getattr(each, part) for each in data], size, width)
        for part, size in zip(("train", "val", "test"), rows, strict=True)
    )
    wanted = torch.stack([F.pad(t, (0, rows[0] - len(t))) for t, _ in targets])
    held = torch.stack([F.pad(v, (0, rows[1] - len(v)), value=-100) for _, v in targets])
    nets = _Networks((width, *config.widths, classes), seeds)
    orders = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
    best = torch.full((count,), torch.inf)
    rate, since, wait = torch.full((count,), config.lr), torch.zeros(count), torch.zeros(count)
    kept = [w.detach().clone() for w in nets.weights]
    sizes = [len(each.train) for each in data]
    steps = math.ceil(max(sizes) / config.batch)
    for _ in range(config.epochs):
        order = torch.stack([_order(n, steps * config.batch, g) for n, g in zip(sizes, orders, strict=True)])
        for start in range(0, steps * config.batch, config.batch):
            index = order[:, start : start + config.batch]
            x = torch.gather(train, 1, index[..., None].expand(-1, -1, width))
            logits = nets(x)
            loss = F.cross_entropy(logits.flatten(0, 1), torch.gather(wanted, 1, index).flatten(), reduction="sum")
            (loss / config.batch).backward()
            nets.step(rate)
        with torch.no_grad():
            logits = nets(val)
            losses = F.cross_entropy(logits.flatten(0, 1), held.flatten(), reduction="none").view(count, -1).sum(1)
            losses = losses / (held >= 0).sum(1)
        better = (losses < best) & (rate > 0)
        best = torch.where(better, losses, best)
        for place, w in zip(kept, nets.weights, strict=True):
            place[better] = w.detach()[better]
        since, wait = torch.where(better, 0, since + 1), torch.where(better, 0, wait + 1)
        slow = wait > config.halve_after
        rate, wait = torch.where(slow, rate / 2, rate), torch.where(slow, 0, wait)
        rate = torch.where(since >= config.patience, 0, rate)
        if not bool((rate > 0).any()):
            break
    nets.weights = kept
    with torch.no_grad():
        chances = nets(test).softmax(-1)
    return [chances[i, : len(each.test)] for i, each in enumerate(data)]


def _order(rows: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` indices below `rows`: each once in random order, then from the front again."""
    order = torch.randperm(rows, generator=generator)
    return order.repeat(-(-wanted // rows))[:wanted]
