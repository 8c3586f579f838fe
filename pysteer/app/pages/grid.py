"""A matrix of pictures over any two columns of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pysteer.app.pages.query import Query, named
from pysteer.app.pages.rows import runs_with, serves, table_of
from pysteer.app.tables import Table, text_of
from pysteer.errors import InputError

if TYPE_CHECKING:
    from pysteer.app.server import Inspector

GRID_COLUMNS, GRID_ROWS = 24, 20
X_FIRST = ("strength", "folder_2", "strength_cond", "step", "feature")
_Y_FIRST = ("prompt", "method", "site", "pair", "folder_1", "kind", "setting", "condition")


def grid_page(app: Inspector, query: Query) -> dict[str, Any]:
    """A matrix of pictures over any two columns, the unsteered ones beside them."""
    runs = runs_with(app, "image")
    if not runs and not query.text("run"):
        return {"title": "Grid", "runs": [], "query": query}
    query["run"] = named(runs, query)
    info, known, name, table = table_of(app, query, "image")
    tables = [one for one in known if serves(app, info.id, one, "image")]
    if "image" not in table.names:
        raise InputError("table with pictures", value=name, allowed=", ".join(tables) or "none, it has no pictures")
    axes = table.axes()
    if not axes:
        axes = [n for n in table.names if n not in ("image", "key")][:1]
    x = query.choice("x", axes, next((n for n in X_FIRST if n in axes), axes[0]))
    rest = [n for n in axes if n != x] or axes
    y = query.choice("y", axes, next((n for n in _Y_FIRST if n in rest), rest[0]))
    rows = table.chosen(query.filters, query.text("q"))
    cells = table.cells(x, y, rows)
    across = sorted({code for _, code in cells})
    down = sorted({code for code, _ in cells})
    first_x = query.whole("from_x", 0, 0, max(0, len(across) - 1))
    first_y = query.whole("from_y", 0, 0, max(0, len(down) - 1))
    shown_x, shown_y = across[first_x : first_x + GRID_COLUMNS], down[first_y : first_y + GRID_ROWS]
    matrix = _matrix(table, cells, shown_x, shown_y)
    names = {"x": table.coded(x)[1], "y": table.coded(y)[1]}
    base = _baseline(table, query, x, across, rows)
    return {
        "title": "Grid", "runs": runs, "info": info, "known": tables, "name": name, "axes": axes, "x": x, "y": y,
        "matrix": matrix, "shown_x": [(c, _label(names["x"], c)) for c in shown_x],
        "labels_y": [_label(names["y"], c) for c in shown_y], "query": query, "base": base,
        "base_cells": [cells.get((down_code, base)) and _cell(table, cells[down_code, base]) for down_code in shown_y]
        if base is not None else [], "base_label": "" if base is None else _label(names["x"], base),
        "others": table.filters([x, y]),
        "counts": (len(across), len(down), len(rows), len(table)), "first": (first_x, first_y),
        "steps": (GRID_COLUMNS, GRID_ROWS), "size": query.whole("size", 96, 32, 512), "problems": table.problems,
        "bases": [(c, _label(names["x"], c)) for c in across[:200]],
    }  # fmt: skip


def _label(values: list[Any], code: int) -> str:
    return text_of(values[code]) if code >= 0 else "none"


def _baseline(table: Table, query: Query, x: str, across: list[int], rows: NDArray[np.int64]) -> int | None:
    """Code of the value of x that is shown beside all others: that of the query, or strength 0."""
    wanted = query.text("base")
    values = table.coded(x)[1]
    if wanted == "none" or not across:
        return None
    for code in across:
        plain = code >= 0 and values[code] in (0, "none", "unsteered")
        if _label(values, code) == wanted if wanted else plain:
            return code
    return None


def _cell(table: Table, found: tuple[int, int]) -> dict[str, Any]:
    row = table.take(np.array([found[0]]))[0]
    words = [f"{n} {text_of(row[n])}" for n in table.names if table.kinds[n] in ("number", "flag", "text")
             and row[n] is not None and n not in ("key", "image", "batch", "worker")]  # fmt: skip
    return {"picture": row["picture"], "count": found[1], "words": ", ".join(words)[:400], "error": row.get("error")}


def _matrix(
    table: Table, cells: Mapping[tuple[int, int], tuple[int, int]], across: list[int], down: list[int]
) -> list[list[dict[str, Any] | None]]:
    return [[_cell(table, cells[d, a]) if (d, a) in cells else None for a in across] for d in down]
