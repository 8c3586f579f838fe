"""A sweep against the sequential way: one setting per run, a strength as a Python number, a baseline each.

    python -m bench.sweep --store            # measures and keeps the result
    python -m bench.sweep --table            # prints what is kept

64 settings x 8 prompts on the bundled Infinity: two sites, four ranges of scales, eight strengths. The sequential way
generates the 8 unsteered images and then the 8 steered ones of every setting, steered by a forward hook in plain
torch as the published steering code does it, judges them and writes them to PNG files. It is measured on some of the
settings and counted for all of them, twice: as runs of a script, a process each that loads the model as scripts do,
and as a loop in one process in which the model is loaded already. The sweep is measured in the same two ways, as
`pysteer sweep` in a process of its own and in this process without loading. Fitting is left out everywhere. Rows are
packed, then prefixes are shared as well, then there is a process per core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bench.record import append, machine, stored
from pysteer import zoo
from pysteer.recipes.config import build_config
from pysteer.recipes.prototype.data import parse_pair
from pysteer.recipes.prototype.judge import ShapesJudge
from pysteer.sweep import Launch, Options, SweepPlan, plan_sweep, run_sweep
from pysteer.sweep.runs import noise_seed
from pysteer.sweep.store import Store
from pysteer.sweep.tasks.images import ImagesEngine, ImageSetting
from pysteer.sweep.tasks.judging import measure as measure_images

STRENGTHS = "linspace(0.25,2,8)"


def words(prompts: int, model: str, share: bool) -> list[str]:
    """The sweep."""
    return [
        f"model={model}", "pair=red->blue", "method=prototype:clusters=64", "site=ca,ca_block", "step=all,2-4,3-4,4",
        f"strength={STRENGTHS}", f"prompts={prompts}", f"share={str(share).lower()}",
    ]  # fmt: skip


@contextmanager
def hooked(engine: ImagesEngine, setting: ImageSetting) -> Iterator[None]:
    """Steer as scripts do: a hook per layer, the scale from a Python number, parameters looked up in a dictionary."""
    plan, _ = engine.plan(setting)
    transformer, hooks = engine.pipe.transformer, []
    now = {"step": 0}

    def follow(module: Any, args: Any) -> None:
        now["step"] = int(transformer.clock)

    def make(bank: dict[int, dict[str, Tensor]], strengths: dict[int, float]) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            step = now["step"]
            if strengths.get(step, 0.0) == 0.0:
                return out
            p, half = bank[step], len(out) // 2
            x = out[:half].float()
            near = (x @ p["weight"].to(x.device).T + p["offset"].to(x.device)).argmax(-1)
            out = out.clone()
            out[:half] += strengths[step] * setting.strength * p["delta"].to(x.device)[near].to(out.dtype)
            return out

        return hook

    try:
        hooks.append(transformer.blocks[0].register_forward_pre_hook(follow))
        for entry in plan.entries:
            e = entry.parameters
            assert e.steps is not None
            bank = {step: {n: t[i] for n, t in e.tensors.items()} for i, step in enumerate(e.steps)}
            kind, layer = e.site.rsplit(".", 1)
            block = transformer.blocks[int(layer)]
            target = block if kind == "ca_block" else getattr(block, kind)
            hooks.append(target.register_forward_hook(make(bank, {s: entry.at(s)[0] for s in e.steps})))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sampled(plan: SweepPlan, count: int) -> list[list[ImageSetting]]:
    """The rows of `count` settings, spread over all of them."""
    settings: dict[Any, list[ImageSetting]] = {}
    for i in range(len(plan)):
        s = build_config(ImageSetting, plan.cells.config(i))
        settings.setdefault((s.site, s.step, s.strength), []).append(s)
    return list(settings.values())[:: max(1, len(settings) // count)][:count]


def run_setting(engine: ImagesEngine, rows: Sequence[ImageSetting], folder: Path) -> Tensor:
    """One setting as scripts run it: the unsteered images, the steered ones, what a classifier sees, files of both."""
    prompts, seeds = [s.prompt for s in rows], [noise_seed(s.prompt, s.seed) for s in rows]
    before = engine.pipe(prompts, seeds=seeds).images.cpu()
    with hooked(engine, rows[0]):
        images = engine.pipe(prompts, seeds=seeds).images.cpu()
    pair = parse_pair(rows[0].pair, 1)
    judge = ShapesJudge(zoo.load_classifier("shapes"))
    found = measure_images(judge, pair, images, before, prompts)
    folder.mkdir(parents=True)
    for name, some in (("unsteered", before), ("steered", images)):
        for i, image in enumerate(some):
            Image.fromarray(image.numpy()).save(folder / f"{name}-{i}.png")
    (folder / "measures.json").write_text(json.dumps(found))
    return images


def sequential(engine: ImagesEngine, chosen: list[list[ImageSetting]], out: Path) -> tuple[float, float, int]:
    """Seconds and processor seconds of a loop, and how many images differ from the sweep's own rows."""
    for rows in chosen:  # parameters are read before the clock runs
        engine.plan(rows[0])
    differ, seconds, used = 0, 0.0, 0.0
    for number, rows in enumerate(chosen):
        start, cpu = time.perf_counter(), time.process_time()
        images = run_setting(engine, rows, out / f"loop-{number}")
        seconds, used = seconds + time.perf_counter() - start, used + time.process_time() - cpu
        ours = engine.generate(rows).images
        assert ours is not None
        far = (images.int() - ours.int()).abs().amax((1, 2, 3)) > 2
        differ += int(far.sum())
    return seconds, used, differ


