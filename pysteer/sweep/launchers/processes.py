"""One process per GPU, or several on the CPU. The driver hands out batches; a worker that dies is started again.

A worker holds a lock of the store while it lives. When the driver is killed, its workers notice, end, and give the lock
back; a new driver waits for that, so that no cell is ever written twice.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from pysteer.errors import PysteerError
from pysteer.sweep.cells import Cell
from pysteer.sweep.driver import Launch, Show
from pysteer.sweep.plan import SweepPlan
from pysteer.sweep.store import WORKERS_LOCK, Store
from pysteer.sweep.tasks.base import Outputs, find_task
from pysteer.sweep.worker import Generated, Worker

_PATIENCE = 60.0  # seconds for workers to end
_AHEAD = 2  # batches a worker has at a time, so that it never waits for the driver


def _work(pipe: Connection, folder: str, task: str, name: str, gpu: int | None, threads: int) -> None:
    """The life of a worker: batches in, numbers of rows out; ends when the driver does."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    import torch

    torch.set_num_threads(threads)
    parent = os.getppid()
    store = Store(folder)
    with (store.folder / WORKERS_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        worker = Worker(
            store, find_task(task), name, advance=lambda count: pipe.send(("rows", count)),
            alive=lambda: os.getppid() == parent,
        )  # fmt: skip
        try:
            worker.run(_batches(pipe, worker))
            pipe.send(("end", None))
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            return
        except PysteerError as error:
            pipe.send(("error", str(error)))


def _batches(pipe: Connection, worker: Worker) -> Iterator[list[Cell]]:
    while True:
        if not pipe.poll():
            worker.finish()  # nothing to do meanwhile: let the driver know what is finished
        while not pipe.poll(0.5):
            if not worker.alive():  # the driver was killed
                return
        given = pipe.recv()
        if given is None:
            return
        yield [Cell(key, config) for key, config in given]
        pipe.send(("batch", None))


@dataclass
class _Process:
    """A worker as the driver sees it."""

    name: str
    gpu: int | None
    process: Any = None
    pipe: Any = None
    given: deque[list[Cell]] = field(default_factory=deque)
    deaths: int = 0
    ended: bool = False


def run_in_processes(store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    """Run the cells that are `left`, bool by place in the order of the plan."""
    _Pool(store, plan, left, launch, show).run()


class _Pool:
    def __init__(self, store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
        import torch

        self.store, self.plan, self.launch, self.show = store, plan, launch, show
        self.queue = plan.batches(left)
        self.again: deque[list[Cell]] = deque()
        self.done, self.total = len(plan) - int(left.sum()), len(plan)
        gpus = torch.cuda.device_count()
        cores = len(os.sched_getaffinity(0))
        count = min(launch.workers or gpus or cores, max(1, plan.count(left)))
        self.threads = launch.threads or max(1, cores // count)
        taken = {path.name.split("-")[0] for path in store.shards()}
        names = (f"w{i}" for i in range(10**9) if f"w{i}" not in taken or i < count)
        self.workers = [_Process(next(names), i % gpus if gpus else None) for i in range(count)]
        # A test forks: thousands of workers would spend their time on importing torch.
        self.context: Any = multiprocessing.get_context(os.environ.get("PYSTEER_START_METHOD", "spawn"))

    def run(self) -> None:
        try:
            for worker in self.workers:
                self._start(worker)
            while not all(worker.ended for worker in self.workers):
                self._listen()
        except BaseException:
            for worker in self.workers:
                if worker.process is not None and worker.process.is_alive():
                    worker.process.terminate()
            raise
        finally:
            for worker in self.workers:
                if worker.process is not None:
                    worker.process.join(_PATIENCE)

    def _start(self, worker: _Process) -> None:
        ours, theirs = self.context.Pipe()
        arguments = (theirs, str(self.store.folder), self.plan.task.name, worker.name, worker.gpu, self.threads)
        worker.process = self.context.Process(target=_work, args=arguments, daemon=True)
        worker.process.start()
        theirs.close()
        worker.pipe = ours
        for _ in range(_AHEAD):
            self._give(worker)

    def _next(self) -> list[Cell] | None:
        return self.again.popleft() if self.again else next(self.queue, None)

    def _give(self, worker: _Process) -> None:
        cells = self._next()
        if cells is not None:
            worker.given.append(cells)
        try:
            worker.pipe.send(None if cells is None else [(cell.key, cell.config) for cell in cells])
        except (BrokenPipeError, OSError):
            return  # it has died: its end is seen when listening

    def _listen(self) -> None:
        watched: dict[Any, _Process] = {}
        for worker in self.workers:
            if not worker.ended:
                watched[worker.pipe] = watched[worker.process.sentinel] = worker
        for ready in wait(list(watched), timeout=1.0):
            worker = watched[ready]
            if ready is worker.pipe:
                gone = not self._hear(worker)
            else:
                gone = not worker.pipe.poll()
            if gone:
                self._bury(worker)
                return  # what else was ready may belong to the process that is gone

    def _hear(self, worker: _Process) -> bool:
        """Take in what a worker says; False where it has died."""
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return False
        if kind == "rows":
            self.done += value
            self.show(self.done, self.total)
        elif kind == "batch":
            worker.given.popleft()
            worker.deaths = 0
            self._give(worker)
        elif kind == "error":
            raise PysteerError(value)
        else:
            worker.ended = True
        return True

    def _bury(self, worker: _Process) -> None:
        """Start a worker again that has died; what it had and did not write goes to the next one that is free."""
        if worker.ended or worker.process is None:
            return
        worker.process.join(_PATIENCE)
        worker.process.kill()  # it cannot be heard any more, whatever it still does
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        self._recover(worker)
        finished = self.store.finished()
        given, worker.given = list(worker.given), deque()
        rest = [[cell for cell in cells if cell.key not in finished] for cells in given]
        worker.deaths += 1
        first = rest[0] if rest else []
        if worker.deaths > self.launch.retries and first:
            self._divide(worker, first, code)
            rest = rest[1:]
        self.again.extendleft(cells for cells in reversed(rest) if cells)
        self.done = self.total - int(self.plan.left(self.store.finished()).sum())
        self._start(worker)

    def _divide(self, worker: _Process, cells: list[Cell], code: int | None) -> None:
        """A batch that killed its worker again and again: each half on its own; a single cell has failed."""
        worker.deaths = self.launch.retries  # the next death in a row divides again
        if len(cells) == 1:
            reason = f"the worker died {worker.deaths + 1} times, last with exit code {code}"
            self._writer(worker.name).write_rows(Generated(cells, Outputs(failed={0: reason}), 0.0))
            return
        middle = (len(cells) + 1) // 2
        self.again.extendleft([cells[middle:], cells[:middle]])

    def _writer(self, name: str) -> Worker:
        return Worker(self.store, self.plan.task, f"{name}.driver", overlap=False)

    def _recover(self, worker: _Process) -> None:
        """Evaluate what the dead worker had generated."""
        if self.store.pending(f"{worker.name}-"):
            self._writer(worker.name).recover(self.store.finished(), f"{worker.name}-")
