"""Rows of a table, and which runs have tables that a page can show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pysteer.app.pages.query import ROWS_PER_PAGE, Query
from pysteer.app.store import NotFound, RunInfo
from pysteer.app.tables import Table, text_of
from pysteer.errors import InputError
from pysteer.recipes.flat import csv_text

if TYPE_CHECKING:
    from pysteer.app.server import Inspector


def table_of(app: Inspector, query: Query, need: str = "") -> tuple[RunInfo, list[str], str, Table]:
    """The run, its tables, and the chosen one: the first that `need`s are met by."""
    info = app.results.run(query.text("run"))
    known = app.results.tables(info.id)
    if not known:
        raise NotFound(f"tables of run {info.id}", value="none yet", allowed="a run that has results",
                       fix=info.problem or "run it again")  # fmt: skip
    name = query.text("table")
    if not name and need:
        name = next((one for one in known if serves(app, info.id, one, need)), known[0])
    name = name or known[0]
    return info, known, name, app.results.table(info.id, name)


def serves(app: Inspector, run: str, name: str, need: str) -> bool:
    try:
        table = app.results.table(run, name)
    except InputError:
        return False
    if need == "image":
        return "image" in table.names and bool(table.axes())
    return bool(len(table)) and any(table.kinds[n] == "number" for n in table.axes()) and bool(table.measures())


def runs_with(app: Inspector, need: str) -> list[RunInfo]:
    """Runs that a page can show, sweeps first."""
    found = [
        run for run in app.results.runs()
        if run.kind != "features" and any(serves(app, run.id, name, need) for name in app.results.tables(run.id))
    ]  # fmt: skip
    return sorted(found, key=lambda run: run.kind != "sweep")


def rows_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Rows of a table: filtered, sorted, in pages, with their pictures."""
    info, known, name, table = table_of(app, query)
    rows = table.chosen(query.filters, query.text("q"))
    sort = query.text("sort")
    if sort:
        rows = table.sort(rows, sort.removeprefix("-"), sort.startswith("-"))
    last = max(1, math.ceil(len(rows) / ROWS_PER_PAGE))
    number = query.whole("page", 1, 1, last)
    shown = table.take(rows[(number - 1) * ROWS_PER_PAGE : number * ROWS_PER_PAGE])
    columns = [n for n in table.names if any(row[n] not in (None, "") for row in shown)][:40] or table.names[:10]
    return {
        "title": "Rows", "info": info, "known": known, "name": name, "rows": shown, "count": len(rows),
        "total": len(table), "columns": [c for c in columns if c != "image"], "query": query, "number": number,
        "last": last, "problems": table.problems, "text": text_of,
    }  # fmt: skip


def rows_csv(app: Inspector, query: Query) -> str:
    """All chosen rows as CSV."""
    _, _, _, table = table_of(app, query)
    return csv_text(table.take(table.chosen(query.filters, query.text("q"))), table.names)
