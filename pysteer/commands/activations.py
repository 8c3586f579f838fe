"""Commands that read activations: capture and fit."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.commands.shared import Words, progress_bars, show_keys
from pysteer.errors import InputError

app = typer.Typer()


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
    """Run prompts and keep the activations at sites; the same command continues an interrupted capture.

    pysteer capture smollm2 kept --prompts texts.txt --sites 'block.*'
    """
    from pysteer.capture import capture, capture_moments
    from pysteer.capture.prompts import read_prompts
    from pysteer.models.load import load_model

    texts, labels = read_prompts(prompts)
    given: dict[str, Any] = {
        "sites": sites.split(","), "steps": _numbers(steps), "pool": pool, "rows": rows, "seeds": seed,
        "positions": _positions(positions), "batch_size": batch_size,
    }  # fmt: skip
    pipe = load_model(model)
    with progress_bars().follow("capture", len(texts)) as show:
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
    as_json: Annotated[bool, typer.Option("--json", help="With --keys: print JSON.")] = False,
) -> None:
    """Fit a method from what `pysteer capture` kept.

    pysteer fit linear_act learned --source plain --target about, pysteer fit prototype OUT --keys
    """
    from pysteer.capture import fit_stored
    from pysteer.methods import REGISTRY, create
    from pysteer.recipes.config import build_config, parse_words

    create(method)  # says which methods there are
    if keys:
        show_keys(REGISTRY[method], as_json=as_json)
        return
    if source is None or target is None:
        raise InputError("missing source or target", fix="give --source FOLDER and --target FOLDER")
    chosen = build_config(REGISTRY[method], parse_words(words or []))
    stored = [_stored(source, source_label), _stored(target, target_label)]
    with progress_bars().follow("fit") as show:
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
