"""Rows of the result store: the fields of a setting in their own types, what was measured, and where it came from."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Union

# Beside the fields of the setting and the measures; the same for every task.
COMMON = {
    "key": "string", "status": "string", "error": "string", "image": "string", "text": "string", "worker": "string",
    "batch": "string", "batch_rows": "int64", "seconds": "double", "time": "double", "pysteer": "string",
    "torch": "string", "device": "string", "weights": "string", "prompt_hash": "string", "parameters": "string",
    "schema": "int64", "noise": "int64",
}  # fmt: skip


def column_types(setting: type) -> dict[str, str]:
    """Arrow type by column name, for the fields of a setting and the common columns; measures are inferred."""
    hints = typing.get_type_hints(setting)
    return {**{column_of(field.name): _kind(hints[field.name]) for field in dataclasses.fields(setting)}, **COMMON}


def column_of(field: str) -> str:
    """The column of a field of a setting: its name, or `own_NAME` where a common column is called so."""
    return f"own_{field}" if field in COMMON else field


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = {_kind(option) for option in typing.get_args(hint) if option is not type(None)}
        return kinds.pop() if len(kinds) == 1 else "string"
    return {int: "int64", float: "double", bool: "bool"}.get(hint, "string")


def table_of(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Any:
    """A `pyarrow.Table` of rows; columns without a single value are left out."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays, kept = [], []
    for name in names:
        column = [row.get(name) for row in rows]
        if all(value is None for value in column) and name not in ("key", "status"):
            continue
        kind = kinds.get(name)
        if kind == "string":
            column = [v if v is None or isinstance(v, str) else json.dumps(v, sort_keys=True) for v in column]
        elif kind is None and any(isinstance(value, float) for value in column):
            column = [None if value is None else float(value) for value in column]
        arrays.append(pa.array(column, kind and getattr(pa, {"double": "float64", "bool": "bool_"}.get(kind, kind))()))
        kept.append(name)
    return pa.table(dict(zip(kept, arrays, strict=True)))
