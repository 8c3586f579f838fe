"""Prompts from a user's file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from pysteer import files
from pysteer.errors import InputError

_TEXTS = ("prompt", "text", "sentence", "caption")


class Prompts(NamedTuple):
    """Texts, and a word per text that tells classes apart ("" for none)."""

    texts: list[str]
    labels: list[str]


def read_prompts(path: str | Path) -> Prompts:
    """Read prompts from a file.

    - `.txt`: one per line, empty lines left out.
    - `.json`: a list of strings or of objects with a prompt and perhaps a label, or an object of label -> list.
    - `.jsonl`: such an object per line.
    - `.csv`, `.tsv`: a column `prompt` (or text, sentence, caption) and perhaps a column `label`.

    Raises:
        InputError: the file is missing, of another kind, or holds something that is not text, or nothing.
    """
    path = Path(path)
    readers = {".txt": _lines, ".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    if path.suffix not in readers:
        raise InputError("kind of prompts file", value=path.name, allowed=", ".join(readers))
    if not path.is_file():
        raise InputError("prompts file not found", value=str(path), fix="check the path")
    try:
        found = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError("prompts file is not UTF-8 text", value=str(path)) from error
    for number, (text, label) in enumerate(found, start=1):
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str):
            raise InputError(f"prompt {number} of {path.name}", value=text, allowed="a text that is not empty")
    if not found:
        raise InputError("prompts file", value=str(path), allowed="at least one prompt")
    return Prompts([text for text, _ in found], [label for _, label in found])


def _lines(path: Path) -> list[tuple[Any, Any]]:
    return [(line.strip(), "") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _entry(value: Any, where: str) -> tuple[Any, Any]:
    if isinstance(value, str):
        return value, ""
    name = next((name for name in _TEXTS if isinstance(value, dict) and name in value), None)
    if name is None:
        raise InputError(where, value=value, allowed=f"a string, or an object with {', '.join(_TEXTS)}")
    return value[name], str(value.get("label", ""))


def _json(path: Path) -> list[tuple[Any, Any]]:
    content = files.read_json(path, "prompts file")
    if isinstance(content, list):
        return [_entry(value, f"entry {number} of {path.name}") for number, value in enumerate(content, start=1)]
    if not isinstance(content, dict) or not all(isinstance(texts, list) for texts in content.values()):
        raise InputError("prompts file", value=type(content).__name__, allowed="a list, or an object of label -> list")
    return [(text, label) for label, texts in content.items() for text in texts]


def _json_lines(path: Path) -> list[tuple[Any, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(_entry(json.loads(line), f"line {number} of {path.name}"))
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} of {path.name}", value=line[:60], allowed="JSON") from error
    return found


def _table(path: Path) -> list[tuple[Any, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = rows.fieldnames or []
        name = next((name for name in _TEXTS if name in columns), None)
        if name is None:
            raise InputError(f"columns of {path.name}", value=", ".join(columns), allowed=f"one of {', '.join(_TEXTS)}")
        try:
            return [(row[name], row.get("label") or "") for row in rows]
        except csv.Error as error:
            raise InputError(f"table {path.name} cannot be read ({error})", value=str(path)) from error
