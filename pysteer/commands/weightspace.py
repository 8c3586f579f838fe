"""Commands for LoRA adapters: `pysteer lora ...`, from images to collections, and from collections to new adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.commands.shared import progress_bars
from pysteer.errors import InputError

app = typer.Typer()
lora = typer.Typer(
    name="lora",
    help="Collections of LoRA adapters: make, read, edit, pack.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(lora)

Collection = Annotated[Path, typer.Argument(help="Folder of adapters, of a collection or of a weight-space data set.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the row file.  [default: .pysteer-rows in the folder]")]
Rank = Annotated[int, typer.Option(help="Rank of the new adapter.")]
Format = Annotated[str, typer.Option("--format", help="diffusers or kohya.")]


def _open(folder: Path, cache: Path | None = None) -> Any:
    from pysteer.weightspace.loraset import LoraSet

    if folder.is_dir() and not any(folder.rglob("*.safetensors")):
        from pysteer.weightspace.dataset import import_dataset

        with progress_bars().follow("reading") as show:
            return import_dataset(folder, cache or folder / ".pysteer-rows", show)
    with progress_bars().follow("reading") as show:
        return LoraSet.open(folder, cache=cache, progress=show)


def _index(adapters: Any, name: str) -> int:
    found = [i for i, own in enumerate(adapters.names) if own == name or Path(own).stem == name]
    if len(found) != 1:
        near = ", ".join(Path(own).stem for own in adapters.names[:3])
        raise InputError("adapter", value=name, allowed=f"the name of one adapter, such as {near}")
    return found[0]


@lora.command("read")
def read_command(
    folder: Collection,
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a collection into its row file, and say what is in it and what was left out, and why.

    pysteer lora read collection
    """
    import json
    from collections import Counter

    adapters = _open(folder, cache)
    counts = Counter(adapters.labels)
    if as_json:
        skipped = [{"file": skip.path, "reason": skip.reason} for skip in adapters.skipped]
        value = {"adapters": len(adapters), "layers": len(adapters.layers), "d": adapters.layout.width,
                 "classes": dict(counts), "skipped": skipped}  # fmt: skip
        typer.echo(json.dumps(value, indent=2))
        return
    typer.echo(repr(adapters))
    for label, count in sorted(counts.items()):
        typer.echo(f"  {count:6d}  {label or '(no class)'}")
    for skip in adapters.skipped:
        typer.echo(f"left out {skip.path}: {skip.reason}")


@lora.command("edit")
def edit_command(
    folder: Collection,
    adapter: Annotated[str, typer.Argument(help="Name of the adapter to be moved.")],
    out: Annotated[Path, typer.Argument(help="The new LoRA file, ending in .safetensors.")],
    target: Annotated[str, typer.Option("--to", help="Class to move to.")],
    source: Annotated[str | None, typer.Option("--from", help="Class to move from.  [default: all others]")] = None,
    t: Annotated[float, typer.Option("-t", help="How far; 1 takes one class mean to the other.")] = 1.0,
    kind: Annotated[str, typer.Option(help="mean, probe or component:NUMBER.")] = "mean",
    rank: Rank = 4,
    form: Format = "diffusers",
    cache: Cache = None,
) -> None:
    """Move an adapter along a direction of its collection and write it as an ordinary LoRA file.

    pysteer lora edit collection 000066-colour-blue new.safetensors --to colour=red -t 1.5
    """
    from pysteer.weightspace.directions import Directions

    adapters = _open(folder, cache)
    directions = Directions(adapters)
    name, _, number = kind.partition(":")
    if name == "component" and number.isdigit():
        direction = directions.component(int(number))
    elif name in ("mean", "probe") and not number:
        direction = (directions.between if name == "mean" else directions.probe)(target, source)
    else:
        raise InputError("kind of direction", value=kind, allowed="mean, probe, component:0")
    directions.edit(_index(adapters, adapter), direction, t, rank=rank).save(out, form)
    typer.echo(f"{adapter} moved by {t:g} along {direction.name}: {out}")


@lora.command("interpolate")
def interpolate_command(
    folder: Collection,
    first: Annotated[str, typer.Argument(help="Name of an adapter.")],
    second: Annotated[str, typer.Argument(help="Name of another.")],
    out: Annotated[Path, typer.Argument(help="The new LoRA file.")],
    t: Annotated[float, typer.Option("-t", help="0 is the first, 1 the second.")] = 0.5,
    rank: Rank = 4,
    form: Format = "diffusers",
    cache: Cache = None,
) -> None:
    """Write the change between two adapters as a LoRA file.

    pysteer lora interpolate collection 000066-colour-blue 000084-colour-red between.safetensors -t 0.5
    """
    from pysteer.weightspace.directions import Directions

    adapters = _open(folder, cache)
    made = Directions(adapters).interpolate(_index(adapters, first), _index(adapters, second), t, rank=rank)
    made.save(out, form)
    typer.echo(f"{first} and {second} at {t:g}: {out}")


