"""Directions in the space of changes, as weights on the adapters of a collection.

Any direction in the span of a collection is `sum_i c_i dW_i`. Means, differences of means, principal components, probes
and random controls all are, and the coefficients come from inner products of changes alone: nothing of the size of a
change is formed before a direction is made into an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.weightspace.adapter import Adapter, LowRank
from pysteer.weightspace.canonical import delta_gram
from pysteer.weightspace.loraset import LoraSet


@dataclass(frozen=True)
class Direction:
    """A direction `sum_i c_i dW_i`.

    Attributes:
        name: what it is, for reports.
        coefficients: fp64 `[N]`, on the adapters of the collection. At t = 1 a direction between two classes takes the
            mean of one to the other; a component or a random direction is one standard deviation long.
    """

    name: str
    coefficients: Tensor


class Directions:
    """Directions of a collection.

        directions = Directions(adapters)
        to_square = directions.between("shape=square", "shape=circle")
        edited = directions.edit(12, to_square, 0.5)

    Args:
        adapters: the collection.
    """

    def __init__(self, adapters: LoraSet) -> None:
        self.adapters = adapters

    @cached_property
    def gram(self) -> Tensor:
        """Inner products fp64 `[N, N]` of all changes."""
        return delta_gram(self.adapters)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors of the centred inner products."""
        column = self.gram.mean(0)
        values, vectors = torch.linalg.eigh(self.gram - column - column[:, None] + column.mean())
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def _members(self, label: str) -> Tensor:
        index = [i for i, own in enumerate(self.adapters.labels) if own == label]
        if not index:
            known = ", ".join(sorted(set(self.adapters.labels)))
            raise InputError("class", value=label, allowed=known)
        return torch.tensor(index)

    def mean(self, label: str | None = None) -> Direction:
        """The mean change of a class, or of all adapters."""
        coefficients = torch.zeros(len(self.adapters), dtype=torch.float64)
        index = torch.arange(len(self.adapters)) if label is None else self._members(label)
        coefficients[index] = 1 / len(index)
        return Direction(f"mean of {label or 'all'}", coefficients)

    def between(self, target: str, source: str | None = None) -> Direction:
        """From the mean of `source` (of all other classes when None) to the mean of `target`.

        Raises:
            InputError: a class without adapters.
        """
        if source is None:
            others = [label for label in self.adapters.labels if label != target]
            if not others:
                raise InputError("classes", value=target, allowed="at least one more")
            away = torch.tensor([0.0 if own == target else 1 / len(others) for own in self.adapters.labels])
        else:
            away = self.mean(source).coefficients
        name = f"{source or 'the others'} to {target}"
        return Direction(name, self.mean(target).coefficients - away.double())

    def probe(self, target: str, source: str | None = None, penalty: float = 1.0) -> Direction:
        """The normal of a ridge classifier of two classes (of one against all others when `source` is None).

        The classifier works on the centred changes, `penalty` is in units of their mean square length. At t = 1 the
        score moves by the distance between the scores of the two class means.

        Raises:
            InputError: a class without adapters, or a penalty that is not above 0.
        """
        if not penalty > 0:
            raise InputError("penalty", value=penalty, allowed="above 0")
        first = self._members(target)
        second = self._members(source) if source is not None else torch.tensor(
            [i for i, own in enumerate(self.adapters.labels) if own != target]
        )  # fmt: skip
        index = torch.cat([first, second])
        inner = self.gram[index][:, index]
        column = inner.mean(0)
        centred = inner - column - column[:, None] + column.mean()
        goal = torch.cat([torch.full((len(first),), 1.0), torch.full((len(second),), -1.0)]).double()
        weight = torch.eye(len(index), dtype=torch.float64) * penalty * centred.diagonal().mean()
        dual = torch.linalg.solve(centred + weight, goal - goal.mean())
        coefficients = torch.zeros(len(self.adapters), dtype=torch.float64)
        coefficients[index] = dual - dual.mean()
        gap = self.between(target, source).coefficients
        reach = float(coefficients @ self.gram @ gap) / max(1e-300, float(coefficients @ self.gram @ coefficients))
        return Direction(f"probe of {target} against {source or 'the others'}", coefficients * reach)

    def component(self, number: int) -> Direction:
        """Principal component `number` (from 0) of the changes, one standard deviation long.

        Raises:
            InputError: there is no such component.
        """
        values, vectors = self._spectrum
        if not 0 <= number < len(values) - 1 or values[number] <= 1e-12 * values[0]:
            raise InputError("component", value=number, allowed="that of a direction in which the adapters differ")
        unit = vectors[:, number] / values[number].sqrt()
        return Direction(f"component {number}", unit * (values[number] / len(values)).sqrt())

    def random(self, seed: int, like: Direction | None = None) -> Direction:
        """A random direction in the span of the centred collection, as long as `like` (or one standard deviation)."""
        drawn = torch.randn(len(self.adapters), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        drawn -= drawn.mean()
        values = self._spectrum[0]
        wanted = self.length(like) if like is not None else float((values.sum() / len(values)).sqrt())
        made = Direction(f"random {seed}", drawn)
        return Direction(made.name, drawn * wanted / max(1e-300, self.length(made)))

    def length(self, direction: Direction) -> float:
        """The Frobenius norm of a direction, over all layers."""
        c = direction.coefficients
        return float((c @ self.gram @ c).clamp_min(0).sqrt())

    def scores(self, direction: Direction) -> Tensor:
        """Coordinates fp64 `[N]` of all adapters along a direction, in units of its length."""
        return self.gram @ direction.coefficients / max(1e-300, self.length(direction) ** 2)

    def edit(self, adapter: int, direction: Direction, t: float, *, rank: int = 4) -> Adapter:
        """Adapter number `adapter`, moved by t along a direction, as a LoRA of at most `rank`."""
        coefficients = t * direction.coefficients
        coefficients = coefficients + torch.nn.functional.one_hot(torch.tensor(adapter), len(self.adapters)).double()
        return self.combine(coefficients, rank=rank, name=f"{self.adapters.adapter(adapter).name}-edited")

    def interpolate(self, first: int, second: int, t: float, *, rank: int = 4) -> Adapter:
        """The change `(1 - t) dW_first + t dW_second`, as a LoRA of at most `rank`."""
        coefficients = torch.zeros(len(self.adapters), dtype=torch.float64)
        coefficients[first] += 1 - t
        coefficients[second] += t
        return self.combine(coefficients, rank=rank, name="interpolated")

    def sample(self, label: str, seed: int, *, components: int = 8, rank: int = 4, spread: float = 1.0) -> Adapter:
        """A new adapter of a class: its mean, and normal noise along the class's own principal components.

        Raises:
            InputError: a class of fewer than two adapters.
        """
        index = self._members(label)
        if len(index) < 2:
            raise InputError("class to sample from", value=label, allowed="at least two adapters")
        inner = self.gram[index][:, index]
        column = inner.mean(0)
        values, vectors = torch.linalg.eigh(inner - column - column[:, None] + column.mean())
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        count = min(components, len(index) - 1, int((values > 1e-12 * values[0]).sum()))
        drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        coefficients = self.mean(label).coefficients.clone()
        # Component k is vectors[:, k] / sqrt(values[k]); its standard deviation over the class sqrt(values[k] / n).
        coefficients[index] += spread * vectors[:, :count] @ drawn / len(index) ** 0.5
        return self.combine(coefficients, rank=rank, name=f"sample-{seed}-of-{label}")

    def adapter(self, direction: Direction, t: float = 1.0, *, rank: int = 4) -> Adapter:
        """t times a direction on its own, as a LoRA of at most `rank`."""
        return self.combine(t * direction.coefficients, rank=rank, name=direction.name)

    def combine(self, coefficients: Tensor, *, rank: int, name: str = "") -> Adapter:
        """`sum_i c_i dW_i`, every layer cut to its `rank` largest singular values (the best of that rank).

        Raises:
            InputError: coefficients of another number, or a rank below 1.
        """
        return combine(self.adapters, coefficients, rank=rank, name=name)


def combine(adapters: LoraSet, coefficients: Tensor, *, rank: int, name: str = "") -> Adapter:
    """See `Directions.combine`."""
    if coefficients.shape != (len(adapters),):
        raise InputError("coefficients", value=list(coefficients.shape), allowed=f"[{len(adapters)}]")
    if rank < 1:
        raise InputError("rank", value=rank, allowed="1 or more")
    used = torch.nonzero(coefficients).flatten()
    layers = {}
    for layer in adapters.layers:
        up, down, scale = adapters.factors(layer, used.numpy())
        weight = (scale.double() * coefficients[used]).view(-1, 1, 1)
        left = (up.double() * weight).permute(1, 0, 2).flatten(1)  # [out, n r]
        right = down.double().flatten(0, 1)  # [n r, in]
        layers[layer] = truncated(left, right, rank)
    return Adapter(layers, name)


def truncated(left: Tensor, right: Tensor, rank: int) -> LowRank:
    """The best approximation of `left [out, q] @ right [q, in]` of at most `rank`, its norm shared between factors."""
    if left.shape[1] < min(left.shape[0], right.shape[1]):
        a, b = torch.linalg.qr(left)
        c, d = torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(b @ d.T, full_matrices=False)
        u, vt = a @ u, vt @ c.T
    else:
        u, s, vt = torch.linalg.svd(left @ right, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank((root[:, None] * vt[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous())


def negate(adapter: Adapter) -> Adapter:
    """The adapter that undoes another one: the same changes with the sign turned round."""
    layers = {name: LowRank(it.down, -it.up, it.scale, it.kernel, it.dora) for name, it in adapter.layers.items()}
    return Adapter(layers, f"{adapter.name}-negated", adapter.format, adapter.notes)
