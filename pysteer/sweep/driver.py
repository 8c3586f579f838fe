"""Running a planned sweep: what is finished stays, what is left is handed to a launcher."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pysteer.errors import InputError
from pysteer.recipes.folder import locked
from pysteer.sweep.plan import SweepPlan
from pysteer.sweep.store import MARK, Damaged, Store
from pysteer.sweep.worker import Worker

Show = Callable[[float, float | None], object]

_LAUNCHERS = {
    "local": ("local", "run_here"),
    "processes": ("processes", "run_in_processes"),
    "slurm": ("slurm", "run_on_slurm"),
    "ray": ("on_ray", "run_on_ray"),
}


@dataclasses.dataclass
class Outcome:
    """What a run of a sweep did.

    Attributes:
        cells, finished_before, ran, failed: numbers of cells.
        seconds: of this run.
        damaged: files that were set aside.
        recovered: cells that an earlier run generated and this one evaluated.
    """

    cells: int
    finished_before: int
    ran: int = 0
    failed: int = 0
    seconds: float = 0.0
    recovered: int = 0
    damaged: list[Damaged] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How cells reach workers.

    Attributes:
        launcher: local, processes, slurm or ray.
        workers: processes, jobs or actors; 0 chooses (one per GPU, or one per CPU core).
        threads: threads of torch per worker; 0 divides the cores.
        minutes: time limit of a job of SLURM.
        partition: of SLURM; "" for the default one.
        gpus: per job or actor.
        retries: how often a worker that died is started again.
        wait: whether to wait for jobs of SLURM.
    """

    launcher: str = "local"
    workers: int = 0
    threads: int = 0
    minutes: int = 60
    partition: str = ""
    gpus: int = 0
    retries: int = 2
    wait: bool = True

    def __post_init__(self) -> None:
        if self.launcher not in _LAUNCHERS:
            raise InputError("launcher", value=self.launcher, allowed=", ".join(_LAUNCHERS))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        meant = {
            "workers": ("processes", "slurm", "ray"), "minutes": ("slurm",), "partition": ("slurm",),
            "gpus": ("slurm", "ray"), "wait": ("slurm",),
        }  # fmt: skip
        for name, launchers in meant.items():
            if getattr(self, name) != defaults[name] and self.launcher not in launchers:
                fix = f"give --launcher {launchers[0]}, or leave {name} out"
                raise InputError(f"{name} with launcher {self.launcher}", value=getattr(self, name), fix=fix)
        for name in ("workers", "threads", "gpus", "retries"):
            if getattr(self, name) < 0:
                raise InputError(name, value=getattr(self, name), allowed="a whole number from 0")
        if self.minutes < 1:
            raise InputError("minutes", value=self.minutes, allowed="a whole number from 1")


def run_sweep(
    plan: SweepPlan,
    folder: str | Path,
    *,
    launch: Launch | None = None,
    words: Sequence[str] = (),
    retry_failed: bool = False,
    show: Show = lambda done, total: None,
    mark: bool = True,
) -> Outcome:
    """Run the cells of `plan` that have no row in `folder` yet. Stop it at any moment and call it again.

    Args:
        plan: the sweep.
        folder: of the store, made where it is missing.
        launch: how; in this process by default.
        words: what was asked for, kept as a note.
        retry_failed: run cells again that failed before.
        show: told `(done, total)` cells.
        mark: whether to note the plan in the store; not for a part of a search that has its own.

    Raises:
        InputError: settings that can never run, a folder of something else, or one that is in use.
        StoreFull: results could not be written.
    """
    launch = launch or Launch()
    store = Store(folder)
    if not store.path(MARK).is_file():
        plan.check()  # before there is a folder
    if mark:
        store.create(plan.mark(words))
    start = time.monotonic()
    with locked(store.folder):
        store.wait_for_workers()
        store.clean()
        damaged = store.check()
        if retry_failed:
            store.drop(store.finished() - store.finished(failed=False))
        finished = store.finished()
        known = len(plan) - int(plan.left(finished).sum())
        outcome = Outcome(len(plan), known, damaged=damaged)
        outcome.recovered = _recover(store, plan, finished)
        left = plan.left(finished)
        show(len(plan) - int(left.sum()), len(plan))
        if left.any():
            if outcome.finished_before:
                plan.check()
            _launch(store, plan, left, launch, show)
        if launch.launcher != "slurm" or launch.wait:
            store.merge("", least=8)
        _count(store, plan, outcome)
    outcome.seconds = time.monotonic() - start
    return outcome


def _recover(store: Store, plan: SweepPlan, finished: set[str]) -> int:
    if not store.pending():
        return 0
    worker = Worker(store, plan.task, "recovered", overlap=False)
    return worker.recover(finished)


def _launch(store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    place, name = _LAUNCHERS[launch.launcher]
    getattr(import_module(f"pysteer.sweep.launchers.{place}"), name)(store, plan, left, launch, show)


def _count(store: Store, plan: SweepPlan, outcome: Outcome) -> None:
    every, good = store.finished(), store.finished(failed=False)
    done = len(plan) - int(plan.left(every).sum())
    outcome.ran = done - outcome.finished_before
    outcome.failed = done - (len(plan) - int(plan.left(good).sum()))
