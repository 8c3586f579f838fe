"""Commands of `pysteer`, a file per subject; each file imports what a command needs only when that command runs.

A file is found by being there. It defines `app = typer.Typer()` and its commands with `@app.command("name")`.
"""

import importlib
import pkgutil
from inspect import cleandoc  # by name: a file of this folder is called inspect

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the commands of every file of this folder to `app`."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda one: one.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "app"):
            app.registered_commands.extend(module.app.registered_commands)
            app.registered_groups.extend(module.app.registered_groups)


def show_examples(app: typer.Typer) -> None:
    """Put every example of a help text (`pysteer ..., pysteer ...`) on a line of its own, as it is to be typed."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            show_examples(group.typer_instance)
    for command in app.registered_commands:
        parts = cleandoc(command.help or getattr(command.callback, "__doc__", None) or "").split("\n\n")
        for i, part in enumerate(parts):
            if part.startswith("pysteer "):
                lines = " ".join(part.split()).replace(", pysteer ", "\npysteer ").splitlines()
                parts[i] = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
        command.help = "\n\n".join(parts) or None
