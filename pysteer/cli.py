"""The command line: thin, and it imports what a command needs only when that command runs."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pysteer
from pysteer.errors import InputError

app = typer.Typer(
    name="pysteer",
    help="Steer and read the activations of image generators and language models.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace defaults.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pysteer {pysteer.__version__}")
        raise typer.Exit


# Newer typer carries its own copy of click, older ones import it: the base class is reached through typer itself.
_UsageError: Any = typer.BadParameter.__base__


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="The recipe; without it, the recipes are listed.")] = None,
    words: Words = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with values.")] = None,
    infinity: Annotated[Path | None, typer.Option(help="YAML file that names the Infinity weights to use.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("results"),
    run_name: Annotated[str | None, typer.Option("--name", help="Folder of this run.  [default: the recipe]")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another run in the same folder.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys of the recipe with their defaults.")] = False,
) -> None:
    """Run an experiment; the same command continues a run that was interrupted."""
    from pysteer.recipes import execute, find_recipe, recipe_modules

    if name is None:
        for known in sorted(recipe_modules()):
            typer.echo(f"{known:24} {(find_recipe(known).function.__doc__ or '').strip().splitlines()[0]}")
        return
    if keys:
        _show_keys(find_recipe(name).config)
        return
    signal.signal(signal.SIGTERM, _terminate)
    folder, summary = execute(
        name,
        words or [],
        config_file=config,
        values={"infinity": str(infinity)} if infinity is not None else None,
        out=out,
        run_name=run_name,
        overwrite=overwrite,
    )
    _show_result(folder, summary.best)


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # unwinds, so that nothing is left half-written


def _show_keys(kind: type) -> None:
    import dataclasses
    import typing

    from pysteer.recipes.config import config_values, describe, field_notes

    hints, notes, defaults = typing.get_type_hints(kind), field_notes(kind), config_values(kind())
    for field in dataclasses.fields(kind):
        default = defaults[field.name]
        shown = json.dumps(default) if isinstance(default, (bool, list, dict)) else default
        typer.echo(f"{field.name}={'' if default is None else shown}  ({describe(hints[field.name])})")
        if field.name in notes:
            typer.echo(f"    {notes[field.name]}")


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
) -> None:
    """Find the sites and steps that carry the difference between two prompts; short for `pysteer run locate`."""
    run("locate", words, out=out, run_name=run_name, overwrite=overwrite, keys=keys)


@app.command()
def grid(
    folder: Annotated[Path | None, typer.Argument(help="Folder the setup files go to.")] = None,
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name the files.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the keys with their defaults.")] = False,
) -> None:
    """Write a family of setup files, one for every combination of scales, layers and strengths."""
    from pysteer.recipes.grid import GridConfig, write_grid

    if keys:
        _show_keys(GridConfig)
        return
    if folder is None:
        raise InputError("missing folder", fix="write for example pysteer grid setup strength_cond=1,2,4")
    paths = write_grid(folder, words or [], dry_run=dry_run)
    if dry_run:
        typer.echo("\n".join(str(path) for path in paths))
    else:
        typer.echo(f"{len(paths)} setup files in {folder}")


@app.command("capture")
def capture_command(
    model: Annotated[str, typer.Argument(help="A generator of the zoo, smollm2, a folder, or a name of the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the activations or moments.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: .txt, .json, .jsonl, .csv or .tsv.")],
    sites: Annotated[str, typer.Option(help="Names, short names or regular expressions, with commas between.")],
    steps: Annotated[str | None, typer.Option(help="Steps to keep, such as 0,3,4.  [default: all]")] = None,
    pool: Annotated[str, typer.Option(help="tokens, mean, max, min or last.")] = "mean",
    moments: Annotated[bool, typer.Option("--moments", help="Keep means and variances only.")] = False,
    gram: Annotated[bool, typer.Option("--gram", help="With --moments: the covariance too.")] = False,
    positions: Annotated[str, typer.Option(help="all, last or a slice such as 1: or -3:.")] = "all",
    rows: Annotated[str, typer.Option(help="cond or uncond.")] = "cond",
    seed: Annotated[int, typer.Option(help="Noise seed of the first prompt.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts per run.")] = 16,
    dtype: Annotated[str, typer.Option(help="Type to store: keep, fp32, bf16 or fp16.")] = "keep",
) -> None:
    """Run prompts and keep the activations at sites; the same command continues an interrupted capture."""
    from pysteer.capture import capture, capture_moments
    from pysteer.capture.prompts import read_prompts
    from pysteer.models.load import load_model

    texts, labels = read_prompts(prompts)
    given: dict[str, Any] = {
        "sites": sites.split(","), "steps": _numbers(steps), "pool": pool, "rows": rows, "seeds": seed,
        "positions": _positions(positions), "batch_size": batch_size,
    }  # fmt: skip
    pipe = load_model(model)
    with _progress().follow("capture", len(texts)) as show:
        if moments:
            found = capture_moments(pipe, texts, gram=gram, progress=show, **given)
            found.save_pretrained(out)
            typer.echo(f"moments of {len(found.values)} places in {out}")
            return
        store = capture(pipe, texts, out, labels=labels, dtype=dtype, progress=show, **given)
    typer.echo(f"{len(texts)} prompts at {len(store.pieces)} places in {out}")


@app.command("fit")
def fit_command(
    method: Annotated[str, typer.Argument(help="Name of the method.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the fitted parameters.")],
    words: Words = None,
    source: Annotated[Path | None, typer.Option(help="Captured activations or moments to be changed.")] = None,
    target: Annotated[Path | None, typer.Option(help="Those they should come to resemble.")] = None,
    source_label: Annotated[str | None, typer.Option(help="Class of the source within its folder.")] = None,
    target_label: Annotated[str | None, typer.Option(help="Class of the target within its folder.")] = None,
    paired: Annotated[bool, typer.Option("--paired", help="Prompt i of one belongs to prompt i of the other.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List the options of the method with their defaults.")] = False,
) -> None:
    """Fit a method from what `pysteer capture` kept."""
    from pysteer.capture import fit_stored
    from pysteer.methods import REGISTRY, create
    from pysteer.recipes.config import build_config, parse_words

    create(method)  # says which methods there are
    if keys:
        _show_keys(REGISTRY[method])
        return
    if source is None or target is None:
        raise InputError("missing source or target", fix="give --source FOLDER and --target FOLDER")
    chosen = build_config(REGISTRY[method], parse_words(words or []))
    stored = [_stored(source, source_label), _stored(target, target_label)]
    with _progress().follow("fit") as show:
        fitted = fit_stored(chosen, *stored, paired=paired, progress=show)
    fitted.save_pretrained(out)
    typer.echo(f"{method} at {len(fitted.parameters)} sites in {out}")


def _stored(folder: Path, label: str | None) -> Any:
    from pysteer.capture import ActivationStore, Moments

    if (folder / "moments.json").is_file():
        if label is not None:
            raise InputError("label of moments", value=label, allowed="none: moments are of one class")
        return Moments.from_pretrained(folder)
    store = ActivationStore.open(folder)
    return store if label is None else store.where(label)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError("steps", value=text, allowed="whole numbers with commas between") from None


def _positions(text: str) -> Any:
    if ":" not in text:
        return text
    first, _, last = text.partition(":")
    try:
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise InputError("positions", value=text, allowed="all, last or a slice such as 1: or -3:") from None


def _progress() -> Any:
    """Bars or lines with rate and time left on stderr."""
    from rich.console import Console

    from pysteer.recipes.progress import Progress

    return Progress(Console(stderr=True))


@app.command("bake")
def bake_command(
    model: Annotated[str, typer.Argument(help="A generator of the zoo, smollm2, a folder, or a name of the hub.")],
    fitted: Annotated[Path, typer.Argument(help="Folder of fitted parameters.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    strength: Annotated[float, typer.Option(help="Factor on the fitted change.")] = 1.0,
    rows: Annotated[str | None, typer.Option(help="cond, uncond or both.  [default: as fitted]")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Write a LoRA instead of the whole model.")] = False,
    rank: Annotated[int | None, typer.Option(help="Highest rank of the LoRA; cuts off what is above.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights: fp32, bf16 or fp16.")] = None,
) -> None:
    """Fold fitted parameters into the weights of a model, for use without pysteer."""
    from pysteer import files
    from pysteer.capture import Fitted
    from pysteer.models.load import load_model
    from pysteer.steering import bake, bake_lora
    from pysteer.steering.bake import find_edits

    if rank is not None and not lora:
        raise InputError("rank without a LoRA", value=rank, fix="add --lora")
    plan = Fitted.from_pretrained(fitted).plan(rows=rows)
    with files.new_folder(out) as folder:
        loaded = load_model(model, **_torch_dtype(dtype))
        edits = find_edits(loaded, plan, strength=strength, lora=lora)
        if lora:
            made = bake_lora(loaded, plan, strength=strength, rank=rank)
            made.save_pretrained(folder)
            for path, error in made.errors.items():
                typer.echo(f"{path}: rank {rank} leaves out {error:.1%} of the change")
        else:
            _save_model(bake(loaded, plan, strength=strength, inplace=True), folder)
    for part, found in edits.items():
        for edit in found:
            typer.echo(f"{part}  {edit.site} -> {edit.path}")
    typer.echo(f"{'LoRA' if lora else 'model'} in {out}")


def _torch_dtype(name: str | None) -> dict[str, Any]:
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is not None and name not in known:
        raise InputError("dtype", value=name, allowed=", ".join(known))
    return {} if name is None else {"dtype": known[name]}


def _save_model(loaded: Any, folder: Path) -> None:
    """Save a model of transformers with its tokenizer, or a pipeline."""
    if hasattr(loaded, "tokenizer") and hasattr(loaded, "model"):
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    else:
        getattr(loaded, "pipe", loaded).save_pretrained(folder)


@app.command()
def convert(
    source: Annotated[Path | None, typer.Argument(help="What is to be converted: a file or a folder.")] = None,
    out: Annotated[Path | None, typer.Argument(help="New folder or file.")] = None,
    words: Words = None,
    kind: Annotated[str, typer.Option(help="What the source is, or is to become.")] = "infinity-transformer",
    vae: Annotated[Path | None, typer.Option(help="Image tokenizer; makes a whole pipeline.")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="T5 folder; makes a whole pipeline.")] = None,
    pn: Annotated[str | None, typer.Option(help="Resolution the weights are for, such as 0.06M or 1M.")] = None,
    h_div_w: Annotated[float | None, typer.Option(help="Height over width of the images.")] = None,
    patchify: Annotated[bool | None, typer.Option(help="Whether tokens are 2x2 patches of bits.")] = None,
    ema: Annotated[bool | None, typer.Option("--ema", help="Take the moving average of a checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type to store: keep, fp32, bf16 or fp16.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List the options of the kind with their defaults.")] = False,
) -> None:
    """Convert weights, maps, vectors and autoencoders of others to safetensors; maps and vectors also back."""
    import dataclasses

    from pysteer.convert import find_kind
    from pysteer.recipes.config import build_config, parse_words

    chosen = find_kind(kind)
    if keys:
        _show_keys(chosen.options)
        return
    if source is None or out is None:
        raise InputError("missing source or target", fix="write pysteer convert SOURCE OUT --kind ...")
    flags = {"vae": vae, "text_encoder": text_encoder, "pn": pn, "h_div_w": h_div_w, "patchify": patchify, "ema": ema,
             "dtype": dtype}  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    known = [field.name for field in dataclasses.fields(chosen.options)]
    if set(given) - set(known):
        raise InputError(f"options of {kind}", value=", ".join(given), allowed=", ".join(known) or "none")
    typer.echo(chosen.run(source, out, build_config(chosen.options, {**parse_words(words or []), **given})))


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and which kernels are in use and why others are not."""
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
        fix = "pip install 'pysteer-core[demo]'"
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
