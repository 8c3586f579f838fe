"""Actors of Ray Core: nodes come and go, actors are started again, batches are tried again.

Every actor is a worker with a name of its own; the driver gives it batches and gives those of an actor that died to
the next one that is free. The folder of the store must be shared by the nodes.
"""

from __future__ import annotations

from collections import deque
from importlib import import_module
from typing import Any

from pysteer.errors import InputError, PysteerError
from pysteer.sweep.cells import Cell
from pysteer.sweep.driver import Launch, Show
from pysteer.sweep.plan import SweepPlan
from pysteer.sweep.store import Store
from pysteer.sweep.tasks.base import find_task
from pysteer.sweep.worker import Worker


class _Actor:
    """A worker in an actor; a restarted one takes up what its predecessor had generated."""

    def __init__(self, folder: str, task: str, name: str, threads: int) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        self.store = Store(folder)
        self.worker = Worker(self.store, find_task(task), name)
        self.worker.recover(self.store.finished(), f"{name}-")

    def run(self, cells: list[tuple[str, dict[str, Any]]], again: bool) -> int:
        """Run a batch; `again` says that another actor may have finished a part of it."""
        finished = self.store.finished() if again else set()
        left = [Cell(key, config) for key, config in cells if key not in finished]
        if left:
            self.worker.run_batch(left)
            self.worker.finish()
        return len(cells)

    def end(self) -> None:
        """Finish what is being evaluated."""
        self.worker.finish()
        self.worker.close()


def run_on_ray(store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    """Run the cells that are `left` on the cluster that Ray is connected to (RAY_ADDRESS), or on one made here.

    Raises:
        InputError: Ray is not here.
        PysteerError: a batch failed again and again with its actor.
    """
    try:
        ray = import_module("ray")
    except ModuleNotFoundError as error:
        raise InputError("launcher ray needs Ray", fix="pip install 'pysteer-core[ray]'") from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        _run(ray, store, plan, left, launch, show)
    finally:
        if own:
            ray.shutdown()


def _run(ray: Any, store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    resources = {"num_gpus": launch.gpus} if launch.gpus else {"num_cpus": launch.threads or 1}
    room = int(
        ray.cluster_resources().get("GPU" if launch.gpus else "CPU", 1) // max(1, next(iter(resources.values())))
    )
    count = max(1, min(launch.workers or room, plan.count(left)))
    kind = ray.remote(max_restarts=launch.retries, max_task_retries=0, **resources)(_Actor)
    folder = str(store.folder.resolve())
    idle = deque(kind.remote(folder, plan.task.name, f"ray{i}", launch.threads) for i in range(count))
    actors = list(idle)
    queue = ((batch, 0) for batch in plan.batches(left))
    again: deque[tuple[list[Cell], int]] = deque()
    running: dict[Any, tuple[Any, list[Cell], int]] = {}
    done = len(plan) - int(left.sum())
    while True:
        while idle:
            batch, tries = again.popleft() if again else next(queue, ([], 0))
            if not batch:
                break
            actor = idle.popleft()
            given = [(cell.key, cell.config) for cell in batch]
            running[actor.run.remote(given, tries > 0)] = (actor, batch, tries)
        if not running:
            break
        for reference in ray.wait(list(running), num_returns=1)[0]:
            actor, batch, tries = running.pop(reference)
            try:
                done += ray.get(reference)
                show(done, len(plan))
            except ray.exceptions.RayActorError as error:
                if tries >= launch.retries:
                    raise PysteerError(f"a batch failed {tries + 1} times with its actor: {error}") from error
                again.append((batch, tries + 1))
            idle.append(actor)
    ray.get([actor.end.remote() for actor in actors])
