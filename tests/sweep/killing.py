"""Sweeps that are killed: a driver with two workers on the toy, kill -9 of one of them at a random moment, then again.

    python tests/sweep/killing.py 100

A trial checks that every finished cell is still there, none is there twice, and what ran again is at most one batch per
worker that was killed.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYSTEER_START_METHOD"] = "fork"

import faulthandler

import torch
import toy  # noqa: F401 (the workers are forks of this process)

from pysteer.errors import InputError
from pysteer.sweep.driver import Launch, run_sweep
from pysteer.sweep.plan import Options, plan_sweep
from pysteer.sweep.store import Store

BATCH, WORKERS = 4, 2
WORDS = ["strength=linspace(0,2,7)", "seed=range(6)", "prompt=a,b", "seconds=0.01"]  # 84 cells, 21 batches


@dataclass
class Trial:
    """What a kill did.

    Attributes:
        who: driver or worker.
        before: cells that were finished when it struck.
        lost: of those that are gone.
        doubled: cells with two rows at the end.
        missing: cells without one at the end.
        again: cells that were generated more than once.
    """

    who: str
    before: int
    lost: int
    doubled: int
    missing: int
    again: int


def run(folder: Path) -> None:
    plan = plan_sweep("toy:ToyTask", WORDS, Options(batch_size=BATCH))
    run_sweep(plan, folder, launch=Launch("processes", workers=WORKERS, threads=1))


def _run_when_free(folder: Path) -> None:
    """A forked worker holds the lock of its driver, too, until it has noticed that the driver is gone."""
    end = time.time() + 30
    while True:
        try:
            return run(folder)
        except InputError as error:
            if "in use" not in str(error) or time.time() > end:
                raise
            time.sleep(0.1)


def driver(folder: Path) -> int:
    """Fork a driver; its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        faulthandler.dump_traceback_later(200, exit=True)
        os.setsid()
        _run_when_free(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def children(number: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except OSError:
        return []


def keys_of(folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for table in Store(folder).read(["key"]):
        found.update(table["key"].to_pylist())
    return found


def batches_in(log: Path) -> int:
    """How many batches have been begun."""
    return log.read_text().count("\n") if log.is_file() else 0


def ended(number: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def trial(folder: Path, rng: random.Random) -> Trial:
    """One sweep that is killed once and started again."""
    log = folder / "generated.log"
    os.environ["TOY_LOG"] = str(log)
    store = folder / "store"
    first, who = driver(store), rng.choice(["driver", "worker"])
    strike, end = rng.randint(0, 20), time.time() + 120
    while batches_in(log) < strike and time.time() < end and not ended(first):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.03))
    victims = children(first) if who == "worker" else [first]
    who = who if victims else "driver"
    before: Counter[str] = Counter()
    try:
        before = keys_of(store)
        os.kill(rng.choice(victims or [first]), signal.SIGKILL)
    except ProcessLookupError:
        who = "nobody"
    os.waitpid(first, 0)
    if os.waitstatus_to_exitcode(os.waitpid(driver(store), 0)[1]):
        raise SystemExit("the second start failed")
    after = keys_of(store)
    plan = plan_sweep("toy:ToyTask", WORDS, Options(batch_size=BATCH))
    wanted = {key.decode() for key in plan.cells.keys}
    generated = sum(int(line.split()[1]) for line in log.read_text().splitlines())
    return Trial(
        who, len(before), len(set(before) - set(after)), sum(n > 1 for n in after.values()), len(wanted - set(after)),
        generated - len(plan),
    )  # fmt: skip


def main(trials: int, seed: int = 0) -> list[Trial]:
    """Run trials, in folders that are thrown away."""
    torch.set_num_threads(1)
    rng, found = random.Random(seed), []
    for _ in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            found.append(trial(Path(folder), rng))
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    started = time.time()
    done = main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(Counter(t.who for t in done), "at", Counter(t.before // 12 * 12 for t in done), "of 84 cells")
    print(
        f"{len(done)} kills in {time.time() - started:.0f} s: {sum(t.lost for t in done)} finished cells lost, "
        f"{sum(t.doubled for t in done)} doubled, {sum(t.missing for t in done)} missing, at most "
        f"{max(t.again for t in done)} cells generated again (a batch is {BATCH}, {WORKERS} workers)"
    )
