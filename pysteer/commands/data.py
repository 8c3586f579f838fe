"""Commands about data: list, get, write sentences."""

from pathlib import Path
from typing import Annotated

import typer

from pysteer.commands.shared import AsJson, progress_bars, show_json
from pysteer.errors import InputError

app = typer.Typer()
data = typer.Typer(no_args_is_help=True, help="Data sets of the experiments: list, get, write sentences.")
app.add_typer(data, name="data")

Folder = Annotated[Path | None, typer.Option(help="Folder of all data sets.  [default: $PYSTEER_DATA, or data]")]


@data.command("list")
def list_command(folder: Folder = None, as_json: AsJson = False) -> None:
    """What ships and what can be fetched.

    pysteer data list
    """
    from pysteer.data.concepts import concept_names
    from pysteer.data.downloads import DATASETS, here
    from pysteer.data.tasks import data_folder

    place = folder or data_folder()
    if as_json:
        sets = [{"name": name, "here": here(each, place), "note": each.note} for name, each in DATASETS.items()]
        show_json({"concepts": concept_names(), "data_sets": sets})
        return
    typer.echo(f"concepts that ship: {', '.join(concept_names())}")
    for name, each in DATASETS.items():
        typer.echo(f"{name}  {'here' if here(each, place) else 'not here'}  {each.note}")


@data.command("get")
def get_command(
    names: Annotated[list[str], typer.Argument(help="coco, rtp, jigsaw.")],
    folder: Folder = None,
    url: Annotated[str, typer.Option(help="A mirror, for one data set; its checksum stays the same.")] = "",
) -> None:
    """Fetch data sets and check them; those that are here are left as they are.

    pysteer data get coco
    """
    from pysteer.data.downloads import find_dataset, get
    from pysteer.data.tasks import data_folder

    wanted = [find_dataset(name) for name in names]
    if url and len(wanted) > 1:
        raise InputError("--url", value=f"with {len(wanted)} data sets", allowed="one data set at a time")
    progress = progress_bars()
    for each in wanted:
        with progress.follow(each.name) as show:
            place = get(each, folder or data_folder(), url=url, progress=show)
        typer.echo(f"{each.name} in {place}")


@data.command("write")
def write_command(
    topics: Annotated[
        list[str], typer.Argument(help='What the sentences are about: "a giraffe" "giraffes in Africa".')
    ],
    out: Annotated[Path, typer.Option(help="JSON file with both classes, for task.path.")],
    label: Annotated[str, typer.Option(help="Label of the sentences about the topics.")] = "about",
    words: Annotated[str, typer.Option(help="Words, one of which a sentence must hold, and a neutral one not.")] = "",
    count: Annotated[int, typer.Option(help="Sentences per class.")] = 100,
    model: Annotated[str, typer.Option(help="A chat model: smollm2, a folder, or a name of the hub.")] = "smollm2",
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Have a chat model write sentences about topics, and neutral ones.

    pysteer data write "a giraffe" "giraffes in Africa" --words giraffe --out giraffe.json
    """
    from pysteer import files
    from pysteer.data.sentences import NEUTRAL_TOPICS, write_sentences
    from pysteer.metrics.concepts import word_pattern
    from pysteer.recipes.act_text import load_language
    from pysteer.recipes.transport.chat import chat_writer
    from pysteer.recipes.transport.settings import ModelSettings

    if out.suffix != ".json" or label == "none":
        raise InputError(
            "--out, --label", value=f"{out.name}, {label}", allowed="a .json file, a label other than none"
        )
    pattern = word_pattern([word for word in words.split(",") if word.strip()]) if words.strip() else None
    generate = chat_writer(load_language(ModelSettings(model)))
    about = write_sentences(
        generate, topics, count, accept=lambda text: pattern is None or bool(pattern.search(text)), seed=seed
    )
    neutral = write_sentences(
        generate, NEUTRAL_TOPICS, count, accept=lambda text: not (pattern and pattern.search(text)), seed=seed + 10_000
    )
    files.write_json(out, {"none": neutral, label: about})
    typer.echo(
        f"{len(neutral)} and {len(about)} sentences in {out}: task.path={out} task.source=none task.target={label}"
    )
