"""The command that finds trouble in the environment."""

import json
from typing import Annotated

import typer

app = typer.Typer()


@app.command("doctor")
def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check the environment and say what to do about what is wrong; exit code 1 where something must be fixed.

    pysteer doctor, pysteer doctor --json
    """
    from pysteer.checkup import check_environment

    found = check_environment()
    if as_json:
        typer.echo(json.dumps([check.as_dict() for check in found], indent=2))
    else:
        for check in found:
            typer.echo(f"{check.state:5} {check.name}: {check.text}")
            if check.fix:
                typer.echo(f"      fix: {check.fix}")
    if any(check.state == "bad" for check in found):
        raise typer.Exit(1)
