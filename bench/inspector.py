"""How quickly the inspector answers over 10^5 cells of a sweep.

python -m bench.inspector            prints and stores the times
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from bench.record import append, machine

CELLS, STRENGTHS, SEEDS, ROUNDS = 100_000, 20, 50, 9
PAGES = {
    "first page": "/",
    "grid": "/grid?run=sweep&x=strength&y=seed",
    "grid, filtered": "/grid?run=sweep&x=strength&y=seed&f.method=prototype",
    "grid, scrolled": "/grid?run=sweep&x=strength&y=seed&from_y=20",
    "curves": "/curves?run=sweep&x=strength&y=target&by=method",
    "rows, searched and sorted": "/rows?run=sweep&q=prompt+17&sort=-change",
}


def write_cells(folder: Path) -> None:
    """A sweep of `CELLS` cells in 20 shards; its images are 20 files, so that the rows are what counts."""
    import torch

    from pysteer.sweep.rows import table_of
    from pysteer.sweep.store import Store

    store = Store(folder)
    store.create({"task": "images"})
    names = store.put_images([torch.full((64, 64, 3), 10 * i, dtype=torch.uint8) for i in range(STRENGTHS)])
    kinds = {"key": "string", "strength": "double", "change": "double"}
    for first in range(0, CELLS, CELLS // 20):
        rows = [
            {
                "key": f"{i:032x}", "status": "ok", "image": names[i % STRENGTHS], "method": ("prototype",
                "mean_difference")[i // STRENGTHS % 2], "strength": i % STRENGTHS / 10, "seed": i // 40 % SEEDS,
                "prompt": f"prompt {i // 2000}", "target": i * 7919 % 20 < i % STRENGTHS, "change": i * 31 % 997 / 997,
            }
            for i in range(first, first + CELLS // 20)
        ]  # fmt: skip
        store.write("w0", table_of(rows, kinds))


def start_seconds(root: Path) -> float:
    """From the command to the first page, in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pysteer.cli", "inspect", str(root), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            urllib.request.urlopen(address, timeout=60).read()
            return time.perf_counter() - start
        finally:
            process.terminate()


def page_seconds(root: Path) -> dict[str, list[float]]:
    """Times of every page, the first request (which reads the shards) apart."""
    from pysteer.app.server import serve_in_background

    address = serve_in_background(root)
    times: dict[str, list[float]] = {}
    for name, path in PAGES.items():
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            urllib.request.urlopen(address + path, timeout=120).read()
            times.setdefault(name, []).append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_cells(root / "sweep")
        started = [start_seconds(root) for _ in range(3)]
        times = page_seconds(root)
    rows = [{"what": "command to first page", "first s": min(started), "median s": statistics.median(started)}]
    rows += [{"what": n, "first s": t[0], "median s": statistics.median(t[1:])} for n, t in times.items()]
    for row in rows:
        print(f"{row['what']:28} first {row['first s']:.3f} s  then {row['median s']:.3f} s")
    if not asked.dry_run:
        append("inspector", {"cells": CELLS, "rows": rows, **machine()})


if __name__ == "__main__":
    main()
