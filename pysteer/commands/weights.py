"""Commands about weights: bake and convert."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.commands.shared import Words, show_keys
from pysteer.errors import InputError

app = typer.Typer()


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
    """Fold fitted parameters into the weights of a model, for use without pysteer.

    pysteer bake infinity-shapes red-to-blue steered, pysteer bake MODEL FITTED OUT --lora --rank 16
    """
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


@app.command("convert")
def convert_command(
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
    as_json: Annotated[bool, typer.Option("--json", help="With --keys: print JSON.")] = False,
) -> None:
    """Convert weights, maps, vectors and autoencoders of others to safetensors; maps and vectors also back.

    pysteer convert FOLDER OUT map=linear_ot --kind ml-act, pysteer convert --kind sae-saelens --keys
    """
    import dataclasses

    from pysteer.convert import find_kind
    from pysteer.recipes.config import build_config, parse_words

    chosen = find_kind(kind)
    if keys:
        show_keys(chosen.options, as_json=as_json)
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
