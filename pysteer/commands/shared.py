"""What several commands share: words, the listing of keys, and progress bars."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace defaults.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]


def show_json(value: Any) -> None:
    """Print plain values (see `pysteer.files.plain`) as JSON."""
    from pysteer.files import plain

    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


@contextlib.contextmanager
def quiet_stdout(wanted: bool = True) -> Iterator[None]:
    """What the block prints goes to stderr, so that stdout holds the JSON behind it alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def show_keys(kind: type, prefix: str = "", *, as_json: bool = False) -> None:
    """Print the fields of a configuration dataclass with defaults and notes, those of nested ones as `field.key`."""
    if as_json:
        from pysteer.recipes.config import describe_fields

        show_json(describe_fields(kind, prefix))
        return
    import dataclasses
    import typing

    from pysteer.recipes.config import config_values, describe, field_notes

    hints, notes, defaults = typing.get_type_hints(kind), field_notes(kind), config_values(kind())
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            typer.echo(f"{prefix}{field.name}: {notes.get(field.name, '')}")
            show_keys(hints[field.name], f"{prefix}{field.name}.")
            continue
        default = defaults[field.name]
        shown = json.dumps(default) if isinstance(default, (bool, list, dict)) else default
        typer.echo(f"{prefix}{field.name}={'' if default is None else shown}  ({describe(hints[field.name])})")
        if field.name in notes:
            typer.echo(f"    {notes[field.name]}")


def progress_bars() -> Any:
    """Bars or lines with rate and time left on stderr."""
    from rich.console import Console

    from pysteer.recipes.progress import Progress

    return Progress(Console(stderr=True))
