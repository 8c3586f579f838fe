"""A million cells: planned, packed and hashed, then a million rows asked.

python -m bench.sweep_size --store      # measures and keeps the result
python -m bench.sweep_size --table      # prints what is kept
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import append, machine, stored
from pysteer.sweep import Options, SweepPlan, plan_sweep, query
from pysteer.sweep.store import Store

WORDS = [
    "pair=red->blue", "strength=linspace(0,2,100)", "step=0,1,2,3,4", "seed=range(25)", "cfg=1,2,3,4", "prompts=20",
]  # fmt: skip
QUESTION = "SELECT strength, avg(target::INT), avg(change) FROM cells GROUP BY 1 ORDER BY 2 DESC LIMIT 5"
_SHARD = 62_500  # rows, as merging leaves them


@contextmanager
def clock(found: dict[str, Any], name: str) -> Iterator[None]:
    """Note seconds and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found[f"{name}_seconds"], found[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def fill(store: Store, plan: SweepPlan) -> None:
    """Rows for all cells, with random measures."""
    import pyarrow as pa

    rng, cells = np.random.default_rng(0), plan.cells
    for start in range(0, len(plan), _SHARD):
        part = slice(start, start + _SHARD)
        keys = pa.array([key.decode() for key in cells.keys[part]])
        columns: dict[str, Any] = {"key": keys, "status": pa.array(["ok"] * len(keys)), "image": keys}
        for name in cells.names:
            columns[name] = pa.array(cells.values[name]).take(pa.array(cells.column(name)[part]))
        columns["target"] = pa.array(rng.random(len(keys)) < 0.5)
        columns |= {name: pa.array(rng.random(len(keys))) for name in ("change", "distance", "seconds")}
        store.write("w0", pa.table(columns))


def measure() -> dict[str, Any]:
    """Plan, fill, ask."""
    found: dict[str, Any] = {}
    with clock(found, "plan"):
        plan = plan_sweep("images", WORDS, Options())
        left = plan.left(set())
        found["batches"] = plan.count(left)
        next(plan.batches(left))
    found["cells"] = len(plan)
    found["plan_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "million")
        store.create(plan.mark(WORDS))
        fill(store, plan)
        query(QUESTION, [store.folder])
        with clock(found, "query"):
            query(QUESTION, [store.folder])
    return found


def table(found: dict[str, Any]) -> str:
    """The result in a sentence."""
    cells = f"{found['cells']:,}"
    plan = f"{found['plan_cpu']:.1f} processor seconds ({found['plan_seconds']:.1f} s by the clock)"
    asked = f"{found['query_cpu']:.2f} processor seconds ({found['query_seconds']:.2f} s by the clock)"
    return (
        f"{cells} cells are planned into {found['batches']:,} batches in {plan} with {found['plan_gib']:.2f} GiB, "
        f"everything that is imported included; a question about {cells} rows, each shard checked, takes {asked}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep the result")
    parser.add_argument("--table", action="store_true", help="print the last kept result, measure nothing")
    given = parser.parse_args()
    if given.table:
        print(table(stored("sweep_size")[-1]["sweep_size"]))
        return
    found = measure()
    print(table(found))
    if given.store:
        print(append("sweep_size", {**machine(), "sweep_size": found}))


if __name__ == "__main__":
    main()
