"""A simulator of sweeps on many GPUs, driven by measured batch costs: stragglers, failures, store size, compaction.

    python -m pysteer.sweep.simulate --cells 1e6 --gpus 64

Workers take batches of one queue, as the process pool and Ray do, or have fixed slices, as jobs of SLURM do. A batch
takes the measured time with log-normal spread, each GPU has its own speed, and a GPU fails at exponential times; it
comes back after a while, and the batch it had runs again, with every finished one kept. Batches are drawn in bulk.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from dataclasses import asdict, dataclass

import numpy as np

from pysteer.errors import InputError

_WHOLE = 2_000_000  # batches that are simulated one by one


@dataclass(frozen=True)
class Costs:
    """What was measured of one worker.

    Attributes:
        batch_seconds: of a full batch, generation, evaluation and writing.
        batch_size: cells of it.
        spread: standard deviation of the logarithm of a batch's time.
        speeds: that of a GPU's speed: other cards, neighbours, heat.
        start_seconds: until a worker is ready: import, loading, fits.
        row_bytes, image_bytes: in a shard, and of an image.
        shard_bytes: of a shard beyond its rows.
        merge_rows_per_second: of compaction.
    """

    batch_seconds: float = 2.0
    batch_size: int = 64
    spread: float = 0.1
    speeds: float = 0.05
    start_seconds: float = 20.0
    row_bytes: float = 90.0
    image_bytes: float = 5000.0
    shard_bytes: float = 12000.0
    merge_rows_per_second: float = 1e5

    def __post_init__(self) -> None:
        if min(self.batch_seconds, self.batch_size) <= 0 or min(self.spread, self.speeds, self.start_seconds) < 0:
            raise InputError("costs", value=self, allowed="seconds and sizes above 0, spreads from 0")


@dataclass(frozen=True)
class Simulated:
    """What a simulated sweep took.

    Attributes:
        cells, gpus, batches: of the sweep.
        hours: from start to end.
        ideal_hours: with every GPU busy all the time.
        efficiency: the latter over the former.
        idle: part of the GPU time in which a GPU waited for the last ones.
        failures: GPUs that failed.
        redone: cells that ran again.
        shards: files written before compaction, and after.
        store_gb: rows and images, in 10^9 bytes.
        merge_hours: of compaction by one process, meanwhile.
    """

    cells: int
    gpus: int
    batches: int
    hours: float
    ideal_hours: float
    efficiency: float
    idle: float
    failures: int
    redone: int
    shards: tuple[int, int]
    store_gb: float
    merge_hours: float


def simulate(
    cells: int, gpus: int, costs: Costs | None = None, *, mtbf_hours: float = math.inf, repair_hours: float = 0.1,
    slices: bool = False, seed: int = 0,
) -> Simulated:  # fmt: skip
    """Schedule `cells` on `gpus`.

    Args:
        mtbf_hours: mean time between failures of one GPU.
        repair_hours: until a GPU that failed works again.
        slices: fixed parts instead of one queue.
        seed: of all that is drawn.

    Raises:
        InputError: numbers that make no sweep.
    """
    costs = costs or Costs()
    if cells < 1 or gpus < 1 or mtbf_hours <= 0 or repair_hours < 0:
        given = f"{cells} cells, {gpus} GPUs, failing every {mtbf_hours} h"
        raise InputError("simulation", value=given, allowed="at least 1 cell, 1 GPU, and a time above 0")
    rng = np.random.default_rng(seed)
    batches = -(-cells // costs.batch_size)
    speed = np.exp(rng.normal(0, costs.speeds, gpus))
    bundle = max(1, -(-batches // _WHOLE))  # batches drawn at once where there are too many
    times = _batch_times(rng, costs, batches, bundle)
    ends, failures, redone = _run(rng, costs, times, speed, mtbf_hours * 3600, repair_hours * 3600, slices)
    total, work = float(ends.max()), float(times.sum() / speed.mean())
    ideal = work / gpus + costs.start_seconds
    shards = batches, max(gpus, -(-cells // 50_000))
    size = cells * (costs.row_bytes + costs.image_bytes) + shards[1] * costs.shard_bytes
    return Simulated(
        cells, gpus, batches, total / 3600, ideal / 3600, ideal / total, float((total - ends).mean() / total),
        failures, redone * costs.batch_size, shards, size / 1e9, 2 * cells / costs.merge_rows_per_second / 3600,
    )  # fmt: skip


def _batch_times(rng: np.random.Generator, costs: Costs, batches: int, bundle: int) -> np.ndarray:
    """Seconds of every batch, or of every bundle of them (the sum of log-normal times, by its mean and variance)."""
    scale = costs.batch_seconds * math.exp(-(costs.spread**2) / 2)
    if bundle == 1:
        return scale * np.exp(rng.normal(0, costs.spread, batches))
    deviation = costs.batch_seconds * math.sqrt(math.expm1(costs.spread**2) * bundle)
    count = -(-batches // bundle)
    return np.maximum(rng.normal(costs.batch_seconds * bundle, deviation, count), 0.1 * costs.batch_seconds)


def _run(
    rng: np.random.Generator,
    costs: Costs,
    times: np.ndarray,
    speed: np.ndarray,
    mtbf: float,
    repair: float,
    slices: bool,
) -> tuple[np.ndarray, int, int]:
    """When every GPU is done with its last batch, failures, and batches that ran again."""
    gpus = len(speed)
    fails = rng.exponential(mtbf, gpus) if math.isfinite(mtbf) else np.full(gpus, math.inf)
    ends = np.full(gpus, costs.start_seconds)
    failures = redone = 0
    parts = np.array_split(times, gpus) if slices else None
    place = [0] * gpus
    queue = [(costs.start_seconds, g) for g in range(gpus)]
    heapq.heapify(queue)
    taken, count = 0, len(times)
    while queue:
        now, g = heapq.heappop(queue)
        if parts is None:
            if taken == count:
                continue
            seconds, taken = times[taken] / speed[g], taken + 1
        else:
            if place[g] == len(parts[g]):
                continue
            seconds, place[g] = parts[g][place[g]] / speed[g], place[g] + 1
        while now + seconds > fails[g]:
            failures, redone = failures + 1, redone + 1
            now = fails[g] + repair + costs.start_seconds
            fails[g] = now + rng.exponential(mtbf)
        ends[g] = now + seconds
        heapq.heappush(queue, (ends[g], g))
    return ends, failures, redone


def table(costs: Costs, mtbf_hours: float) -> str:
    """10^3 to 10^7 cells on 1 to 1,024 GPUs, with one queue and with slices."""
    lines = [
        "| cells | GPUs | hours | busy, queue | busy, slices | failures | again, % | shards | merged | store, GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cells in (10**3, 10**5, 10**6, 10**7):
        for gpus in (1, 16, 128, 1024):
            one = simulate(cells, gpus, costs, mtbf_hours=mtbf_hours)
            cut = simulate(cells, gpus, costs, mtbf_hours=mtbf_hours, slices=True)
            again = 100 * one.redone / cells
            lines.append(
                f"| {cells:,} | {gpus:,} | {one.hours:.2f} | {one.efficiency:.0%} | {cut.efficiency:.0%} "
                f"| {one.failures} | {again:.2f} | {one.shards[0]:,} | {one.shards[1]:,} | {one.store_gb:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=float, default=0, help="one case instead of the table")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--mtbf-hours", type=float, default=500.0)
    parser.add_argument("--batch-seconds", type=float, default=Costs.batch_seconds)
    parser.add_argument("--batch-size", type=int, default=Costs.batch_size)
    parser.add_argument("--slices", action="store_true")
    given = parser.parse_args()
    costs = Costs(batch_seconds=given.batch_seconds, batch_size=given.batch_size)
    if given.cells:
        made = simulate(int(given.cells), given.gpus, costs, mtbf_hours=given.mtbf_hours, slices=given.slices)
        print(json.dumps(asdict(made), indent=2))
    else:
        print(table(costs, given.mtbf_hours))


if __name__ == "__main__":
    main()
