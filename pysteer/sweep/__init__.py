"""Sweeps: settings as rows of full batches, shared prefixes, launchers, and a store that survives.

plan = plan_sweep("images", ["pair=red->blue", "method=prototype:clusters=64", "strength=0,0.5,1", "prompts=8"])
run_sweep(plan, "results/blue")
for row in results("results/blue").rows:
    print(row.setting, row.target, row.damage)
"""

import importlib
from typing import TYPE_CHECKING, Any

# Reading results needs no torch; what runs sweeps is imported when it is asked for.
from pysteer.sweep.query import Results, query, results
from pysteer.sweep.status import Status, status

if TYPE_CHECKING:
    from pysteer.sweep.driver import Launch, Outcome, run_sweep
    from pysteer.sweep.plan import Options, SweepPlan, plan_sweep
    from pysteer.sweep.tasks.base import Engine, Outputs, Task, find_task

_HOMES = {
    "driver": ("Launch", "Outcome", "run_sweep"),
    "plan": ("Options", "SweepPlan", "plan_sweep"),
    "tasks.base": ("Engine", "Outputs", "Task", "find_task"),
}

__all__ = [
    "Engine",
    "Launch",
    "Options",
    "Outcome",
    "Outputs",
    "Results",
    "Status",
    "SweepPlan",
    "Task",
    "find_task",
    "plan_sweep",
    "query",
    "results",
    "run_sweep",
    "status",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
