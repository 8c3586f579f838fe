"""A contest: processes that do the same work in turn. Who does not change the output as it should gets no time."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.serving import ANSWER

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("PYSTEER_PEERS", ROOT / ".peers"))
ENOUGH = 2  # rounds that a work gets however long they take
PATIENCE = 20.0  # seconds of rounds that a work of the suite gets, unless those that are needed take longer
LONG = 3.0  # seconds of a run that is profiled only when asked for: hundreds of thousands of calls take minutes to list
CLOSE = 0.05  # of the change that steering should make: how far a contender may be from it
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A contender of a part.

    Attributes:
        name: in tables.
        module: `bench.works.*` that prepares it, or for a package of others the file `bench/baselines/<module>.py`.
        kind: how, for the module.
        steers: whether the output has to change.
        package: name of the package whose environment runs it, empty for ours.
        works: names of works it takes part in, empty for all.
        ours: whether it is pysteer.
    """

    name: str
    module: str
    kind: str = ""
    steers: bool = True
    package: str = ""
    works: tuple[str, ...] = ()
    ours: bool = False

    def python(self) -> Path:
        """The interpreter that runs it."""
        return PEERS / self.package / "bin" / "python" if self.package else Path(sys.executable)

    def missing(self) -> str:
        """Why it cannot take part, or nothing."""
        if self.package and not (PEERS / self.package / "complete").is_file():
            return f"{self.package} is not installed: scripts/peers.sh {self.package}"
        return ""

    def takes(self, work: str) -> bool:
        """Whether it takes part in a work."""
        return not self.works or work in self.works

    def command(self, folder: Path) -> list[str]:
        """What is run."""
        if self.package:
            return [str(self.python()), str(ROOT / "bench/baselines" / f"{self.module}.py"), str(folder)]
        return [str(self.python()), "-m", "bench.worker", self.module, self.kind, str(folder)]


def verdict(output: Tensor, unsteered: Tensor, expected: Tensor | None) -> str:
    """An empty string, or why a contender may not be timed.

    Args:
        output: what it made.
        unsteered: what the model makes when nobody steers.
        expected: what plain formulas make of it, None for a contender that does not steer.
    """
    if output.shape != unsteered.shape:
        return f"the output has shape {list(output.shape)}, not {list(unsteered.shape)}"
    if not bool(torch.isfinite(output).all()):
        return "the output is not finite"
    if expected is None:
        scale = float(unsteered.abs().max())
        off = float((output - unsteered).abs().max()) / max(scale, 1e-12)
        return "" if off < 1e-2 else f"the unsteered output differs by {off:.1e} of its largest value"
    change = float((expected - unsteered).abs().max())
    if change == 0:
        return "the expected output does not differ from the unsteered one: the work shows nothing"
    if float((output - unsteered).abs().max()) < CLOSE * change:
        return "the output did not change"
    off = float((output - expected).abs().max()) / change
    return "" if off < CLOSE else f"the output changed wrongly: off by {100 * off:.0f} % of the change"


