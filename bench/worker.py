"""The process of one contender of ours: forked from one that has imported what contenders need, see `bench.contest`."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from bench.serving import serve


def work(module: str, kind: str, folder: Path, threads: int, log: Path, pipes: tuple[Connection, Connection]) -> None:
    """Serve the works of a module.

    Args:
        module: `bench.works.*`, whose `prepare` makes a piece of work.
        kind: how it steers, for `prepare`.
        folder: of the case.
        threads: of torch and OpenMP.
        log: gets what is printed and what goes wrong.
        pipes: commands come from the first, answers go to the second.
    """
    os.environ.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
    for place, end in enumerate(pipes):
        os.dup2(end.fileno(), place)
        end.close()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    serve(partial(importlib.import_module(module).prepare, kind, folder))
