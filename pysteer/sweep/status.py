"""How far a sweep is, read from its store alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer.recipes.progress import clock_text, rate_text
from pysteer.sweep.store import Store

_SILENT = 120.0  # seconds after which a worker that said nothing is taken for gone


@dataclass
class Status:
    """Cells and workers of a sweep.

    Attributes:
        name, task: of the sweep.
        cells: planned; done, failed: with a row.
        pending: batches that are generated and not evaluated.
        damaged: files in quarantine.
        workers: name -> what it noted, with `silent` where it has said nothing for long while running.
        rate: cells per second of the workers that are running.
    """

    name: str
    task: str
    cells: int
    done: int
    failed: int
    pending: int
    damaged: list[str]
    workers: dict[str, dict[str, Any]]
    rate: float

    @property
    def left(self) -> float | None:
        """Seconds left at the present rate, None where nobody is running."""
        return (self.cells - self.done) / self.rate if self.rate > 0 else None

    def lines(self) -> Sequence[str]:
        """For people."""
        head = f"{self.name} ({self.task}): {self.done}/{self.cells} cells"
        parts = [head, f"{self.failed} failed"] if self.failed else [head]
        if self.rate and self.done < self.cells:
            parts += [rate_text(self.rate, 1.0), f"{clock_text(self.left or 0.0)} left"]
        lines = [", ".join(parts)]
        if self.pending:
            lines.append(f"  {self.pending} batches generated, not evaluated yet")
        for name, state in self.workers.items():
            said = "silent" if state["silent"] else state["state"]
            rate = rate_text(state["rate"], 1.0)
            lines.append(
                f"  {name:12} {said:8} {state['done']} cells, {state['failed']} failed, {rate}, on {state['host']}"
            )
        lines += [f"  set aside: {name}" for name in self.damaged]
        return lines


def status(folder: str | Path) -> Status:
    """How far the sweep in `folder` is; reads files, changes none.

    Raises:
        InputError: no sweep is here.
    """
    store, now = Store(folder), time.time()
    mark = store.mark()
    done = failed = 0
    for table in store.read(["status"]):
        done += table.num_rows
        failed += sum(value == "failed" for value in table["status"].to_pylist())
    workers = store.workers()
    for state in workers.values():
        state["silent"] = state["state"] == "running" and now - state["updated"] > _SILENT
    rate = sum(s["rate"] for s in workers.values() if s["state"] == "running" and not s["silent"])
    damaged = [f"{each.name}: {each.reason}" for each in store.quarantined()]
    return Status(
        Path(folder).name, mark["task"], int(mark["cells"]), done, failed, len(store.pending()), damaged, workers, rate
    )
