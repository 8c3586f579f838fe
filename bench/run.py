"""Time the ops against the least the hardware can do, plain torch, torch.compile of it, and the field's usual way.

    python -m bench.run                        measure, print the table, add the result to bench/results/ops.json
    python -m bench.run --op affine_shift --rounds 60

Contenders take turns in random order, each on buffers of its own, and ratios are taken within a round: what else runs
on the machine hits all of them alike. An op whose result is wrong at a shape gets no time for that shape.
"""

from __future__ import annotations

import argparse
import itertools
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

from bench.record import append, machine
from bench.registry import Row, measured
from bench.table import table
from pysteer.files import write_json
from pysteer.ops import Case, OpSpec, SteeringSpec, backend, backend_status, get

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/ops"))
from checking import compare, compare_general

SHORTEST = 2e-3  # seconds of one measurement; shorter calls are repeated
LONGEST = 0.3  # seconds; what takes n times as long is measured in every n-th round
FEW, PATIENCE = 7, 2.0  # rounds that a row gets however long they take; seconds after which no further one begins
MEMORY = 3 << 30  # bytes of an activation in fp64, above which a smaller batch is checked


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


class Contender:
    """Something to time, with the buffers it works on."""

    def __init__(self, name: str, call: Callable[[], Any], device: str) -> None:
        self.name, self.call, self.device = name, call, device
        self.seconds: list[float] = []
        self.repeats = 1
        call()  # compiles
        first = self.measure()
        if first < LONGEST:
            call()
            first = self.measure()
        self.repeats = max(1, round(SHORTEST / max(first, 1e-7)))
        self.every = max(1, round(first / LONGEST))

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


def case_of(row: Row, device: str, **changes: Any) -> Case:
    """The case of a row on a device, with the options of its variant."""
    return replace(row.case, device=device, options=get(row.op).variants.get(row.variant, {}), **changes)


def inputs_of(row: Row, device: str) -> dict[str, Any]:
    """Inputs that can be applied in place again and again without growing."""
    inputs = get(row.op).make_inputs(case_of(row, device))
    if "strength" in inputs:
        inputs["strength"].mul_(1e-3)
    return inputs


