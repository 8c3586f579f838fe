"""What a sweep would do: cells, batches, shared work, memory and time, from a short calibration."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pysteer.recipes.config import build_config
from pysteer.recipes.progress import clock_text
from pysteer.sweep.driver import Launch
from pysteer.sweep.plan import SweepPlan
from pysteer.sweep.store import MARK, Store

_CALIBRATED = 16  # cells of the batch that is timed


@dataclass(frozen=True)
class Estimate:
    """What `--dry-run` prints.

    Attributes:
        cells, finished, batches: of the sweep; finished ones have a row already.
        batch_size: cells per batch.
        groups: models and generation settings, each loaded once.
        sets: parameter sets.
        shared: part of the model's work that common prefixes save in the batch that was timed, 0 to 1.
        seconds_per_cell: in that batch, after a first run.
        fit_seconds: of the first run beyond that: loading, and fitting what one batch needs.
        bytes: peak of this process, or of the GPU, while the batch ran.
        workers: that share the work.
    """

    cells: int
    finished: int
    batches: int
    batch_size: int
    groups: int
    sets: int
    shared: float
    seconds_per_cell: float
    fit_seconds: float
    bytes: int
    workers: int

    @property
    def seconds(self) -> float:
        """Of all cells that are left."""
        return (self.cells - self.finished) * self.seconds_per_cell / self.workers + self.fit_seconds

    def lines(self) -> Sequence[str]:
        """For people."""
        return [
            f"cells: {self.cells}, {self.finished} of them finished",
            f"batches: {self.batches} of up to {self.batch_size} cells, {self.groups} model and generation settings",
            f"parameter sets: {self.sets}",
            f"shared prefixes: {self.shared:.0%} of the model's work saved in the first batch",
            f"memory: {self.bytes / 2**30:.2f} GiB with batches of {min(self.batch_size, _CALIBRATED)}",
            f"time: {clock_text(self.seconds)}, {self.workers} workers, {self.seconds_per_cell * 1e3:.1f} ms per cell, "
            f"{clock_text(self.fit_seconds)} to load and fit; estimated from {_CALIBRATED} cells run twice",
        ]


def estimate(plan: SweepPlan, folder: Path, launch: Launch) -> Estimate:
    """Run one small batch twice in a folder that is thrown away, and reckon from that.

    Raises:
        InputError: settings that can never run.
    """
    plan.check()
    store = Store(folder)
    finished = store.finished() if (folder / MARK).is_file() else set()
    left = plan.left(finished)
    batch = next(plan.batches(left), []) or [plan.cells.cell(int(row)) for row in plan.order[:_CALIBRATED]]
    cells = list(islice(batch, _CALIBRATED))
    settings: list[Any] = [build_config(plan.task.setting, cell.config) for cell in cells]
    with tempfile.TemporaryDirectory() as nowhere:
        start = time.perf_counter()
        engine = plan.task.open(settings[0], Path(nowhere))
        engine.generate(settings)
        first = time.perf_counter() - start
        start = time.perf_counter()
        outputs = engine.generate(settings)
        engine.evaluate(settings, outputs)
        again = time.perf_counter() - start
    work, alone = outputs.work
    names = [name for name in plan.task.sets if name in plan.cells.values]
    columns = np.stack([plan.cells.column(name) for name in names], 1) if names else np.zeros((len(plan), 1))
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak()
    cores = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    workers = 1 if launch.launcher == "local" else launch.workers or cores
    return Estimate(
        cells=len(plan),
        finished=int((~left).sum()),
        batches=plan.count(left),
        batch_size=plan.batch_size,
        groups=int(plan.groups.max(initial=0)) + 1,
        sets=len(np.unique(columns, axis=0)),
        shared=1 - work / alone if alone else 0.0,
        seconds_per_cell=again / len(cells),
        fit_seconds=max(0.0, first - again),
        bytes=memory,
        workers=workers,
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
