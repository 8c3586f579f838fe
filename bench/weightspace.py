"""Reading, decomposing and summarising LoRA collections, next to the usual way.

    python -m bench.weightspace            # 1,000 adapters of d = 99,648: rank 1, to_q and to_v of Stable Diffusion 1.5
    python -m bench.weightspace --print    # the newest stored result as a table

The usual way to read is a data set with a column of nested lists per tensor (package `datasets`, torch format, columns
concatenated one after the other), measured on fewer adapters, because it takes long; without that package the row is
left out. Full PCA is the SVD of the centred matrix, dense singular values are `svdvals` of B A. All times are CPU time
of one thread, which other work on the machine hardly changes, and the shortest of several runs: what the first ones pay
is memory that the system has to find.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.record import append, machine, stored
from bench.serving import held
from pysteer.ops.lowrank_features import lowrank_features
from pysteer.weightspace import LoraSet, pca
from pysteer.weightspace.components import choose

CHANNELS = (320,) * 2 + (640,) * 2 + (1280,) * 3 + (1280,) * 3 + (640,) * 3 + (320,) * 3
TEXT = 768
K = 100


def layers() -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of every to_q and to_v of Stable Diffusion 1.5."""
    found = []
    for block, width in enumerate(CHANNELS):
        for attention, inputs in (("attn1", width), ("attn2", TEXT)):
            found.append((f"unet.blocks.{block}.{attention}.to_q", width, width))
            found.append((f"unet.blocks.{block}.{attention}.to_v", inputs, width))
    return found


def timed(function: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """The shortest of `times` runs in seconds of CPU time, and the last result."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return best, result


def own_memory(function: Callable[[], Any]) -> float:
    """Bytes by which the memory of the process itself rises while `function` runs; mapped files are not its own."""
    before = held("RssAnon")
    peak, over = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, held("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        over.set()
        watcher.join()
    return peak - before


def write_adapters(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` adapters with 60 directions in common and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(name, role, shape) for name, i, o in layers() for role, shape in (("A", (1, i)), ("B", (o, 1)))]
    width = sum(a * b for _, _, (a, b) in shapes)
    common = torch.randn(60, width, generator=generator)
    for index in range(count):
        own = torch.randn(width, generator=generator)
        row = own + torch.randn(60, generator=generator) * torch.linspace(3, 0.3, 60) @ common
        tensors, at = {}, 0
        for name, role, (a, b) in shapes:
            tensors[f"{name}.lora_{role}.weight"] = row[at : at + a * b].view(a, b).clone()
            at += a * b
        path = folder / f"class-{index % 10}" / f"{index:06d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


def read_nested(adapters: LoraSet, folder: Path, count: int) -> float | None:
    """Seconds per adapter to read `count` of them from columns of nested lists; None without `datasets`."""
    try:
        import datasets
    except ImportError:
        return None
    columns = {}
    for segment in adapters.layout.segments:
        values = np.array(adapters.rows[:count, segment.start : segment.stop]).reshape(-1, *segment.shape)
        columns[f"{segment.layer}.lora_{segment.role}"] = values.tolist()
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    opened = datasets.load_from_disk(str(folder)).with_format("torch")

    def read() -> torch.Tensor:
        made = torch.empty(count, 0)
        for name in opened.column_names:
            made = torch.cat([made, opened[name][:].flatten(1)], 1)
        return made

    seconds, made = timed(read, 2)
    assert torch.equal(made, torch.from_numpy(np.array(adapters.rows[:count])))
    return seconds / count


def bench_read(place: Path, count: int, nested: int) -> tuple[dict[str, Any], LoraSet]:
    """Reading a folder into the row file, once its files are in the page cache."""
    write_adapters(place / "adapters", count)
    cache = place / "rows"

    def read() -> LoraSet:
        shutil.rmtree(cache, ignore_errors=True)
        return LoraSet.open(place / "adapters", cache=cache)

    seconds, adapters = timed(read, 5)
    again, _ = timed(lambda: LoraSet.open(place / "adapters", cache=cache), 3)
    slow = read_nested(adapters, place / "nested", nested)
    row = {"adapters": count, "d": adapters.layout.width, "ms": 1e3 * seconds / count, "reopen_ms": 1e3 * again / count}
    if slow is not None:
        row |= {"nested_ms": 1e3 * slow, "nested_adapters": nested, "ratio": slow * count / seconds}
    return row, adapters


def singular_fp64(rows: Any) -> torch.Tensor:
    """Singular values of the centred rows, largest first, by a Gram matrix in fp64: its rounding is far below fp32."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], 8192):
        block = torch.from_numpy(np.array(rows[:, start : start + 8192], np.float64))
        block -= block.mean(0)
        gram += block @ block.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def bench_pca(adapters: LoraSet) -> dict[str, Any]:
    """The first 100 components by the route that is chosen, and by the SVD of all rows; both against fp64."""
    seconds, found = timed(lambda: pca(adapters.rows, K), 3)

    def full() -> torch.Tensor:
        x = torch.from_numpy(np.array(adapters.rows))
        x -= x.mean(0)
        return torch.linalg.svd(x, full_matrices=False)[1]

    slow, values = timed(full)
    true = singular_fp64(adapters.rows)[:K]
    error, full_error = (float(((own[:K] - true).abs() / true).max()) for own in (found.singular_values, values))
    return {"rows": len(adapters), "k": K, "route": found.method, "s": seconds, "full_s": slow, "error": error,
            "full_error": full_error, "ratio": slow / seconds}  # fmt: skip


def bench_singular(rank: int = 4, adapters: int = 16) -> dict[str, Any]:
    """Singular values of all 64 changes of an adapter of rank 4, from thin factors and from B A."""
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randn(adapters, o, rank, generator=generator), torch.randn(adapters, rank, i, generator=generator))
        for _, i, o in layers()
    ]
    scale = torch.ones(adapters)
    seconds, thin = timed(lambda: [lowrank_features(u, d, scale, quantiles=()).singular_values for u, d in pairs], 3)
    slow, dense = timed(lambda: [torch.linalg.svdvals(u[0] @ d[0])[:rank] for u, d in pairs])
    error = max(float(((t[0] - d).abs() / d).max()) for t, d in zip(thin, dense, strict=True))
    return {"changes": len(pairs), "rank": rank, "ms": 1e3 * seconds / adapters, "dense_ms": 1e3 * slow, "error": error,
            "ratio": slow * adapters / seconds}  # fmt: skip


