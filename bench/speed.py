"""What steering costs: pysteer against the plain model, hooks, torch.compile, and the ways and packages of others.

    python -m bench.speed                          all parts, added to bench/results/speed.json
    python -m bench.speed --part language --quick
    pysteer bench speed --profile traces           the same command, with a trace per contender
    pysteer bench speed --part unet --patience 60  one part with more rounds

Every contender of a part is a process of its own; all take turns, round after round in alternating order, on one thread
each, and ratios are taken within a round; rounds end after `--patience` seconds. Of what the process computes the CPU
time is taken, so that other programs count little. A contender whose output is not that of the plain formulas gets no
time. A part that was finished is not measured again when the same command is given again.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contest import PATIENCE, ROOT, Entry, contest, running
from bench.record import append, machine
from pysteer.files import read_json, write_json

LANGUAGE, INFINITY, UNET = "bench.works.language", "bench.works.infinity", "bench.works.unet"
AUTOENCODER = "bench.works.autoencoder"
BASE, BASE_EAGER = "unsteered, compiled", "unsteered, eager"
FOLDER = Path("results/bench-speed")
# What the design asks for and only a GPU can show. It is listed so that nobody takes silence for a figure.
ON_A_GPU = (
    "Llama-8B shape: read, and decode at batch 1, 8, 64",
    "Infinity-2B shape, all layers and scales",
    "SDXL and FLUX shapes, every block",
    "64 strengths against the sequential reference",
)


@dataclass(frozen=True)
class Part:
    """Contenders with their pieces of work.

    Attributes:
        works: names; quick: those of a quick run.
        entries: contenders; the plain model and the plain formulas first, both eager.
        base: whom ratios are taken to.
        layers: layers of the language model in a quick run.
        case: module that writes what all contenders read, packages of others too.
    """

    works: tuple[str, ...]
    quick: tuple[str, ...]
    entries: tuple[Entry, ...]
    base: str = BASE
    layers: int | None = None
    case: str = ""


def _entries(module: str, prefix: str, full: tuple[str, ...], others: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The contenders that every part has, and those of this one; in the works `full` (all, if there are none) the plain
    model takes part twice, to show how much two processes differ that do the same."""
    return (
        Entry(BASE_EAGER, module, f"{prefix}unsteered eager", steers=False),
        Entry("plain hooks, eager", module, f"{prefix}hooks eager"),
        Entry(BASE, module, f"{prefix}unsteered compiled", steers=False),
        Entry("pysteer, compiled", module, f"{prefix}pysteer compiled", ours=True),
        Entry("pysteer, eager", module, f"{prefix}pysteer eager", ours=True),
        *others,
        Entry(f"{BASE}, again", module, f"{prefix}unsteered compiled", steers=False, works=full),
    )


def _both(name: str, module: str, kind: str, compiled: tuple[str, ...] = ()) -> tuple[Entry, ...]:
    """A way eager, and compiled for the works `compiled`, for all if there are none."""
    return (
        Entry(f"{name}, eager", module, f"{kind} eager"),
        Entry(f"{name}, compiled", module, f"{kind} compiled", works=compiled),
    )


