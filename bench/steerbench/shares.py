"""Shares of the cells, each measured by a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from bench.steerbench.cells import Cell
from pysteer.errors import PysteerError
from pysteer.processes import run_together

MOST = 8  # processes; each holds the models


def processes_here() -> int:
    """How many processes measure at once: one per core, since a cell is many small steps; one on a GPU."""
    return 1 if torch.cuda.is_available() else min(MOST, len(os.sched_getaffinity(0)))


def share_of(cells: Sequence[Cell], share: int, shares: int) -> list[Cell]:
    """The cells of one of `shares` processes.

    Those of a concept and seed share unsteered images and activations and stay together. Every process has about as
    many cells of each generator.
    """
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.generator, cell.concept, cell.seed), []).append(cell)
    counts: dict[str, list[int]] = {}
    mine = set()
    for key in sorted(groups, key=lambda key: -len(groups[key])):  # the largest first, each to who has the fewest
        own = counts.setdefault(key[0], [0] * shares)
        least = own.index(min(own))
        own[least] += len(groups[key])
        if least == share:
            mine.add(key)
    return [cell for key, group in groups.items() if key in mine for cell in group]


def run_shares(words: Sequence[str], shares: int) -> None:
    """Run `python -m bench.effect WORDS --share I/SHARES` for all shares at once, and wait for them.

    Raises:
        PysteerError: one of them failed; the cells that were measured are kept.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // shares)
    command = [sys.executable, "-m", "bench.effect", *words, "--share"]
    commands = [[*command, f"{i}/{shares}"] for i in range(shares)]
    codes = run_together(commands, [{"OMP_NUM_THREADS": str(threads)}] * shares)
    failed = [i for i, code in enumerate(codes) if code]
    if failed:
        raise PysteerError(f"share {failed[0]} of {shares} of the cells ended with code {codes[failed[0]]}")
