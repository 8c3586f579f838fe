"""SteerBench: what steering achieves, method by method, on bundled generators and a language model.

    python -m bench.effect                 everything, added to bench/results/effect.json
    pysteer bench effect --quick
    pysteer bench effect --generator infinity-shapes --concept shape --method prototype:clusters=64@text

Every method is fitted on the same examples and gets the same number of strengths, searched on prompts of their own by
one rule; what is reported are fresh prompts. Cells are shared out over processes. A cell that was measured is not
measured again when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.record import RESULTS, append, machine, stored
from bench.steerbench.board import board_of, conclusions, figure, table
from bench.steerbench.cells import QUICK, QUICK_SUITE, SUITE, Cell, Sizes, cells_of
from bench.steerbench.shares import processes_here, run_shares, share_of
from pysteer.files import read_json, write_json

FOLDER = Path("results/steerbench")
FIGURE = RESULTS.parent.parent / "docs/steerbench.svg"


def bench_for(generator: str, sizes: Sizes) -> Any:
    """What measures the cells of a generator."""
    from bench.steerbench.images import ImageBench
    from bench.steerbench.texts import TextBench
    from pysteer.models.language import LanguageModel
    from pysteer.models.load import load_model

    model = load_model(generator)
    return TextBench(model, sizes) if isinstance(model, LanguageModel) else ImageBench(generator, model, sizes)


@torch.no_grad()
def measure_all(cells: list[Cell], sizes: Sizes, folder: Path, limit: float = 0.0) -> list[dict[str, Any]]:
    """Cells with what was measured; those that are in `folder` already are read.

    Args:
        cells: what to measure, generator by generator.
        sizes: how much.
        folder: a file per cell.
        limit: seconds after which no further cell is begun, those that were measured are read still; 0 for none.
    """
    results, bench, current, left, new = [], None, "", 0, 0
    start = time.monotonic()
    for number, cell in enumerate(cells):
        kept = folder / f"{cell.key}.json"
        if not kept.is_file():
            if limit and time.monotonic() - start > limit:
                left += 1
                continue
            if bench is None or cell.generator != current:
                bench, current = bench_for(cell.generator, sizes), cell.generator
            before = time.monotonic()
            random.seed(cell.seed)
            measured = bench.measure(cell)
            measured["seconds"] = round(time.monotonic() - before, 2)
            write_json(kept, measured)
            new += 1
            minutes = (time.monotonic() - start) / new * (len(cells) - number - 1) / 60
            done = f"{number + 1}/{len(cells)}, about {minutes:.0f} min left,"
            reached = measured.get("target", [])
            share = f"{sum(reached)}/{len(reached)}" if reached else measured.get("left_out", "")
            print(f"{done} {cell.key}: {share} in {measured['seconds']} s", file=sys.stderr, flush=True)
        results.append({**dataclasses.asdict(cell), "measured": read_json(kept, "measured cell")})
    if left:
        print(f"{left} cells left for the next start", file=sys.stderr)
    return results


def place_of(folder: Path, quick: bool) -> Path:
    """Where the cells of a suite are kept."""
    return folder / ("quick" if quick else "full")


def run_effect(
    suite: dict[str, Any],
    sizes: Sizes,
    folder: Path,
    *,
    quick: bool,
    store: bool = True,
    limit: float = 0.0,
    began: float | None = None,
) -> dict[str, Any]:
    """Measure a suite and keep its leaderboard; `began` is when all of it did, on the monotonic clock, if in one go."""
    cells = cells_of(suite, sizes)
    results = measure_all(cells, sizes, place_of(folder, quick), limit)
    rows = board_of(results)
    result = {
        "quick": quick, "sizes": dataclasses.asdict(sizes), "cells": len(results), "planned": len(cells),
        "seconds": round(sum(one["measured"]["seconds"] for one in results), 1), "rows": rows,
        "conclusions": conclusions(rows, sizes.pairs), **machine(),
    }  # fmt: skip
    if began is not None:
        result["minutes"] = round((time.monotonic() - began) / 60, 1)
    if store:
        append("effect", json.loads(json.dumps(result)))
    return result


def report(result: dict[str, Any]) -> str:
    """The leaderboard with what may be concluded from it."""
    from bench.speed_table import where_of

    sizes = result["sizes"]
    told = (
        f"{result['cells']} of {result['planned']} cells, up to {sizes['seeds']} seeds, {sizes['prompts']} fresh "
        f"prompts each, {sizes['search']} for the search of the strength; "
        "intervals by bootstrap over seeds and prompts."
    )
    kinds = dict.fromkeys(f"{row['generator']} in {row['dtype']}" for row in result["rows"] if "dtype" in row)
    told += f" {', '.join(kinds)}, which decides over single words." if kinds else ""
    told += f" Measured in one go in {result['minutes']} minutes." if "minutes" in result else ""
    listed = [f"- {text}" for text in result["conclusions"]]
    return "\n".join([table(result["rows"]), "", told, "", *listed, "", where_of(result) + "."])


def newest(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest full result, or the newest quick one."""
    full = [one for one in results if not one.get("quick")]
    return (full or results)[-1]


def main(words: list[str] | None = None) -> None:
    """Measure, store, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and prompts: shows that it works")
    parser.add_argument("--generator", action="append", help="only this one; a folder or name may be new")
    parser.add_argument("--concept", action="append", help="only this one")
    parser.add_argument(
        "--method", action="append", help="NAME:option=value@PLACE in place of the methods of the suite"
    )
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further cell is begun")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for resuming")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    parser.add_argument("--processes", type=int, default=processes_here(), help="that measure at once")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # I/N: what one of N processes measures
    given = sys.argv[1:] if words is None else words
    asked = parser.parse_args(given)
    suite = dict(QUICK_SUITE if asked.quick else SUITE)
    for name in asked.generator or ():
        suite.setdefault(name, (("shape", "colour"), SUITE["infinity-shapes"][1]))
    chosen = {
        name: (tuple(asked.concept or concepts), tuple(asked.method or methods))
        for name, (concepts, methods) in suite.items()
        if not asked.generator or name in asked.generator
    }
    sizes, folder = QUICK if asked.quick else Sizes(), asked.folder.resolve()
    if asked.share:
        share, shares = (int(part) for part in asked.share.split("/"))
        measure_all(share_of(cells_of(chosen, sizes), share, shares), sizes, place_of(folder, asked.quick), asked.limit)
        return
    limit, began = asked.limit, time.monotonic()
    resumed = any(place_of(folder, asked.quick).glob("*.json"))
    if asked.processes > 1:
        run_shares(given, asked.processes)
        limit = -1.0 if limit else 0.0  # what the processes did not begin is not begun here either
    result = run_effect(
        chosen, sizes, folder, quick=asked.quick, limit=limit, store=not asked.dry_run, began=None if resumed else began
    )
    print(report(result))
    if not asked.dry_run:
        print(figure(newest(stored("effect"))["rows"], newest(stored("effect"))["sizes"]["pairs"], FIGURE))


if __name__ == "__main__":
    main()