# Works that everything compiled takes part in: compiling 30 layers takes a minute per contender and work.
_FULL = {
    "language": ("decode,-batch-8",),
    "language-maps": ("5-layers,-decode,-batch-8", "decode,-batch-8"),
    "infinity": ("images,-batch-16", "images,-batch-4"),
}
_PACKAGES = (
    Entry("package repeng", "package_repeng", package="repeng"),
    Entry("package steering-vectors", "package_steering_vectors", package="steering-vectors"),
)
_SWEEPS = ("sweep-of-11-strengths", "sweep-of-64-strengths")
PARTS = {
    "language": Part(
        ("read-128-tokens", "decode,-batch-1", "decode,-batch-8", "decode,-batch-64"),
        ("decode,-batch-8",),
        _entries(
            LANGUAGE,
            "blocks/",
            _FULL["language"],
            (
                Entry("plain hooks, compiled", LANGUAGE, "blocks/hooks compiled", works=_FULL["language"]),
                Entry("our reference, compiled", LANGUAGE, "blocks/reference compiled", works=_FULL["language"]),
                *_both("repeng's way", LANGUAGE, "blocks/repeng", _FULL["language"]),
                *_PACKAGES,
            ),
        ),
        layers=2,
        case=LANGUAGE,
    ),
    "language-maps": Part(
        ("5-layers,-read-128-tokens", "5-layers,-decode,-batch-8"),
        ("decode,-batch-8",),
        _entries(
            LANGUAGE,
            "norms/",
            _FULL["language-maps"],
            (
                Entry("our reference, compiled", LANGUAGE, "norms/reference compiled", works=_FULL["language-maps"]),
                *_both("ml-act's way, linear", LANGUAGE, "norms/linear-act", _FULL["language-maps"]),
                *_both("ml-act's way, Gaussian", LANGUAGE, "norms/gaussian-act", _FULL["language-maps"]),
            ),
        ),
        layers=2,
        case=LANGUAGE,
    ),
    "sweep": Part(
        _SWEEPS,
        _SWEEPS[:1],
        (
            Entry(BASE_EAGER, LANGUAGE, "blocks/unsteered eager", steers=False),
            Entry("plain hooks, eager", LANGUAGE, "blocks/hooks eager"),
            Entry("pysteer, eager", LANGUAGE, "blocks/pysteer eager", ours=True),
            Entry("repeng's way, eager", LANGUAGE, "blocks/repeng eager", works=_SWEEPS[:1]),
            *_PACKAGES,
        ),
        base="plain hooks, eager",
        layers=2,
        case=LANGUAGE,
    ),
    "autoencoder": Part(
        ("reconstruct,-128-tokens", "reconstruct,-512-tokens"),
        ("reconstruct,-128-tokens",),
        (
            Entry("the activation itself", AUTOENCODER, "unsteered eager", steers=False),
            Entry("plain formulas, eager", AUTOENCODER, "plain eager"),
            Entry("plain formulas, compiled", AUTOENCODER, "plain compiled"),
            Entry("pysteer, eager", AUTOENCODER, "pysteer eager", ours=True),
            Entry("package sae-lens", "package_sae_lens", package="sae-lens"),
            Entry("package eai-sparsify", "package_sparsify", package="eai-sparsify"),
        ),
        base="plain formulas, eager",
        case=AUTOENCODER,
    ),
    "infinity": Part(
        ("images,-batch-1", "images,-batch-16"),
        ("images,-batch-4",),
        _entries(
            INFINITY,
            "",
            _FULL["infinity"],
            (
                Entry("our reference, compiled", INFINITY, "reference compiled", works=_FULL["infinity"]),
                *_both("the Infinity wrapper's way", INFINITY, "wrapper", _FULL["infinity"]),
            ),
        ),
    ),
    "unet": Part(
        ("unet,-all-sites,-batch-4",),
        ("unet,-all-sites,-batch-2",),
        _entries(UNET, "", (), (Entry("plain hooks, compiled", UNET, "hooks compiled"),)),
    ),
    "unlearning": Part(
        ("unet,-autoencoder,-batch-4",),
        ("unet,-autoencoder,-batch-2",),
        _entries(UNET, "", (), (Entry("SAeUron's way, compiled", UNET, "hooks compiled"),)),
    ),
}
Say = Callable[[str], None]