@lora.command("sample")
def sample_command(
    folder: Collection,
    label: Annotated[str, typer.Argument(help="Class of the new adapters.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives them.")],
    count: Annotated[int, typer.Option(help="How many.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first, counting up.")] = 0,
    spread: Annotated[float, typer.Option(help="Standard deviations of the noise; 0 is the class mean.")] = 1.0,
    rank: Rank = 4,
    form: Format = "diffusers",
    cache: Cache = None,
) -> None:
    """Draw new adapters of a class: its mean, with noise along its own principal components.

    pysteer lora sample collection colour=red drawn --count 4
    """
    from pysteer.weightspace.directions import Directions

    directions = Directions(_open(folder, cache))
    for number in range(count):
        made = directions.sample(label, seed + number, rank=rank, spread=spread)
        made.save(out / f"sample-{seed + number:04d}.safetensors", form)
    typer.echo(f"{count} adapters of {label} in {out}")


@lora.command("invert")
def invert_command(
    folder: Collection,
    images: Annotated[Path, typer.Argument(help="Folder of images to be explained.")],
    out: Annotated[Path, typer.Argument(help="The new LoRA file.")],
    model: Annotated[str, typer.Option(help="The pipeline of the adapters.")] = "diffusion-shapes",
    prompt: Annotated[str, typer.Option(help="The prompt the adapters were trained with.")] = "",
    components: Annotated[int, typer.Option(help="Principal components to search in.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 60,
    rank: Rank = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    form: Format = "diffusers",
    cache: Cache = None,
) -> None:
    """Find the adapter, within the span of a collection, that explains given images best.

    pysteer lora invert collection images found.safetensors --steps 60
    """
    from pysteer.models.load import load_model
    from pysteer.weightspace.directions import Directions
    from pysteer.weightspace.inversion import invert, read_images

    generator = load_model(model)
    if not hasattr(generator, "pipe"):
        raise InputError("model", value=model, allowed="a pipeline of diffusers with a UNet")
    with progress_bars().task("steps", steps) as advance:
        found = invert(
            Directions(_open(folder, cache)), generator.pipe, read_images(images, generator.pipe), prompt=prompt,
            components=components, steps=steps, seed=seed, advance=advance,
        )  # fmt: skip
    found.adapter(rank).save(out, form)
    typer.echo(f"loss {found.first_loss:.4f} -> {found.last_loss:.4f}: {out}")


@lora.command("nearest")
def nearest_command(
    folder: Collection,
    adapter: Annotated[str, typer.Argument(help="Name of an adapter.")],
    count: Annotated[int, typer.Option(help="How many.")] = 5,
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The adapters whose changes are most similar to those of one: cosine and name.

    pysteer lora nearest collection 000066-colour-blue --count 3
    """
    from pysteer.weightspace.canonical import nearest

    adapters = _open(folder, cache)
    cosines, index = nearest(adapters, count)
    own = _index(adapters, adapter)
    found = list(zip(cosines[own].tolist(), index[own].tolist(), strict=True))
    if as_json:
        import json

        rows = [{"cosine": c, "label": adapters.labels[i], "name": adapters.names[i]} for c, i in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    for cosine, other in found:
        typer.echo(f"{cosine:7.4f}  {adapters.labels[other] or '(no class)'}  {adapters.names[other]}")


@lora.command("pack")
def pack_command(
    folder: Collection,
    out: Annotated[Path, typer.Argument(help="New folder that receives rows.safetensors and index.json.")],
    cache: Cache = None,
) -> None:
    """Write a collection as one file of rows and an index, to be published and opened as it is.

    pysteer lora pack collection packed
    """
    adapters = _open(folder, cache)
    adapters.save(out)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    typer.echo(f"{len(adapters)} adapters, {size:.1f} MB in {out}")


@lora.command("dataset")
def dataset_command(
    folder: Collection,
    out: Annotated[Path, typer.Argument(help="New folder that receives the Parquet files.")],
    push: Annotated[str | None, typer.Option(help="Name of a data set of the hub to upload to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    cache: Cache = None,
) -> None:
    """Write a collection as a data set (a row per adapter, a column per tensor), and upload it if asked.

    pysteer lora dataset collection as-parquet
    """
    from pysteer.weightspace.dataset import export_dataset

    adapters = _open(folder, cache)
    export_dataset(adapters, out)
    typer.echo(f"{len(adapters)} rows in {out}")
    if push is not None:
        from huggingface_hub import HfApi

        hub = HfApi()
        hub.create_repo(push, repo_type="dataset", private=private, exist_ok=True)
        hub.upload_folder(folder_path=out, repo_id=push, repo_type="dataset")
        typer.echo(f"uploaded to {push}")


@lora.command("generate")
def generate_command(
    adapter: Annotated[Path, typer.Argument(help="LoRA file of diffusers, PEFT or kohya.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the images.")],
    model: Annotated[str, typer.Option(help="diffusion-shapes, or a pipeline of diffusers.")] = "diffusion-shapes",
    prompt: Annotated[str, typer.Option(help="The prompt.")] = "",
    count: Annotated[int, typer.Option(help="How many images.")] = 4,
    strength: Annotated[float, typer.Option(help="Factor on the adapter.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first image, counting up.")] = 0,
) -> None:
    """Generate images with an adapter.

    pysteer lora generate new.safetensors images --prompt "a red circle" --count 4
    """
    import torch

    from pysteer import files
    from pysteer.models.load import load_model
    from pysteer.weightspace.adapter import read_adapter
    from pysteer.weightspace.attaching import attached

    given = read_adapter(adapter)
    generator = load_model(model)
    if not hasattr(generator, "pipe"):
        raise InputError("model", value=model, allowed="a pipeline of diffusers")
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    with torch.no_grad(), attached(generator, given, strength):
        images = generator([prompt] * count, seeds=seed, **settings).images
    for number, image in enumerate(images):
        files.write_image(out / f"{given.name}-{seed + number:04d}.png", image)
    typer.echo(f"{count} images in {out}")


@lora.command("leaves")
def leaves_command(
    links: Annotated[Path, typer.Argument(help="Is-a links, a line `PARENT CHILD` each (wordnet.is_a.txt).")],
    names: Annotated[Path, typer.Argument(help="Leaf classes, a line `ID NAME` each (LOC_synset_mapping.txt).")],
    out: Annotated[Path, typer.Argument(help="JSON file that receives leaf, root and name.")],
    root: Annotated[list[str] | None, typer.Option(help="NAME=ID of a root class.  [default: the ten]")] = None,
) -> None:
    """Group the leaf classes of ImageNet under ten root classes: airplane, bird, cat, car, dog and so on.

    pysteer lora leaves wordnet.is_a.txt LOC_synset_mapping.txt leaves.json
    """
    from collections import Counter

    from pysteer.weightspace.sources import group_leaves, read_links, read_names, write_leaves

    pairs = [each.partition("=") for each in root or ()]
    if not all(name and equals and identity for name, equals, identity in pairs):
        raise InputError("root", value=", ".join(root or ()), allowed="NAME=ID")
    roots = {name: identity for name, _, identity in pairs} or None
    found = group_leaves(read_names(names), read_links(links), roots)
    write_leaves(out, found)
    for name, count in sorted(Counter(each.root for each in found).items()):
        typer.echo(f"{count:6d}  {name}")


@lora.command("distribute")
def distribute_command(
    images: Annotated[Path, typer.Argument(help="Images, a folder per leaf class.")],
    out: Annotated[Path, typer.Argument(help="Folder that receives the concept folders.")],
    leaves: Annotated[Path | None, typer.Option(help="File of `lora leaves`; a class per folder without it.")] = None,
    folders: Annotated[int, typer.Option(help="Concept folders per class.")] = 100,
    least: Annotated[int, typer.Option(help="Fewest images per folder.")] = 4,
    most: Annotated[int, typer.Option(help="Most images per folder.")] = 16,
    side: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    reuse: Annotated[bool, typer.Option("--reuse", help="Use images again when they run out.")] = False,
) -> None:
    """Distribute images into folders that an adapter each is trained on (`pysteer run lora-farm folders=OUT`).

    pysteer lora distribute images folders --folders 20
    """
    from pysteer.weightspace.sources import distribute, folder_leaves, read_leaves

    if not images.is_dir():
        raise InputError("folder of images", value=str(images), allowed="a folder per leaf class")
    chosen = read_leaves(leaves) if leaves is not None else folder_leaves(images)
    given: dict[str, Any] = {"folders": folders, "least": least, "most": most, "side": side, "seed": seed}
    with progress_bars().follow("folders") as show:
        made = distribute(images, out, chosen, reuse=reuse, progress=show, **given)
    for name, count in made.items():
        typer.echo(f"{count:6d}  {name}")
