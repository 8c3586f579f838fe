"""Packing: cells of one model become rows of full batches, in an order that keeps rows that begin alike together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysteer.sweep.cells import Cells

Rows = NDArray[np.int64]


def _ranks(cells: Cells, names: Sequence[str]) -> NDArray[np.int64]:
    """A number per cell that is equal where the fields `names` are."""
    number = np.zeros(len(cells), np.int64)
    for name in names:
        if name in cells.values:
            number = number * len(cells.values[name]) + cells.column(name)
    return number


def in_order(
    cells: Cells, group: Sequence[str], together: Sequence[str], sets: Sequence[str], most_sets: int
) -> tuple[Rows, NDArray[np.int64]]:
    """All cells in the order they are to run in, and a number per cell in that order: equal ones may share a batch.

    Args:
        cells: the cells.
        group: fields that have to agree within a batch (model, guidance, number of steps).
        together: fields that rows which begin alike agree in (prompt, seed), the most important one first.
        sets: fields that choose a parameter set.
        most_sets: parameter sets that a bank has room for.
    """
    groups, chosen = _ranks(cells, group), _ranks(cells, sets)
    _, place = np.unique(chosen, return_inverse=True)
    part = place.reshape(-1) // max(1, most_sets)
    alike = [_ranks(cells, [name]) for name in together]
    rest = [cells.column(name) for name in cells.names]
    keys: list[NDArray[Any]] = [groups, part, *alike, place.reshape(-1), *rest]
    order = np.lexsort(keys[::-1])
    _, number = np.unique(np.stack([groups[order], part[order]], 1), axis=0, return_inverse=True)
    return order.astype(np.int64), number.reshape(-1)


def batches(order: Rows, groups: NDArray[np.int64], size: int) -> Iterator[Rows]:
    """Batches of at most `size` cells; only the last one of a group is smaller."""
    ends = np.flatnonzero(np.diff(groups)) + 1
    for part in np.split(order, ends) if len(order) else []:
        for start in range(0, len(part), size):
            yield part[start : start + size]


def count_batches(groups: NDArray[np.int64], size: int) -> int:
    """How many batches there will be."""
    if not len(groups):
        return 0
    _, counts = np.unique(groups, return_counts=True)
    return int((-(-counts // size)).sum())
