"""Commands of `pysteer`, a file per subject; each file imports what a command needs only when that command runs.

A file is found by being there. It defines `app = typer.Typer()` and its commands with `@app.command("name")`.
"""

import importlib
import pkgutil

import typer


def add_commands(app: typer.Typer) -> None:
    """Add the commands of every file of this folder to `app`."""
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda one: one.name):
        module = importlib.import_module(f"{__name__}.{found.name}")
        if hasattr(module, "app"):
            app.registered_commands.extend(module.app.registered_commands)
            app.registered_groups.extend(module.app.registered_groups)
