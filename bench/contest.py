"""A contest: processes that do the same work in turn. Who does not change the output as it should gets no time."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.serving import ANSWER
from bench.worker import work

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("PYSTEER_PEERS", ROOT / ".peers"))
# Contenders of ours are forked from a process that has these: importing them takes ten seconds each time.
IMPORTED = ("pysteer", "transformers.models.llama.modeling_llama", "diffusers.models.unets.unet_2d_condition")
_FORKS = multiprocessing.get_context("forkserver")
ENOUGH = 2  # rounds that a work gets however long they take
OPENING = 4  # rounds that all get, the first of which does not count; then those that are near are measured better
NEAR = 1.07  # x the time of the base
PATIENCE = 10.0  # seconds of rounds that a work of the suite gets, unless those that are needed take longer
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

    def missing(self) -> str:
        """Why it cannot take part, or nothing."""
        if self.package and not (PEERS / self.package / "complete").is_file():
            return f"{self.package} is not installed: scripts/peers.sh {self.package}"
        return ""

    def takes(self, work: str) -> bool:
        """Whether it takes part in a work."""
        return not self.works or work in self.works


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
    process: subprocess.Popen[str] | BaseProcess
    commands: IO[str]
    answers: IO[str]
    output: Path
    refused: str = ""
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def ask(self, command: str) -> None:
        """Send one command; `hear` has the answer."""
        try:
            self.commands.write(command + "\n")
            self.commands.flush()
        except BrokenPipeError:
            self.refused = self.refused or "its process ended"

    def hear(self) -> dict[str, Any]:
        """The answer to the last command; a failure refuses the contender."""
        answer: dict[str, Any] = {"failed": "its process ended"}
        for line in self.answers:
            if line.startswith(ANSWER):
                answer = json.loads(line.removeprefix(ANSWER))
                break
        if "failed" in answer:
            self.refused = self.refused or answer["failed"]
        return answer

    def stop(self) -> None:
        """Let the process end."""
        with contextlib.suppress(BrokenPipeError):
            self.commands.close()
        wait = self.process.join if isinstance(self.process, BaseProcess) else self.process.wait
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait(20)
        self.process.kill()  # what has ended already is left alone
        wait()
        self.answers.close()


def _fork(entry: Entry, folder: Path, threads: int, log: Path) -> tuple[BaseProcess, IO[str], IO[str]]:
    """A process of ours, and the pipes to it."""
    _FORKS.set_forkserver_preload(list(IMPORTED))
    theirs, commands = _FORKS.Pipe(duplex=False)
    answers, other = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(
        target=work, args=(entry.module, entry.kind, folder, threads, log, (theirs, other)), daemon=True
    )
    process.start()
    theirs.close()
    other.close()
    pipes = [os.fdopen(os.dup(end.fileno()), mode, encoding="utf-8") for end, mode in ((commands, "w"), (answers, "r"))]
    commands.close()
    answers.close()
    return process, pipes[0], pipes[1]


def _run_package(entry: Entry, folder: Path, threads: int, log: Path) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """A process of another package's environment, and the pipes to it."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [str(PEERS / entry.package / "bin/python"), str(ROOT / "bench/baselines" / f"{entry.module}.py")]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **count}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    return process, process.stdin, process.stdout


def start(entry: Entry, folder: Path, threads: int) -> Contender:
    """Start the process of a contender."""
    slug = "".join(c if c.isalnum() else "-" for c in entry.name)
    begin = _run_package if entry.package else _fork
    return Contender(entry, *begin(entry, folder, threads, folder / f"{slug}.log"), folder / f"{slug}.safetensors")


def prepare(field: Sequence[Contender], work: str, side_by_side: int) -> None:
    """Make all ready for a work, a few at a time: compiling is not timed."""

    def ready(each: Contender) -> None:
        each.ask(f"prepare {work} {each.output}")
        each.facts = each.hear()

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(ready, field))


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
    ratios = [mine / theirs for mine, theirs in zip(each.seconds, base.seconds, strict=False)]  # some end earlier
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


@contextlib.contextmanager
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
    """Numbers of rounds, of which not all count; see `counted`.

    Args:
        rounds: how many are counted at most.
        patience: seconds after which no further round begins, once there are `ENOUGH`.
    """
    start = time.monotonic()
    for number in range(rounds + 1):
        if number >= ENOUGH and time.monotonic() - start > patience:
            return
        yield number


def counted(values: Sequence[float], rounds: int) -> list[float]:
    """What counts of the figures of all rounds: not the first, in which things warm up, unless each round takes so long
    that there are only `ENOUGH`."""
    return list(values[len(values) > min(ENOUGH, rounds) :])


def near(each: Contender, base: Contender) -> bool:
    """Whether the rounds so far, without the first, leave it open who is faster; of the base itself always."""
    if each.refused or base.refused:  # its process ended
        return False
    ratios = [mine / theirs for mine, theirs in zip(each.seconds[1:], base.seconds[1:], strict=True)]
    return statistics.median(ratios) <= NEAR


def take_turns(timed: Sequence[Contender], base: Contender, rounds: int, patience: float) -> None:
    """Time all, round after round in alternating order, and after `OPENING` rounds those that are near; see
    `numbers_of_rounds`."""
    for number in numbers_of_rounds(rounds, patience):
        if number == OPENING:
            timed = [each for each in timed if near(each, base)]
        for each in timed if number % 2 else timed[::-1]:
            each.ask("round")
            seconds = each.hear().get("seconds")
            if seconds is not None:
                each.seconds.append(seconds)


def count_calls(timed: Sequence[Contender], side_by_side: int, profile: Path | None) -> None:
    """Add peak memory, recompilations and calls to the facts of contenders that have been timed."""

    def count(each: Contender) -> None:
        each.ask("end")
        each.facts |= each.hear()
        if profile is None and statistics.median(each.seconds or [0.0]) > LONG:
            return
        each.ask("profile" if profile is None else f"profile {profile / each.output.stem}")
        each.facts |= each.hear()

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(count, timed))


def contest(
    field: Field, work: str, *, rounds: int, base: str, patience: float = math.inf, say: Say = print,
    side_by_side: int = 2, profile: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Let all do one work; a row each.

    Args:
        field: who takes part.
        work: name of the work.
        rounds: how many rounds count at most; see `counted`.
        base: name of the contender that ratios are taken to, within a round.
        patience: seconds after which no further round begins, once there are `ENOUGH`.
        say: told what happens.
        side_by_side: how many may prepare at the same time.
        profile: folder for a trace and a list of calls of each contender; None: calls are counted only, unless a run
            takes longer than `LONG`.
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
    take_turns(timed, first, rounds, patience)
    for each in timed:
        each.seconds = counted(each.seconds, rounds)
    count_calls(timed, side_by_side, None if profile is None else profile / work)
    rows = [row_of(each, first, work) for each in taking]
    absent = [entry for entry in field.absent if entry.takes(work)]
    return rows + [{"work": work, "contender": e.name, "ours": e.ours, "refused": e.missing()} for e in absent]
