"""In this process, one batch after the other."""

from __future__ import annotations

from typing import Any

from pysteer.sweep.driver import Launch, Show
from pysteer.sweep.plan import SweepPlan
from pysteer.sweep.store import Store
from pysteer.sweep.worker import Worker


def run_here(store: Store, plan: SweepPlan, left: Any, launch: Launch, show: Show) -> None:
    """Run the cells that are `left`, bool by place in the order of the plan."""
    done, total = len(plan) - int(left.sum()), len(plan)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        show(done, total)

    if launch.threads:
        import torch

        torch.set_num_threads(launch.threads)
    Worker(store, plan.task, "local", advance=advance).run(plan.batches(left))