@dataclass
class Contender:
    """A running contender."""

    entry: Entry
    process: subprocess.Popen[str]
    output: Path
    refused: str = ""
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, command: str) -> None:
        """Send one command; `hear` has the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.refused = self.refused or "its process ended"

    def hear(self) -> dict[str, Any]:
        """The answer to the last command; a failure refuses the contender."""
        assert self.process.stdout is not None
        answer: dict[str, Any] = {"failed": "its process ended"}
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                answer = json.loads(line.removeprefix(ANSWER))
                break
        if "failed" in answer:
            self.refused = self.refused or answer["failed"]
        return answer

    def stop(self) -> None:
        """Let the process end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def start(entry: Entry, folder: Path, threads: int) -> Contender:
    """Start the process of a contender."""
    slug = "".join(c if c.isalnum() else "-" for c in entry.name)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "MKL_NUM_THREADS": str(threads),
    }
    log = (folder / f"{slug}.log").open("a", encoding="utf-8")
    with log:
        process = subprocess.Popen(
            entry.command(folder), cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    return Contender(entry, process, folder / f"{slug}.safetensors")


def prepare(field: Sequence[Contender], work: str, side_by_side: int) -> None:
    """Make all ready for a work, a few at a time: compiling is not timed."""
    for i in range(0, len(field), side_by_side):
        for each in field[i : i + side_by_side]:
            each.ask(f"prepare {work} {each.output}")
        for each in field[i : i + side_by_side]:
            each.facts = each.hear()


def judge(field: Sequence[Contender]) -> None:
    """Refuse who does not make what plain formulas make; the first contender is the plain model, the second the plain
    formulas."""
    base, plain = field[0], field[1]
    if base.refused or plain.refused:
        why = f"nothing to compare with: {base.refused or plain.refused}"
        for each in field:
            each.refused = each.refused or why
        return
    unsteered, expected = load_file(base.output)["output"], load_file(plain.output)["output"]
    for each in field:
        if not each.refused:
            made = load_file(each.output)["output"]
            each.refused = verdict(made, unsteered, expected if each.entry.steers else None)


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third; of one value that value twice."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2


def row_of(each: Contender, base: Contender, work: str) -> dict[str, Any]:
    """What is stored of one contender in one work; no time where it was refused."""
    entry = each.entry
    row: dict[str, Any] = {"work": work, "contender": entry.name, "ours": entry.ours, "refused": each.refused}
    if each.refused or base.refused or not each.seconds:
        return row
    ratios = [mine / theirs for mine, theirs in zip(each.seconds, base.seconds, strict=True)]
    return row | {
        "per_second": each.facts["units"] / statistics.median(each.seconds),
        "seconds": statistics.median(each.seconds),
        "seconds_quartiles": quartiles(each.seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "rounds": len(ratios),
        **{name: each.facts.get(name) for name in ("graph_breaks", "recompiles", "peak_bytes", "calls", "syncs")},
    }


@dataclass
class Field:
    """Who takes part: processes that were started once and do one work after another.

    Attributes:
        contenders: those that run. The first is the plain model and the second the plain formulas, both eager.
        absent: those that cannot take part.
        folder: of outputs and logs.
    """

    contenders: list[Contender]
    absent: list[Entry]
    folder: Path


@contextmanager
def running(entries: Sequence[Entry], folder: Path, threads: int = 1) -> Iterator[Field]:
    """Start the processes of all who can take part, and end them.

    Args:
        entries: who takes part. The first is the plain model and the second the plain formulas, both eager.
        folder: for outputs and logs.
        threads: per contender.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = [entry for entry in entries if not entry.missing()]
    started: list[Contender] = []
    try:
        started += (start(entry, folder, threads) for entry in present)
        yield Field(started, [entry for entry in entries if entry.missing()], folder)
    finally:
        for each in started:
            each.stop()


def numbers_of_rounds(rounds: int, patience: float = PATIENCE) -> Iterator[int]:
    """Numbers of rounds, of which 0 does not count.

    Args:
        rounds: how many are counted at most.
        patience: seconds after which no further round begins, once there are `ENOUGH`.
    """
    start = time.monotonic()
    for number in range(rounds + 1):
        if number > ENOUGH and time.monotonic() - start > patience:
            return
        yield number


def take_turns(timed: Sequence[Contender], rounds: int, patience: float) -> None:
    """Time all, round after round in alternating order; see `numbers_of_rounds`."""
    for number in numbers_of_rounds(rounds, patience):
        for each in timed if number % 2 else timed[::-1]:
            each.ask("round")
            seconds = each.hear().get("seconds")
            if number and seconds is not None:
                each.seconds.append(seconds)


def contest(
    field: Field, work: str, *, rounds: int, base: str, patience: float = math.inf, say: Say = print,
    side_by_side: int = 2, profile: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Let all do one work; a row each.

    Args:
        field: who takes part.
        work: name of the work.
        rounds: how often each does it at most, after one round that does not count.
        base: name of the contender that ratios are taken to, within a round.
        patience: seconds after which no further round begins, once there are `ENOUGH`.
        say: told what happens.
        side_by_side: how many may prepare at the same time.
        profile: folder for a trace and a list of calls of each contender, None for none.
    """
    taking = [each for each in field.contenders if each.entry.takes(work)]
    first = next((each for each in taking if each.entry.name == base), None)
    if first is None:
        raise ValueError(f"{base} takes no part in {work}")
    for each in taking:
        each.refused, each.seconds, each.facts = "", [], {}
    prepare(taking, work, side_by_side)
    judge(taking)
    for each in taking:
        say(f"{work}: {each.entry.name}: {each.refused or 'ready'}")
    timed = [each for each in taking if not each.refused]
    take_turns(timed, rounds, patience)
    for each in timed:
        each.ask("end")
        each.facts |= each.hear()
        if profile is None and statistics.median(each.seconds or [0.0]) > LONG:
            continue
        each.ask(f"profile {(profile or field.folder / 'profiles') / work / each.output.stem}")
        each.facts |= {name: value for name, value in each.hear().items() if name in ("calls", "syncs")}
    rows = [row_of(each, first, work) for each in taking]
    absent = [entry for entry in field.absent if entry.takes(work)]
    return rows + [{"work": work, "contender": e.name, "ours": e.ours, "refused": e.missing()} for e in absent]