def _shout(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _case(part: Part, folder: Path, quick: bool) -> Path:
    """The folder of a part, with what its contenders read: a case is shared by the parts that have the same."""
    if not part.case:
        return folder / part.entries[0].module.rpartition(".")[2]
    case = folder / f"case-{part.case.rpartition('.')[2]}"
    importlib.import_module(part.case).write_case(case, part.layers if quick else None)
    return case


def measure_part(
    name: str, folder: Path, *, quick: bool, rounds: int, patience: float = PATIENCE, profile: Path | None = None,
    say: Say = _shout,
) -> dict[str, Any]:  # fmt: skip
    """All works of a part; those whose rows are in `folder` already are not measured again."""
    part = PARTS[name]
    kept = {work: folder / name / f"{work}.json" for work in (part.quick if quick else part.works)}
    due = [work for work, path in kept.items() if not path.is_file()]
    if due:
        with running(part.entries, _case(part, folder, quick)) as field:
            for work in due:
                start = time.monotonic()
                made = contest(
                    field, work, rounds=rounds, base=part.base, patience=patience, say=say,
                    profile=None if profile is None else profile / name,
                )  # fmt: skip
                write_json(kept[work], {"rows": made, "seconds": time.monotonic() - start})
    rows, seconds = [], 0.0
    for work, path in kept.items():
        if work not in due:
            say(f"{work}: measured before")
        found = read_json(path, "measured work")
        rows += [{"part": name, **row, "work": row["work"].replace("-", " ")} for row in found["rows"]]
        seconds += found["seconds"]
    return {"rows": rows, "seconds": seconds}


@contextmanager
def beside(command: list[str]) -> Iterator[None]:
    """Run a command meanwhile.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=sys.stderr)
    try:
        yield
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_speed(
    parts: list[str], folder: Path, *, quick: bool, rounds: int, patience: float = PATIENCE,
    profile: Path | None = None, store: bool = True, meanwhile: dict[str, list[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure parts, add the result to the stored ones and forget what was kept for a resumption.

    Args:
        parts: names.
        folder: for logs and for resuming.
        quick: small sizes; rounds, patience, profile: see `measure_part`.
        store: whether the result is kept.
        meanwhile: part -> arguments of a Python that runs beside it.
    """
    folder = folder / ("quick" if quick else "full")
    rows: list[dict[str, Any]] = []
    seconds = {}
    for name in parts:
        command = (meanwhile or {}).get(name)
        with beside(command) if command else nullcontext():
            found = measure_part(name, folder, quick=quick, rounds=rounds, patience=patience, profile=profile)
        rows += found["rows"]
        seconds[name] = round(found["seconds"], 1)
    threads = {"threads_per_contender": 1, "load": os.getloadavg()[0]}
    gpu = [{"work": work, "contender": "pysteer", "not_measured": "no GPU"} for work in ON_A_GPU]
    result = {
        "quick": quick, "rounds": rounds, "patience": patience, "parts": parts, "part_seconds": seconds, "rows": rows,
        "gpu": gpu, **threads, **machine(),
    }  # fmt: skip
    if store:
        append("speed", result)
        for name in parts:
            for kept in (folder / name).glob("*.json"):
                kept.unlink()
    return result


def ops_command(quick: bool) -> list[str]:
    """What measures the ops, as many as fit into its time."""
    limits = ["--rounds", "5", "--limit", "30"] if quick else ["--rounds", "15", "--limit", "130"]
    return ["-m", "bench.run", "--threads", "1", *limits]


def rows_command(quick: bool, rounds: int, patience: float, store: bool) -> list[str]:
    """What measures many settings in one batch."""
    command = ["-m", "bench.rows", "--rounds", str(rounds), "--patience", str(patience)]
    return command + ["--quick"] * quick + ["--dry-run"] * (not store)


def arguments() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=(*PARTS, "ops", "rows"), help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast it is")
    parser.add_argument("--rounds", type=int, help="at most; by default 30, quick 3")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds after which a work begins no further round"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for logs and for resuming")
    parser.add_argument("--profile", type=Path, help="folder for a trace and a list of calls per contender")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure, store, print."""
    from bench.speed_table import speed_table

    asked = arguments().parse_args(words)
    rounds = asked.rounds or (3 if asked.quick else 30)
    chosen = asked.part or [*PARTS, "ops", "rows"]
    if "ops" in chosen and not asked.dry_run:
        subprocess.run([sys.executable, *ops_command(asked.quick)], cwd=ROOT, check=False, stdout=sys.stderr)
    meanwhile = {}
    if "rows" in chosen:
        command = rows_command(asked.quick, rounds, asked.patience, not asked.dry_run)
        if "sweep" in chosen and not torch.cuda.is_available() and (os.cpu_count() or 1) > 1:
            meanwhile["sweep"] = command  # which takes one core, and tells of factors
        else:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
    parts = [name for name in chosen if name in PARTS]
    if parts:
        result = run_speed(
            parts, asked.folder.resolve(), quick=asked.quick, rounds=rounds, patience=asked.patience,
            store=not asked.dry_run, meanwhile=meanwhile,
            profile=None if asked.profile is None else asked.profile.resolve(),
        )  # fmt: skip
        print(speed_table([result]))


if __name__ == "__main__":
    main()
