"""Time the ops against a copy of the same bytes, plain torch, and torch.compile of plain torch.

    python -m bench.run                        measure, print the table, add the result to bench/results/ops.json
    python -m bench.run --op affine_shift --rounds 60
    python -m bench.run --table                print the table of the last stored result

Contenders take turns in random order, each on buffers of its own, and ratios are taken within a round: what else runs
on the machine hits all of them alike. An op whose result is wrong at a shape gets no time for that shape.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import append, machine, stored
from bench.registry import ROWS, Row, cost
from pysteer.files import write_json
from pysteer.ops import OpSpec, backend, backend_status, get

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/ops"))
from checking import compare

SHORTEST = 2e-3  # seconds of one measurement; shorter calls are repeated
MEMORY = 3 << 30  # bytes of an activation in fp64, above which a smaller batch is checked


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


class Contender:
    """Something to time, with the buffers it works on."""

    def __init__(self, name: str, call: Callable[[], Any], device: str) -> None:
        self.name, self.call, self.device = name, call, device
        self.seconds: list[float] = []
        self.repeats = 1
        for _ in range(3):
            call()
        self.repeats = max(1, round(SHORTEST / max(self.measure(), 1e-7)))

    def measure(self) -> float:
        """Seconds per call."""
        if self.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(self.repeats):
                self.call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.repeats
        before = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return (time.perf_counter() - before) / self.repeats


def inputs_of(row: Row, device: str) -> dict[str, Any]:
    """Inputs that can be applied in place again and again without growing."""
    spec = get(row.op)
    inputs = spec.make_inputs(replace(row.case, device=device, options=spec.variants.get(row.variant, {})))
    inputs["strength"].mul_(1e-3)
    return inputs


def check(row: Row, device: str, name: str | None) -> str:
    """Compare the op with fp64 at this shape; return what is wrong, or nothing."""
    spec = get(row.op)
    case = replace(row.case, device=device, options=spec.variants.get(row.variant, {}), strength="mixed")
    while 8 * case.rows * case.tokens * case.width > MEMORY:
        case = replace(case, rows=case.rows // 2)
    inputs = spec.make_inputs(case)
    try:
        with backend(name):
            compare(spec.function(**inputs), spec, row.variant, inputs)
    except AssertionError as error:
        return str(error).splitlines()[0] or "the result is wrong"
    return ""


def compiled(spec: OpSpec) -> Callable[..., Tensor]:
    """torch.compile of the reference, writing into `out`."""

    def into(out: Tensor, **inputs: Any) -> Tensor:
        return out.copy_(spec.reference(**inputs))

    torch._dynamo.reset()
    return torch.compile(into, fullgraph=True)


def with_backend(name: str | None, function: Callable[[], Any]) -> Callable[[], Any]:
    """A call that insists on a backend."""

    def call() -> None:
        with backend(name):
            function()

    return call if name else function


def contenders(row: Row, device: str, names: list[str | None]) -> list[Contender]:
    """The copy, the op in place and into another buffer on every backend asked for, and plain torch."""
    spec, inputs = get(row.op), inputs_of(row, device)
    x = inputs.pop("x")
    found = [Contender("copy", partial(torch.empty_like(x).copy_, x.clone()), device)]
    for name in names:
        label = f" ({name})" if name else ""
        for kind, source, target in (("in place", a := x.clone(), a), ("out=", x.clone(), torch.empty_like(x))):
            call = partial(spec.function, source, **inputs, out=target)
            found.append(Contender(kind + label, with_backend(name, call), device))
    compile_ = compiled(spec)
    found.append(Contender("compile out=", partial(compile_, torch.empty_like(x), x=x.clone(), **inputs), device))
    found.append(Contender("eager", partial(spec.reference, x, **inputs), device))
    return found


def measure(row: Row, device: str, rounds: int, forced: list[str | None]) -> dict[str, Any]:
    """Check and time one row."""
    moved, operations = cost(row)
    result: dict[str, Any] = {"op": row.op, "shape": row.title, "device": device, "bytes": moved, "flops": operations}
    problems = {name or "automatic": check(row, device, name) for name in forced}
    result["wrong"] = {name: problem for name, problem in problems.items() if problem}
    right = [name for name in forced if not problems[name or "automatic"]]
    if not right:
        return result
    spec = get(row.op)
    result["backend"] = spec.implementation(**inputs_of(row, device))
    field = contenders(row, device, right)
    for _ in range(rounds):
        for each in random.sample(field, len(field)):
            each.seconds.append(each.measure())
    base = field[0].seconds
    result["rounds"] = rounds
    result["seconds"] = {each.name: quantiles(each.seconds) for each in field}
    result["times_copy"] = {
        each.name: quantiles([a / b for a, b in zip(each.seconds, base, strict=True)]) for each in field
    }
    return result


def table(result: dict[str, Any]) -> str:
    """The Markdown table of one stored result: medians within rounds, as multiples of the copy."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row.get("times_copy", {}) if name != "copy"))
    lines = [
        f"| op | shape | backend | copy, GB/s | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in result["rows"]:
        if "times_copy" not in row:
            lines.append(f"| {row['op']} | {row['shape']} | wrong result, not timed |" + " |" * (1 + len(names)))
            continue
        times = [f"{row['times_copy'][name]['p50']:.2f}" if name in row["times_copy"] else "-" for name in names]
        speed = row["bytes"] / row["seconds"]["copy"]["p50"] / 1e9
        lines.append(f"| {row['op']} | {row['shape']} | {row['backend']} | {speed:.1f} | {' | '.join(times)} |")
    where = result["machine"]
    lines += [
        "",
        f"Time as a multiple of copying the same bytes (`copy_`), median of ratios within a round, {result['rounds']} "
        f"rounds; {where['gpu'] or where['processor']}, {where['threads']} threads, "
        f"torch {result['versions']['torch']}, commit {result['commit']}, {result['date'][:10]}.",
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="measure this op only; may be given several times")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on the CPU; 0 leaves them alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result to ops.json in this folder instead of bench/results")
    parser.add_argument("--table", action="store_true", help="print the last stored result and measure nothing")
    return parser.parse_args()


def main() -> None:
    """Measure, print, store; the exit code says whether every op was right at every shape."""
    asked = arguments()
    if asked.table:
        results = stored("ops")
        print(table(results[-1]) if results else "nothing is stored yet: run python -m bench.run")
        return
    if asked.threads:
        torch.set_num_threads(asked.threads)
    status = backend_status()
    forced: list[str | None] = [None]
    if asked.device == "cuda":
        forced = [None, *(name for name in ("triton", "cuda") if status[name].live)]
    rows = [row for row in ROWS if asked.device in row.devices and (not asked.op or row.op in asked.op)]
    results = []
    for row in rows:
        results.append(measure(row, asked.device, asked.rounds, forced))
        print(f"{row.op} {row.title}: {results[-1].get('wrong') or 'ok'}", file=sys.stderr, flush=True)
    result = {**machine(), "device": asked.device, "rounds": asked.rounds, "rows": results}
    print(table(result))
    print(write_json(asked.out / "ops.json", result) if asked.out else append("ops", result), file=sys.stderr)
    if any(row["wrong"] for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
