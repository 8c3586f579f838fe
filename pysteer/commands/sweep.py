"""The command that runs sweeps."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.commands.shared import AsJson, Words, progress_bars, quiet_stdout, show_json, show_keys
from pysteer.errors import InputError

app = typer.Typer()


@app.command("sweep")
def sweep_command(
    task: Annotated[str | None, typer.Argument(help="images, texts, a recipe, or MODULE:CLASS.")] = None,
    words: Words = None,
    name: Annotated[str | None, typer.Option(help="Folder of this sweep.  [default: the task]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all sweeps.")] = Path("results"),
    zipped: Annotated[list[str] | None, typer.Option("--zip", help="Axes that go along: --zip strength,step.")] = None,
    samples: Annotated[int, typer.Option(help="Points to draw along axes such as strength=uniform(0,2).")] = 0,
    sampling: Annotated[str, typer.Option(help="random or sobol.")] = "random",
    sample_seed: Annotated[int, typer.Option(help="Seed of the points.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Cells per batch; 0 for that of the task.")] = 0,
    adaptive: Annotated[
        str | None, typer.Option(help="halving or pareto: search the axes that are drawn from.")
    ] = None,
    launcher: Annotated[str, typer.Option(help="local, processes, slurm or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes, jobs or actors; 0 chooses.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads per worker; 0 divides the cores.")] = 0,
    minutes: Annotated[int, typer.Option(help="Time limit of a job of SLURM.")] = 60,
    partition: Annotated[str, typer.Option(help="Partition of SLURM.")] = "",
    gpus: Annotated[int, typer.Option(help="GPUs per job or actor.")] = 0,
    wait: Annotated[bool, typer.Option(help="Wait for the jobs of SLURM.")] = True,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and how long it takes.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys of the task with their defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run every combination of values, many to a batch; the same command continues a sweep that was interrupted.

    pysteer sweep images 'pair=red->blue' method=prototype strength=0,1,2 site=ca prompts=8, pysteer sweep images --keys
    """
    import signal

    from pysteer.sweep.driver import Launch, run_sweep
    from pysteer.sweep.plan import Options, plan_sweep

    if task is None:
        raise InputError("missing task", allowed="images, texts, a recipe, or MODULE:CLASS", fix="pysteer sweep images")
    if keys:
        _show_task_keys(task, as_json)
        return
    launch = Launch(launcher, workers, threads, minutes, partition, gpus, wait=wait)
    groups = tuple(tuple(part.strip() for part in group.split(",")) for group in zipped or ())
    chosen: Any = sampling
    options = Options(groups, samples, chosen, sample_seed, batch_size)
    folder = out / (name or task.replace(":", "-"))
    signal.signal(signal.SIGTERM, _terminate)
    if adaptive is not None:
        from pysteer.sweep.adaptive import search_command

        if as_json:
            raise InputError("--json", value="with --adaptive", fix="pysteer results --json afterwards")
        search_command(adaptive, task, words or [], options, folder, launch)
        return
    plan = plan_sweep(task, words or [], options)
    if dry_run:
        _show_estimate(plan, folder, launch, as_json)
        return
    with quiet_stdout(as_json), progress_bars().follow("cells", len(plan)) as show:
        done = run_sweep(plan, folder, launch=launch, words=words or [], retry_failed=retry_failed, show=show)
    _show_outcome(done, folder, as_json)


def _show_task_keys(task: str, as_json: bool) -> None:
    from pysteer.recipes.config import describe_fields
    from pysteer.sweep.tasks.base import find_task

    found = find_task(task)
    if as_json:
        rows = [{"key": key, "note": note} for key, note in found.options().items()]
        show_json([*describe_fields(found.setting), *rows])
        return
    show_keys(found.setting)
    for option, note in found.options().items():
        typer.echo(f"{option}=  ({note})")


def _show_estimate(plan: Any, folder: Path, launch: Any, as_json: bool) -> None:
    import dataclasses

    from pysteer.sweep.estimate import estimate

    with quiet_stdout(as_json):
        found = estimate(plan, folder, launch)
    if as_json:
        show_json({**dataclasses.asdict(found), "seconds": found.seconds})
        return
    for line in found.lines():
        typer.echo(line)


def _show_outcome(done: Any, folder: Path, as_json: bool) -> None:
    import dataclasses

    if as_json:
        show_json({"folder": str(folder), **dataclasses.asdict(done)})
        return
    for each in done.damaged:
        typer.echo(f"set aside: {each.name}, {each.reason}; its cells ran again")
    before = f", {done.finished_before} finished before" if done.finished_before else ""
    failed = f", {done.failed} failed (pysteer query \"select key, error from cells where status = 'failed'\")"
    typer.echo(f"{done.ran} cells in {done.seconds:.1f} s{before}{failed if done.failed else ''}: {folder}")


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
