"""Commands that read the stores of sweeps: status, results and query."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.errors import InputError

app = typer.Typer()
Out = Annotated[Path, typer.Option(help="Folder of all sweeps.")]


def _folder(name: str | None, out: Path) -> Path:
    from pysteer.sweep.query import sweeps_in

    if name is not None:
        return out / name
    found = sweeps_in(out)
    if not found:
        raise InputError("no sweep is here", value=str(out), fix="run pysteer sweep, or give --out")
    return found[0]


@app.command("status")
def status_command(
    name: Annotated[str | None, typer.Argument(help="The sweep; all of them without it.")] = None,
    out: Out = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how far sweeps are: cells, rate, time left and workers, from their stores alone.

    pysteer status, pysteer status shapes --json
    """
    import dataclasses

    from pysteer.sweep.query import sweeps_in
    from pysteer.sweep.status import status

    found = [status(folder) for folder in ([_folder(name, out)] if name is not None else sweeps_in(out))]
    if not found:
        raise InputError("no sweep is here", value=str(out), fix="run pysteer sweep, or give --out")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
        return
    for each in found:
        for line in each.lines():
            typer.echo(line)


@app.command("results")
def results_command(
    name: Annotated[str | None, typer.Argument(help="The sweep; the last one without it.")] = None,
    out: Out = Path("results"),
    top: Annotated[int, typer.Option(help="How many settings to show; 0 for all.")] = 20,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into the folder of the sweep.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the settings of a sweep, best first, with the Pareto front of target and damage.

    pysteer results, pysteer results shapes --report --top 5
    """
    import dataclasses

    from pysteer.sweep.query import results

    folder = _folder(name, out)
    found = results(folder)
    for each in found.damaged:
        typer.echo(f"set aside: {each.name}, {each.reason}; run the sweep again", err=True)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in found.rows], indent=2))
        return
    shown = found.rows[:top] if top else found.rows
    _table(["", *_names(shown)], [["*" if row.best else "", *_values(row, shown)] for row in shown])
    if any(row.best for row in found.rows):
        typer.echo("* on the Pareto front: no other setting has a higher target and less damage")
    if len(shown) < len(found.rows):
        typer.echo(f"{len(found.rows) - len(shown)} more settings: --top 0")
    if report:
        from pysteer.sweep.page import write_page

        typer.echo(f"report: {write_page(folder)}")


def _names(rows: list[Any]) -> list[str]:
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    return [*(rows[0].setting if rows else {}), "cells", "failed", *measures]


def _values(row: Any, rows: list[Any]) -> list[str]:
    measures = list(dict.fromkeys(name for each in rows for name in each.measures))
    shown = [f"{row.measures[name]:.4g}" if name in row.measures else "" for name in measures]
    return [*(_text(value) for value in row.setting.values()), str(row.count), str(row.failed), *shown]


@app.command("query")
def query_command(
    sql: Annotated[str, typer.Argument(help="A question about the view cells, in the SQL of DuckDB.")],
    name: Annotated[str | None, typer.Option(help="The sweep that cells shows; the last one without it.")] = None,
    out: Out = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask the results of sweeps in SQL: the view cells, and one view per sweep by its name.

    pysteer query "select strength, avg(target::int) from cells group by 1 order by 1"
    """
    from pysteer.sweep.query import query, sweeps_in

    first = _folder(name, out)
    others = [folder for folder in sweeps_in(out) if folder != first]
    names, rows, damaged = query(sql, [first, *others])
    for each in damaged:
        typer.echo(f"set aside: {each.name}, {each.reason}; run the sweep again", err=True)
    if as_json:
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2, default=str))
        return
    _table(names, [[_text(value) for value in row] for row in rows])


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(names: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    for line in (names, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
