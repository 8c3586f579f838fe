"""The side of a contender: prepares a piece of work when told, does it once per round, and says how long it took.

A contender is a process of its own, so that neither its imports, nor its compiled graphs, nor its allocator touch those
of another. It reads one command a line and answers one line, `answer` and JSON:

    prepare WORK FILE     make everything ready, write what comes out into FILE (safetensors, `output`)
    round                 do the work once: seconds
    profile [FOLDER]      do it once under the profiler and count calls; with a trace and a list of calls in FOLDER
    end                   peak memory of the rounds, recompilations in them

This file needs nothing but torch and safetensors: packages that we compare with run it in environments of their own.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ANSWER = "answer "  # begins every answer: packages print lines of their own while they are imported


@dataclass
class Prepared:
    """A piece of work, ready to be timed.

    Attributes:
        run: does it once; what it returns is not looked at.
        output: what the contender makes of it, to be compared with what it should be.
        setup: is called before every `run` and not timed.
        units: tokens or images that one `run` makes.
        facts: what else is to be stored.
    """

    run: Callable[[], Any]
    output: Callable[[], Tensor]
    units: float
    setup: Callable[[], Any] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)


def _counters() -> tuple[int, int]:
    """Graphs that were compiled and graph breaks, of this process so far."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes seconds
        return 0, 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call: on a CPU those of this process alone, so that other programs count little."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


SYNCS_ON_A_GPU = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
SYNCS_ON_A_CPU = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # on a GPU they would wait


def syncs_of(events: Any) -> int:
    """Calls that wait for the GPU; on a CPU those that would if the tensors were on one."""
    names = SYNCS_ON_A_GPU if torch.cuda.is_available() else SYNCS_ON_A_CPU
    return sum(event.name() in names for event in events)


def held(name: str) -> int:
    """Bytes that the process holds (VmRSS, RssAnon), or the most it held (VmHWM); Linux alone."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let the peak memory of this process begin anew, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Peak resident memory since `forget_peak`, or of the whole process where that could not be done."""
    with contextlib.suppress(OSError):
        return held("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _forget_compiled() -> None:
    """Drop the graphs of the last work; what was written to the compiler's cache stays."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()


def _leaves(events: Any) -> int:
    """Calls that call no other on the CPU: what a GPU would launch. `events` as the profiler recorded them."""
    by_thread: dict[int, list[tuple[int, int]]] = {}
    for event in events:
        if event.name() != "[memory]":
            span = (event.start_ns(), -event.end_ns())  # of two that begin together, the longer one is outside
            by_thread.setdefault(event.start_thread_id(), []).append(span)
    count = 0
    for spans in by_thread.values():
        spans.sort()
        count += sum(after[0] >= -span[1] for span, after in itertools.pairwise(spans)) + 1
    return count


def _profile(work: Prepared, folder: Path | None) -> dict[str, Any]:
    """Count the calls of one run, and those that wait; with a folder also a trace for chrome://tracing or Perfetto,
    and a list of what is called how often and how long."""
    from torch.profiler import ProfilerActivity, profile

    on_a_gpu = torch.cuda.is_available()
    work.setup()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_a_gpu)]) as seen:
        work.run()
    raw = seen.profiler.kineto_results.events()  # a list of `FunctionEvent`s takes twenty times as long
    device = [event for event in raw if event.device_type() == torch.autograd.DeviceType.CUDA]
    found = {"calls": len(device) if on_a_gpu else _leaves(raw), "syncs": syncs_of(raw)}
    if folder is None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / "trace.json"))
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    listed = [
        {"call": row.key, "times": row.count, "own_us": round(row.self_cpu_time_total, 1)} for row in rows
    ]  # fmt: skip
    (folder / "calls.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    return found


class Server:
    """Answers the commands of a contest.

    Args:
        prepare: makes a piece of work by name; may raise what it likes, the reason is passed on.
        say: writes one answer.
    """

    def __init__(self, prepare: Callable[[str], Prepared], say: Callable[[dict[str, Any]], None]) -> None:
        self.prepare, self.say = prepare, say
        self.work: Prepared | None = None
        self.graphs = self.breaks = 0

    def answer(self, line: str) -> dict[str, Any]:
        """What one command comes to."""
        word, *rest = line.split(" ")
        if word == "prepare":
            self.work = None
            _forget_compiled()
            before = _counters()
            self.work = self.prepare(rest[0])
            self.work.setup()
            save_file({"output": self.work.output().detach().float().contiguous().cpu()}, rest[1])
            now = _counters()
            self.graphs, self.breaks = now[0], now[1] - before[1]
            forget_peak()
            return {"units": self.work.units, "graph_breaks": self.breaks, **self.work.facts}
        assert self.work is not None, "nothing is prepared"
        if word == "round":
            self.work.setup()
            return {"seconds": seconds_of(self.work.run)}
        if word == "profile":
            return _profile(self.work, Path(rest[0]) if rest else None)
        return {"peak_bytes": peak_bytes(), "recompiles": _counters()[0] - self.graphs}

    def serve(self, lines: Any) -> None:
        """Answer until the lines end."""
        for line in lines:
            try:
                with torch.no_grad():
                    self.say(self.answer(line.strip()))
            except Exception as error:
                traceback.print_exc()
                self.say({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def serve(prepare: Callable[[str], Prepared]) -> None:
    """Serve on stdin and stdout. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def say(message: dict[str, Any]) -> None:
        answers.write(f"{ANSWER}{json.dumps(message)}\n")
        answers.flush()

    Server(prepare, say).serve(sys.stdin)
