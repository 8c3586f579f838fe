"""Jobs of SLURM through submitit: one array, in which every job has a fixed part of the cells.

A job that reaches its time limit or is preempted gets a signal before; submitit then submits it again, and it goes on
with what is left of its part. Without SLURM, submitit's local executor runs the same jobs as processes
(PYSTEER_SUBMITIT_CLUSTER=local), which is how they are tried out.
"""

from __future__ import annotations

import os
import time
from typing import Any

from pysteer import files
from pysteer.errors import InputError, PysteerError
from pysteer.sweep.driver import Launch, Show
from pysteer.sweep.plan import SweepPlan, plan_of_mark
from pysteer.sweep.store import Store
from pysteer.sweep.worker import Worker

_JOBS = "jobs.json"
_EVERY = 5.0  # seconds between two looks at the jobs
_MOST_JOBS = 1000  # of an array, the usual limit of clusters


class Slice:
    """What a job runs: part `number` of `of`. submitit keeps it in a file and calls it on the node."""

    def __init__(self, folder: str, number: int, of: int, threads: int) -> None:
        self.folder, self.number, self.of, self.threads = folder, number, of, threads

    def __call__(self) -> int:
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)
        store = Store(self.folder)
        plan = plan_of_mark(store.mark())
        name = f"job{self.number:04d}"
        worker = Worker(store, plan.task, name)
        finished = store.finished()
        worker.recover(finished, f"{name}-")
        worker.run(plan.batches(plan.slice(plan.left(finished), self.number, self.of)))
        return worker.done

    def checkpoint(self) -> Any:
        """What submitit submits again after a time limit or a preemption: the same; finished cells are skipped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    """Submit the cells that are `left`, and wait for the jobs unless told not to.

    Raises:
        InputError: submitit or SLURM is not here, or jobs of an earlier start are still there.
        PysteerError: jobs failed.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError("launcher slurm needs submitit", fix="pip install 'pysteer-core[slurm]'") from error
    cluster = os.environ.get("PYSTEER_SUBMITIT_CLUSTER", "slurm")
    _refuse_running(store, cluster)
    count = min(launch.workers or 8, max(1, plan.count(left)), _MOST_JOBS)
    jobs = _submit(submitit, cluster, store, count, launch)
    files.write_json(store.path(_JOBS), {"cluster": cluster, "jobs": [job.job_id for job in jobs]})
    if launch.wait:
        _wait(jobs, store, plan, show)


def _submit(submitit: Any, cluster: str, store: Store, count: int, launch: Launch) -> list[Any]:
    try:
        executor = submitit.AutoExecutor(folder=str(store.path("jobs")), cluster=cluster)
    except RuntimeError as error:
        raise InputError(f"launcher slurm ({error})", value=cluster, fix="use --launcher processes here") from error
    more: dict[str, Any] = {"slurm_partition": launch.partition} if launch.partition else {}
    executor.update_parameters(
        timeout_min=launch.minutes, cpus_per_task=launch.threads or 1, name=store.folder.name,
        gpus_per_node=launch.gpus,
        **(more if cluster == "slurm" else {}),
    )  # fmt: skip
    folder = str(store.folder.resolve())
    with executor.batch():
        return [executor.submit(Slice(folder, i, count, launch.threads)) for i in range(count)]


def _refuse_running(store: Store, cluster: str) -> None:
    """Two jobs must not have the same part."""
    path = store.path(_JOBS)
    if not path.is_file():
        return
    before = files.read_json(path, "jobs of the sweep")
    running = [job for job in before["jobs"] if _is_running(store, before["cluster"], job)]
    if running:
        raise InputError(
            "jobs of an earlier start are still there", value=", ".join(running), fix="wait, or cancel them"
        )


def _is_running(store: Store, cluster: str, job: str) -> bool:
    import submitit

    kind = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    try:
        return not kind(folder=str(store.path("jobs")), job_id=job).done()
    except Exception:  # a cluster that has forgotten the job
        return False


def _wait(jobs: list[Any], store: Store, plan: SweepPlan, show: Show) -> None:
    while not all(job.done() for job in jobs):
        show(len(plan) - int(plan.left(store.finished()).sum()), len(plan))
        time.sleep(_EVERY if len(plan) > 1000 else 0.5)
    show(len(plan) - int(plan.left(store.finished()).sum()), len(plan))
    broken = []
    for job in jobs:
        error = job.exception()
        if error is not None:
            broken.append(f"{job.job_id}: {' '.join(str(error).split())[-300:]}")
    if broken:
        raise PysteerError(
            f"{len(broken)} of {len(jobs)} jobs failed; the first one {broken[0]}; fix: run the sweep again"
        )