def one_run(setting: int, sample: int, prompts: int, model: str, folder: Path) -> None:
    """One setting of the sample as a script of its own would run it; parameters are in `folder` already."""
    plan = plan_sweep("images", words(prompts, model, True), Options())
    rows = sampled(plan, sample)[setting]
    engine = plan.task.open(rows[0], folder)
    assert isinstance(engine, ImagesEngine)
    run_setting(engine, rows, folder / f"run-{setting}")


def as_processes(out: Path, found: dict[str, Any], sample: int) -> dict[str, Any]:
    """Seconds of a process per setting, counted for all settings, and of the sweep as one process."""
    model, prompts, fits = found["model"], found["prompts"], out / "shared" / "fits"
    _copy(fits, out / "runs" / "fits")
    start, cpu = time.perf_counter(), _processor_seconds()
    for setting in range(sample):
        given = [str(each) for each in (setting, sample, prompts, model, out / "runs")]
        subprocess.run([sys.executable, "-m", "bench.sweep", "--one-run", *given], check=True)
    times = found["settings"] / sample
    every = {"runs_seconds": (time.perf_counter() - start) * times, "runs_cpu": (_processor_seconds() - cpu) * times}
    own, folder = words(prompts, model, True), out / "command"
    Store(folder).create(plan_sweep("images", own, Options()).mark(own))
    _copy(fits, folder / "fits")
    start, cpu = time.perf_counter(), _processor_seconds()
    command = [sys.executable, "-m", "pysteer.cli", "sweep", "images", *own, "--out", str(out), "--name", "command"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - start, _processor_seconds() - cpu
    done = Store(folder).workers().values()
    assert sum(state["done"] for state in done) == found["settings"] * prompts, done
    return every | {"command_seconds": seconds, "command_cpu": used}


def measure(model: str, prompts: int, sample: int, processes: bool) -> dict[str, Any]:
    """Everything, in one run."""
    found: dict[str, Any] = {"model": model, "prompts": prompts}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        plan = plan_sweep("images", words(prompts, model, True), Options())
        first = build_config(ImageSetting, plan.cells.config(0))
        engine = plan.task.open(first, out / "shared")
        assert isinstance(engine, ImagesEngine)
        engine.generate([build_config(ImageSetting, plan.cells.config(i)) for i in range(0, len(plan), prompts)][:8])
        for name in ("packed", "processes"):  # parameters are fitted beforehand, for everybody
            _copy(out / "shared" / "fits", out / name / "fits")
        found["settings"] = len(plan) // prompts
        seconds, used, differ = sequential(engine, sampled(plan, sample), out)
        times = found["settings"] / sample
        found |= {"sequential_sample": sample, "sequential_seconds": seconds * times, "sequential_cpu": used * times}
        found["images_that_differ_of"] = [differ, sample * prompts]
        found |= as_processes(out, found, sample)
        for share in (False, True):
            found |= timed("shared" if share else "packed", out, words(prompts, model, share), Launch())
        if processes:
            cores = len(os.sched_getaffinity(0))
            found |= timed("processes", out, words(prompts, model, True), Launch("processes", workers=cores))
    return found


def timed(name: str, out: Path, own: list[str], launch: Launch) -> dict[str, Any]:
    """Seconds of a sweep with cells per second, in a folder that holds the fits and nothing else."""
    fits, folder = out / name / "fits", out / f"{name}-run"
    plan = plan_sweep("images", own, Options())
    Store(folder).create(plan.mark(own))
    _copy(fits, folder / "fits")
    if launch.launcher == "local":  # loading is left out, as it is of the sequential way
        plan.check()
    start, cpu = time.perf_counter(), _processor_seconds()
    outcome = run_sweep(plan, folder, launch=launch)
    seconds, used = time.perf_counter() - start, _processor_seconds() - cpu
    assert (outcome.ran, outcome.failed) == (len(plan), 0), outcome
    works = [state["work"] for state in Store(folder).workers().values()]
    work = sum(w[0] for w in works) / max(1e-9, sum(w[1] for w in works))
    return {f"{name}_seconds": seconds, f"{name}_cpu": used, f"{name}_work": work}


def _processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def table(result: dict[str, Any]) -> str:
    """The result in lines."""
    lines = [
        "| way | seconds | times faster | processor seconds | times less | model work |",
        "|---|---|---|---|---|---|",
    ]
    named = {
        "runs": "one setting per run: a process each, hooks, a baseline each",
        "command": "`pysteer sweep`, one process, loading included",
        "sequential": "the same runs as a loop, the model loaded already",
        "packed": "rows packed, no shared prefixes, loaded already",
        "shared": "rows packed, prefixes shared, loaded already",
        "processes": "the same, a process per core",
    }  # fmt: skip
    for key, label in named.items():
        if f"{key}_seconds" in result:
            base = "runs" if key in ("runs", "command") else "sequential"
            first, cost = result[f"{base}_seconds"], result[f"{base}_cpu"]
            seconds, work = result[f"{key}_seconds"], result.get(f"{key}_work")
            part = "" if work is None else f"{work:.2f} of one run per cell"
            used = result[f"{key}_cpu"]
            lines.append(
                f"| {label} | {seconds:.1f} | {first / seconds:.2f} | {used:.1f} | {cost / used:.2f} | {part} |"
            )
    count, settings = result["sequential_sample"], result["settings"]
    lines.append("")
    lines.append(
        f"{settings} settings x {result['prompts']} prompts on {result['model']}; the others are held against the row "
        f"of runs or that of the loop, measured on {count} settings; {result['images_that_differ_of'][0]} of "
        f"{result['images_that_differ_of'][1]} images differ from those of the hooks."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep the result")
    parser.add_argument("--table", action="store_true", help="print the last kept result, measure nothing")
    parser.add_argument("--model", default="infinity-shapes")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--sample", type=int, default=8, help="settings that the sequential way is measured on")
    parser.add_argument("--processes", action="store_true", help="also in one process per core")
    parser.add_argument("--one-run", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_run:
        setting, sample, prompts, model, folder = given.one_run
        one_run(int(setting), int(sample), int(prompts), model, Path(folder))
        return
    if given.table:
        print(table(stored("sweep")[-1]["sweep"]))
        return
    result = measure(given.model, given.prompts, given.sample, given.processes)
    print(table(result))
    if given.store:
        print(append("sweep", {**machine(), "sweep": result}))


if __name__ == "__main__":
    main()