def bench_many(
    place: Path, read_ms: float, adapters: LoraSet, count: int = 50_000, width: int = 1024
) -> dict[str, Any]:
    """50,000 rows streamed for real at a smaller width; d = 99,648 planned from what was measured.

    Memory of the full width is measured on the adapters there are, and on half of them: streaming holds blocks and
    bases, whose sizes do not depend on the number of rows.
    """
    path = place / "many.f32"
    generator = np.random.default_rng(0)
    with path.open("wb") as stream:
        for _ in range(50):
            stream.write(generator.standard_normal((count // 50, width), np.float32).data)
    rows = np.memmap(path, np.float32, "r", shape=(count, width))
    seconds, _ = timed(lambda: pca(rows, 20, method="streaming", iterations=2))
    peak = own_memory(lambda: pca(rows, 20, method="streaming", iterations=2))
    some = [len(adapters) // 2, len(adapters)]
    stream = partial(pca, adapters.rows, K, method="streaming", iterations=2)
    wide = [own_memory(partial(stream, index=range(number))) for number in some]
    passes = 4  # mean, two iterations, Rayleigh-Ritz
    rate = count * width * 4 * passes / seconds
    d = adapters.layout.width
    route, reason = choose(count, d)
    return {
        "adapters": count, "width": width, "s": seconds, "peak_mb": peak / 1e6, "file_mb": count * width * 4 / 1e6,
        "rate_mb_s": rate / 1e6, "plan_d": d, "plan_route": route, "plan_reason": reason,
        "plan_file_gb": count * d * 4 / 1e9, "plan_read_s": read_ms * count / 1e3,
        "plan_pass_s": count * d * 4 / rate, "wide_rows": some,
        "wide_peak_mb": [each / 1e6 for each in wide],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as a table in Markdown."""
    r, p, s, m = (result[name] for name in ("read", "pca", "singular", "many"))
    nested = f"{r['nested_ms']:.0f} ms" if "nested_ms" in r else "not measured"
    ratio = f"{r['ratio']:,.0f} x" if "ratio" in r else ""
    full = f" from fp64; the SVD {p['full_error']:.1e}" if "full_error" in p else ""
    wide, rows = m["wide_peak_mb"], m["wide_rows"]
    lines = [
        "| what | pysteer | the usual way | ratio | difference |",
        "|---|---|---|---|---|",
        f"| read {r['adapters']:,} adapters of d = {r['d']:,}, each | {r['ms']:.3f} ms | {nested} | {ratio} | none |",
        f"| PCA, k = {p['k']}, {p['rows']:,} rows ({p['route']}) | {p['s']:.2f} s | {p['full_s']:.1f} s | "
        f"{p['ratio']:.0f} x | {p['error']:.1e}{full} |",
        f"| singular values of {s['changes']} changes of rank {s['rank']} | {s['ms']:.2f} ms | "
        f"{s['dense_ms']:,.0f} ms | {s['ratio']:,.0f} x | {s['error']:.1e} |",
        "",
        f"{m['adapters']:,} rows of {m['width']:,} numbers ({m['file_mb']:.0f} MB) streamed in {m['s']:.1f} s with "
        f"{m['peak_mb']:.0f} MB of memory. Planned for d = {m['plan_d']:,}: a row file of {m['plan_file_gb']:.1f} GB, "
        f"read in {m['plan_read_s']:.0f} s, route {m['plan_route']}, {m['plan_pass_s']:.0f} s per pass over it, "
        f"{max(wide):,.0f} MB of memory: what {rows[1]:,} rows of that width take ({rows[0]:,} take {wide[0]:,.0f} MB, "
        "because memory does not grow with the rows).",
        "",
        f"{result['machine']['processor']}, {result['machine']['threads']} thread, CPU time, torch "
        f"{result['versions']['torch']}, {result['date'][:10]}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, store."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--nested", type=int, default=32, help="adapters read the usual way")
    parser.add_argument("--print", action="store_true", help="print the newest stored result")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    if asked.print:
        print(table(stored("weightspace")[-1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        read, adapters = bench_read(Path(folder), asked.adapters, asked.nested)
        print(read, flush=True)
        found = {"read": read, "pca": bench_pca(adapters), "singular": bench_singular()}
        print(found, flush=True)
        found["many"] = bench_many(Path(folder), read["ms"], adapters)
    result = {**machine(), **found}
    print(table(result))
    if not asked.dry_run:
        append("weightspace", result)


if __name__ == "__main__":
    main()
