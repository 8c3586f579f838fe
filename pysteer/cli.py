"""The command line: thin, and it imports what a command needs only when that command runs."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pysteer
from pysteer.commands import add_commands, show_examples
from pysteer.commands.shared import AsJson, Words, quiet_stdout, show_json, show_keys
from pysteer.errors import InputError

app = typer.Typer(
    name="pysteer",
    help="Steer and read the activations of image generators and language models.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pysteer {pysteer.__version__}")
        raise typer.Exit


# Newer typer carries its own copy of click, older ones import it: the base class is reached through typer itself.
_UsageError: Any = typer.BadParameter.__base__


def _recipes(incomplete: str) -> list[str]:
    """Names of recipes for the completion of the shell; nothing is imported for them."""
    from pysteer.recipes import recipe_modules

    return sorted(name for name in recipe_modules() if name.startswith(incomplete))


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# Options that are not known here are flags of the recipe: --flat-vec.
@app.command(context_settings={"ignore_unknown_options": True})
def run(
    name: Annotated[
        str | None, typer.Argument(help="The recipe; without it, the recipes are listed.", autocompletion=_recipes)
    ] = None,
    words: Words = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with values.")] = None,
    infinity: Annotated[Path | None, typer.Option(help="YAML file that names the Infinity weights to use.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("results"),
    run_name: Annotated[str | None, typer.Option("--name", help="Folder of this run.  [default: the recipe]")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another run in the same folder.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys of the recipe with their defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment; the same command continues a run that was interrupted.

    pysteer run methods generator=diffusion-shapes, pysteer run infinity-prototype variant=0 --name backwards
    """
    from pysteer.recipes import execute, find_recipe, recipe_notes

    if name is None:
        _show_recipes(recipe_notes(), as_json)
        return
    if keys:
        show_keys(find_recipe(name).config, as_json=as_json)
        return
    signal.signal(signal.SIGTERM, _terminate)
    with quiet_stdout(as_json):
        folder, summary = execute(
            name,
            words or [],
            config_file=config,
            values={"infinity": str(infinity)} if infinity is not None else None,
            out=out,
            run_name=run_name,
            overwrite=overwrite,
        )
    if as_json:
        from pysteer import files

        show_json({"folder": str(folder), **files.read_json(folder / "summary.json", "summary")})
        return
    _show_result(folder, summary.best)


def _show_recipes(notes: dict[str, str], as_json: bool) -> None:
    if as_json:
        show_json([{"name": name, "note": note} for name, note in sorted(notes.items())])
        return
    for name, note in sorted(notes.items()):
        typer.echo(f"{name:24} {note}")


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # unwinds, so that nothing is left half-written


def _show_result(folder: Path, best: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    figures = ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in best.items()
    )
    if figures:
        console.print(f"best: {figures}", markup=False, highlight=False, soft_wrap=True)
    for title, file in (("report", "report.html"), ("summary", "summary.json")):
        if (folder / file).is_file():
            console.print(f"{title}: {folder / file}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def locate(
    words: Words = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("results"),
    run_name: Annotated[str | None, typer.Option("--name", help="Folder of this run.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another run in the same folder.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys with their defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find the sites and steps that carry the difference between two prompts; short for `pysteer run locate`.

    pysteer locate 'pairs=red->blue'
    """
    run("locate", words, out=out, run_name=run_name, overwrite=overwrite, keys=keys, as_json=as_json)


@app.command()
def grid(
    folder: Annotated[Path | None, typer.Argument(help="Folder the setup files go to.")] = None,
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name the files.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys with their defaults.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a family of setup files, one for every combination of scales, layers and strengths.

    pysteer grid setup scales=all,3-4 strength_cond=1,2,4
    """
    from pysteer.recipes.grid import GridConfig, write_grid

    if keys:
        show_keys(GridConfig, as_json=as_json)
        return
    if folder is None:
        raise InputError("missing folder", fix="write for example pysteer grid setup strength_cond=1,2,4")
    paths = write_grid(folder, words or [], dry_run=dry_run)
    if as_json:
        show_json([str(path) for path in paths])
    elif dry_run:
        typer.echo("\n".join(str(path) for path in paths))
    else:
        typer.echo(f"{len(paths)} setup files in {folder}")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and which kernels are in use and why others are not.

    pysteer env, pysteer env --json
    """
    from pysteer.environment import describe

    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    _show_environment(found)


def _show_environment(found: dict[str, Any]) -> None:
    lines = [("pysteer", found["pysteer"]), ("python", f"{found['python']} on {found['platform']}")]
    lines += [(name, version or "not installed") for name, version in found["packages"].items()]
    extension = found["extension"]
    if extension["available"]:
        cuda = (
            f"CUDA {extension['cuda_version']}, {extension['cuda_architectures']}"
            if extension["has_cuda"]
            else "no CUDA"
        )
        lines.append(("extension", f"{extension['compiler']}, {cuda}, {extension['openmp_threads']} OpenMP threads"))
        have = [name for name, there in extension["cpu_features"].items() if there]
        lines.append(("processor", ", ".join(have) or "baseline instructions"))
    else:
        lines.append(("extension", f"not available: {extension['reason']}"))
    for device in found["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append((device["device"], f"{device['name']} ({rest})"))
    for name, status in found["backends"].items():
        lines.append((f"backend {name}", "live" if status["live"] else f"not live: {status['reason']}"))
    for label, text in lines:
        typer.echo(f"{label:18} {text}")


add_commands(app)
show_examples(app)


# Module -> the extra that brings it; all others come with demo.
EXTRAS = {
    "starlette": "ui", "uvicorn": "ui", "diffusers": "diffusion", "gguf": "language", "accelerate": "language",
    "duckdb": "sweep", "optuna": "sweep", "submitit": "slurm", "ray": "ray", "sklearn": "weightspace",
    "scipy": "weightspace", "tensorboard": "tracking", "wandb": "tracking",
}  # fmt: skip


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Entry point of the `pysteer` command: 0 done, 2 input that cannot be used, 130 interrupted."""
    from pysteer.environment import keep_freed_memory

    keep_freed_memory()
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors about the input are one line on stderr."""
    try:
        code = app(arguments, prog_name="pysteer", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        print(f"pysteer: {_one_line(error)}", file=sys.stderr)
        return 2
    except _UsageError as error:
        print(f"pysteer: {error.format_message()} (see pysteer --help)", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "pysteer":
            raise
        extra = EXTRAS.get(error.name.split(".")[0], "demo")
        fix = f"pip install 'pysteer-core[{extra}]'"
        print(f"pysteer: this command needs {error.name}, which is not installed; fix: {fix}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("pysteer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    main()
