"""A planned sweep: its cells in the order they are to run in, and what of them is left to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pysteer
from pysteer.errors import InputError
from pysteer.recipes.config import build_config
from pysteer.sweep.axes import Axis, parse_axes
from pysteer.sweep.cells import Cell, Cells, Sampling, make_cells
from pysteer.sweep.packing import batches, count_batches, in_order
from pysteer.sweep.tasks.base import Task, find_task

_CHECKED = 2000  # different settings that are looked at before any work


@dataclasses.dataclass(frozen=True)
class Options:
    """What is swept beside the words: see `make_cells`.

    Attributes:
        zipped: groups of axes that go along with each other.
        samples: points to draw along axes such as `strength=uniform(0,2)`.
        sampling: random or sobol.
        sample_seed: of the points.
        batch_size: cells per batch; 0 for that of the task.
    """

    zipped: tuple[tuple[str, ...], ...] = ()
    samples: int = 0
    sampling: Sampling = "random"
    sample_seed: int = 0
    batch_size: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise InputError("batch size", value=self.batch_size, allowed="a whole number above 0")


class SweepPlan:
    """Cells of one task, ordered for packing.

    Attributes:
        task: the task.
        cells: the cells.
        axes: what they were made of.
        order: rows of `cells` in the order they run in.
        groups: by place in `order`, which ones may share a batch.
        batch_size: cells per batch.
    """

    def __init__(self, task: Task, base: Mapping[str, Any], axes: Sequence[Axis], options: Options) -> None:
        self.task, self.axes, self.options, self.base = task, list(axes), options, dict(base)
        self.batch_size = options.batch_size or task.batch_size
        self.cells = make_cells(
            task.name, base, axes, zipped=options.zipped, samples=options.samples, sampling=options.sampling,
            sample_seed=options.sample_seed,
        )  # fmt: skip
        self._arrange()

    @classmethod
    def of_cells(cls, task: Task, cells: Cells, batch_size: int) -> SweepPlan:
        """A plan of cells that were made in another way, by an adaptive search for example."""
        plan: SweepPlan = object.__new__(cls)
        plan.task, plan.cells, plan.batch_size = task, cells, batch_size or task.batch_size
        plan.axes, plan.options, plan.base = [], Options(), cells.base
        plan._arrange()
        return plan

    def _arrange(self) -> None:
        task = self.task
        self.order, self.groups = in_order(self.cells, task.group, task.together, task.sets, task.most_sets)

    def __len__(self) -> int:
        return len(self.cells)

    def check(self) -> None:
        """Raise an `InputError` for settings that can never run; the axes that are repetitions are not combined."""
        names = [name for name in self.cells.names if name not in self.task.repeats]
        columns = [self.cells.column(name) for name in names]
        stacked = np.stack(columns, 1) if columns else np.zeros((len(self), 0), np.int32)
        _, first = np.unique(stacked, axis=0, return_index=True)
        chosen = np.sort(first)[:: max(1, len(first) // _CHECKED)]
        self.task.check([build_config(self.task.setting, self.cells.config(int(row))) for row in chosen])

    def left(self, finished: set[str]) -> NDArray[np.bool_]:
        """By place in `order`: whether the cell has no row yet."""
        keys = self.cells.keys
        if not finished:
            return np.ones(len(self), np.bool_)
        done = np.isin(keys, np.array([key.encode() for key in finished], keys.dtype))
        return ~done[self.order]

    def batches(self, left: NDArray[np.bool_]) -> Iterator[list[Cell]]:
        """Batches of the cells that are left, all full but for the last one of every group."""
        for rows in batches(self.order[left], self.groups[left], self.batch_size):
            yield [self.cells.cell(int(row)) for row in rows]

    def count(self, left: NDArray[np.bool_]) -> int:
        """How many batches that are."""
        return count_batches(self.groups[left], self.batch_size)

    def slice(self, left: NDArray[np.bool_], number: int, of: int) -> NDArray[np.bool_]:
        """The part of the order that job `number` of `of` has; it does not depend on what is finished."""
        edges = np.linspace(0, len(self), of + 1).round().astype(int)
        mine = np.zeros(len(self), np.bool_)
        mine[edges[number] : edges[number + 1]] = True
        return left & mine

    def mark(self, words: Sequence[str]) -> dict[str, Any]:
        """What the store notes of the sweep; `plan_sweep` makes the same plan of it."""
        return {
            "task": self.task.name, "pysteer": pysteer.__version__, "words": list(words), "base": self.base,
            "axes": [dataclasses.asdict(axis) for axis in self.axes], "options": dataclasses.asdict(self.options),
            "cells": len(self), "batch_size": self.batch_size, "repeats": list(self.task.repeats),
            "score": dict(self.task.score()),
        }  # fmt: skip


def plan_sweep(task_name: str, words: Sequence[str] = (), options: Options | None = None) -> SweepPlan:
    """Plan a sweep of the task from `key=value` words.

    Raises:
        InputError: anything that cannot be swept, before any work.
    """
    task = find_task(task_name)
    fields = {field.name for field in dataclasses.fields(task.setting)}
    keys = [(word.partition("=")[0].strip().lstrip("-").lower(), word) for word in words]
    own = {key: word for key, word in keys if key in task.options() and key not in fields}
    fixed, axes = parse_axes([word for key, word in keys if key not in own], task.setting)
    values = {
        **{field.name: getattr(task.setting(), field.name) for field in dataclasses.fields(task.setting)},
        **fixed,
    }
    task.prepare(values, axes, {key: word.partition("=")[2] for key, word in own.items()})
    for axis in axes:
        if any(other is not axis and other.name == axis.name for other in axes):
            raise InputError("axis given twice", value=axis.name, fix="drop one of the two")
    return SweepPlan(task, values, axes, options or Options())


def plan_of_mark(mark: Mapping[str, Any]) -> SweepPlan:
    """The plan that a store was made for."""
    task = find_task(mark["task"])
    axes = [Axis(**{**axis, "values": tuple(axis["values"])}) for axis in mark["axes"]]
    options = {**mark["options"], "zipped": tuple(tuple(group) for group in mark["options"]["zipped"])}
    return SweepPlan(task, mark["base"], axes, Options(**options))
