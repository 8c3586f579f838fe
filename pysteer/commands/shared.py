"""What several commands share: words, the listing of keys, and progress bars."""

import json
from typing import Annotated, Any

import typer

Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace defaults.")]


def show_keys(kind: type, prefix: str = "") -> None:
    """Print the fields of a configuration dataclass with defaults and notes, those of nested ones as `field.key`."""
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
