"""Peak memory of ops that promise little of it, next to plain torch, beyond what is in use before the call.

    python -m bench.memory

The high-water mark of the process (VmHWM of Linux) is set back before a call and read after it: that counts what torch
and the compiled kernels allocate and touch, the result included.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.record import append, machine
from bench.registry import measured
from bench.serving import held
from pysteer.ops import get

OPS = ("channel_moments", "sae_encode", "sae_encode_mean", "sae_edit")


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call needs at its peak beyond what is held before; the second of two calls is measured."""
    call()  # loads code, starts threads
    ctypes.CDLL(None).malloc_trim(0)  # what is free and still held would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = held("VmRSS")
    result = call()
    after = held("VmHWM")
    del result
    return max(0, after - before)


def rows() -> list[dict[str, Any]]:
    """Measure the ops at their shapes of the benchmark."""
    found = []
    for name in OPS:
        spec = get(name)
        for row in (row for row in measured()[name].rows if "cpu" in row.devices):
            inputs = spec.make_inputs(replace(row.case, options=spec.variants.get(row.variant, {})))
            given = sum(each.nbytes for each in inputs.values() if isinstance(each, torch.Tensor))
            with torch.no_grad():
                calls = {"op": partial(spec.function, **inputs), "eager": partial(spec.reference, **inputs)}
                peaks = {kind: peak(call) for kind, call in calls.items()}
            found.append(
                {"op": name, "shape": row.title, "inputs": given, **{f"peak_{k}": v for k, v in peaks.items()}}
            )
    return found


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    result = {**machine(), "rows": rows()}
    print("| op | shape | inputs, MiB | peak of the op, MiB | peak of plain torch, MiB |\n" + "|---" * 5 + "|")
    for row in result["rows"]:
        figures = (row[name] / (1 << 20) for name in ("inputs", "peak_op", "peak_eager"))
        print(f"| {row['op']} | {row['shape']} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    if not asked.dry_run:
        append("memory", result)


if __name__ == "__main__":
    main()