def check(row: Row, device: str, name: str | None) -> str:
    """Compare the op with fp64 at this shape; return what is wrong, or nothing."""
    spec = get(row.op)
    case = case_of(row, device)
    if isinstance(spec, SteeringSpec):
        case = replace(case, strength="mixed")
    while 8 * case.rows * case.tokens * case.width > MEMORY and case.rows > 1:
        case = replace(case, rows=case.rows // 2)
    inputs = spec.make_inputs(case)
    try:
        with backend(name):
            result = spec.function(**inputs)
        if isinstance(spec, SteeringSpec):
            compare(result, spec, row.variant, inputs)
        else:
            compare_general(result, spec, row.variant, inputs)
    except AssertionError as error:
        return str(error).splitlines()[0] if str(error) else "the result is wrong"
    return ""


def with_backend(name: str | None, function: Callable[[], Any]) -> Callable[[], Any]:
    """A call that insists on a backend."""

    def call() -> None:
        with backend(name):
            function()

    return call if name else function


def compiled_into(spec: OpSpec) -> Callable[..., Tensor]:
    """torch.compile of the reference, writing into `out`."""

    def into(out: Tensor, **inputs: Any) -> Tensor:
        return out.copy_(spec.reference(**inputs))

    return torch.compile(into, fullgraph=True)


def steering_contenders(spec: OpSpec, inputs: dict[str, Any], device: str, names: list[str | None]) -> list[Contender]:
    """The op in place and into another buffer on every backend asked for, and plain torch, compiled and not."""
    given = dict(inputs)
    x = given.pop("x")
    found = []
    for name in names:
        label = f" ({name})" if name else ""
        for kind, source, target in (("in place", a := x.clone(), a), ("out=", x.clone(), torch.empty_like(x))):
            call = partial(spec.function, source, **given, out=target)
            found.append(Contender(kind + label, with_backend(name, call), device))
    call = partial(compiled_into(spec), torch.empty_like(x), x=x.clone(), **given)
    return [
        *found,
        Contender("compile out=", call, device),
        Contender("eager", partial(spec.reference, **inputs), device),
    ]


def general_contenders(spec: OpSpec, inputs: dict[str, Any], device: str, names: list[str | None]) -> list[Contender]:
    """The op on every backend asked for, and plain torch, compiled and not."""
    found = []
    for name in names:
        call = with_backend(name, partial(spec.function, **inputs))
        found.append(Contender(f"op ({name})" if name else "op", call, device))
    call = partial(torch.compile(spec.reference), **inputs)
    return [*found, Contender("compile", call, device), Contender("eager", partial(spec.reference, **inputs), device)]


def contenders(row: Row, device: str, names: list[str | None]) -> list[Contender]:
    """The floor, the op, plain torch and what the field does, in this order."""
    spec, inputs, known = get(row.op), inputs_of(row, device), measured()[row.op]
    torch._dynamo.reset()
    label, call = known.floor(inputs)
    found = [Contender(label, call, device)]
    found += (steering_contenders if known.steers else general_contenders)(spec, inputs, device, names)
    if naive := known.naive(inputs):
        found.append(Contender(*naive, device))
    return found


def measure(row: Row, device: str, rounds: int, forced: list[str | None]) -> dict[str, Any]:
    """Check and time one row."""
    moved, operations = measured()[row.op].cost(row.case)
    result: dict[str, Any] = {"op": row.op, "shape": row.title, "device": device, "bytes": moved, "flops": operations}
    problems = {name or "automatic": check(row, device, name) for name in forced}
    result["wrong"] = {name: problem for name, problem in problems.items() if problem}
    right = [name for name in forced if not problems[name or "automatic"]]
    if None not in right:
        return result
    result["backend"] = get(row.op).implementation(**inputs_of(row, device))
    with torch.no_grad():
        field = contenders(row, device, right)
        ratios: dict[str, list[float]] = {each.name: [] for each in field}
        start = time.monotonic()
        for number in range(rounds):
            if number >= FEW and time.monotonic() - start > PATIENCE:
                break
            done = number + 1
            taking = [each for each in field if not number % each.every]
            for each in random.sample(taking, len(taking)):
                each.seconds.append(each.measure())
            for each in taking:
                ratios[each.name].append(each.seconds[-1] / field[0].seconds[-1])
    result["rounds"], result["floor"] = done, field[0].name
    result["seconds"] = {each.name: quantiles(each.seconds) for each in field}
    result["times_floor"] = {name: quantiles(values) for name, values in ratios.items()}
    return result


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="measure this op only; may be given several times")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on the CPU; 0 leaves them alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=0, help="seconds after which no further row is begun; 0: none")
    parser.add_argument("--out", type=Path, help="write the result to ops.json in this folder instead of bench/results")
    return parser.parse_args()


def chosen_rows(device: str, ops: list[str] | None) -> list[Row]:
    """The rows of some ops, or of all: the first of every op, then the second ones, so a limit leaves no op out."""
    by_op = [
        [row for row in known.rows if device in row.devices]
        for name, known in measured().items()
        if not ops or name in ops
    ]
    return [row for nth in itertools.zip_longest(*by_op) for row in nth if row is not None]


def main() -> None:
    """Measure, print, store; the exit code says whether every op was right at every shape."""
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    status = backend_status()
    forced: list[str | None] = [None]
    if asked.device == "cuda":
        forced = [None, *(name for name in ("triton", "cuda") if status[name].live)]
    rows = chosen_rows(asked.device, asked.op)
    results: list[dict[str, Any]] = []
    result = {**machine(), "device": asked.device, "rounds": asked.rounds, "rows": results}
    start = time.monotonic()
    for number, row in enumerate(rows):
        if asked.limit and time.monotonic() - start > asked.limit:
            result["left_out"] = [f"{each.op} {each.title}" for each in rows[number:]]
            print(f"{len(rows) - number} rows left out after {asked.limit} s", file=sys.stderr)
            break
        results.append(measure(row, asked.device, asked.rounds, forced))
        print(f"{row.op} {row.title}: {results[-1].get('wrong') or 'ok'}", file=sys.stderr, flush=True)
        if asked.out:  # whoever stops us keeps what there is
            write_json(asked.out / "ops.json", result)
    print(table(result))
    if not asked.out:
        print(append("ops", result), file=sys.stderr)
    if any(row["wrong"] for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
