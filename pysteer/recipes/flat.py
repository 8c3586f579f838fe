"""Tables of a summary as flat rows, and as CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from typing import Any


def flat_rows(rows: Any) -> list[dict[str, Any]]:
    """Rows of a summary: `{value, low, high}` becomes three columns, other nested values become JSON."""
    flat: list[dict[str, Any]] = []
    for row in rows if isinstance(rows, list) else []:
        out: dict[str, Any] = {}
        for name, value in (row if isinstance(row, dict) else {"value": row}).items():
            if isinstance(value, dict) and "value" in value:
                out[name] = value["value"]
                out |= {f"{name}_{end}": value[end] for end in ("low", "high") if end in value}
            elif isinstance(value, (dict, list)):
                out[name] = json.dumps(value, ensure_ascii=False)
            else:
                out[name] = value
        flat.append(out)
    return flat


def csv_text(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """Flat rows as CSV with a heading, the columns in the order in which they occur unless given."""
    names = columns or list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([harmless(name) for name in names])
    writer.writerows([[harmless(row.get(name)) for name in names] for row in rows])
    return out.getvalue()


def harmless(value: Any) -> Any:
    """A cell; texts that a spreadsheet would run as a formula get a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
