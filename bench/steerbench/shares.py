"""Shares of the cells, each measured by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.steerbench.cells import Cell
from pysteer.errors import PysteerError

MOST = 8  # processes; each holds the models


def processes_here() -> int:
    """How many processes measure at once: one per core, since a cell is many small steps; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(MOST, len(os.sched_getaffinity(0)))


def share_of(cells: Sequence[Cell], share: int, shares: int) -> list[Cell]:
    """The cells of one of `shares` processes; those of a concept and seed share unsteered images and stay together."""
    groups = list(dict.fromkeys((cell.generator, cell.concept, cell.seed) for cell in cells))
    mine = set(groups[share::shares])
    return [cell for cell in cells if (cell.generator, cell.concept, cell.seed) in mine]


def run_shares(words: Sequence[str], shares: int) -> None:
    """Run `python -m bench.effect WORDS --share I/SHARES` for all shares at once, and wait for them.

    Raises:
        PysteerError: one of them failed; the others are ended then, and keep the cells they measured.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // shares)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.effect", *words]
    children = [subprocess.Popen([*command, "--share", f"{i}/{shares}"], env=environment) for i in range(shares)]
    try:
        while (codes := [child.poll() for child in children]) != [0] * shares:
            failed = [i for i, code in enumerate(codes) if code]
            if failed:
                raise PysteerError(f"share {failed[0]} of {shares} of the cells ended with code {codes[failed[0]]}")
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait()
