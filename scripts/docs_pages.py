"""Pages of the documentation that are made from the code: a hook of mkdocs, and a command that prints them.

python scripts/docs_pages.py recipes | performance | api
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def recipes_page() -> str:
    """Every recipe with its keys, types, defaults and notes, from its dataclass."""
    sys.path.insert(0, str(ROOT))
    from pysteer.recipes.frame import find_recipe, recipe_modules

    parts = [
        "# Recipes",
        "A recipe is a whole experiment. `pysteer run NAME key=value ...` runs it, `pysteer run NAME --keys` lists its "
        "keys, and the same command continues a run that was interrupted. This page is made from the configurations.",
    ]
    for name in sorted(recipe_modules()):
        found = find_recipe(name)
        words = " ".join((found.function.__doc__ or "").split("\n\n")[0].split())
        parts += [f"## {name}", words, "```text\n" + f"pysteer run {name}\n```", config_table(found.config)]
    return "\n\n".join(parts) + "\n"


def config_table(kind: type) -> str:
    """A Markdown table of the fields of a configuration, nested ones as `field.key`."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {default} | {values} | {note} |" for key, default, values, note in fields_of(kind)]
    return "\n".join(lines)


def fields_of(kind: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, default, allowed values, note) of all fields, ready for a cell of a table."""
    from pysteer.recipes.config import config_values, describe, field_notes

    hints, notes, defaults = typing.get_type_hints(kind), field_notes(kind), config_values(kind())
    rows = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            rows += fields_of(hints[field.name], f"{prefix}{field.name}.")
            continue
        default = defaults[field.name]
        shown = "" if default in (None, "") else f"`{default if isinstance(default, str) else json.dumps(default)}`"
        rows.append((prefix + field.name, *map(_cell, (shown, describe(hints[field.name]), notes.get(field.name, "")))))
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def performance_page() -> str:
    """What is stored in bench/results, with the machine and versions it was measured on."""
    sys.path.insert(0, str(ROOT))
    parts = [
        "# Performance",
        "Every figure here is read from a stored measurement in `bench/results`; the command above a table makes it "
        "again. `pysteer env` says which kernels serve on your machine.",
    ]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = stored if isinstance(stored, list) else [stored]
        newest = max(found, key=lambda result: str(result.get("date", "")))
        parts += [f"## {path.stem}", _where(newest), *_tables(newest)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _where(result: dict[str, Any]) -> str:
    machine = result.get("machine", {})
    name = machine.get("gpu") or f"{machine.get('processor', 'unknown')}, {machine.get('threads', '?')} threads"
    versions = ", ".join(f"{key} {value}" for key, value in result.get("versions", {}).items() if value)
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    return f"{name}; {versions}; {str(result.get('date', ''))[:10]}{commit}."


def _tables(result: dict[str, Any]) -> list[str]:
    """A table for every list of flat rows in a result."""
    found = []
    for name, rows in result.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            continue
        columns = [c for c in rows[0] if not isinstance(rows[0][c], (dict, list)) or "value" in _dict(rows[0][c])]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_cell(_number(row.get(c))) for c in columns) + " |" for row in rows[:60]]
        found.append(f"**{name}**\n\n" + "\n".join(lines))
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> str:
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        interval = f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else ""
        return f"{_number(value.get('value'))}{interval}"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


_PUBLIC = (
    "pysteer.steer", "pysteer.fit", "pysteer.Fitted", "pysteer.Plan", "pysteer.SiteParameters", "pysteer.Site",
    "pysteer.bake", "pysteer.bake_lora", "pysteer.InputError",
)  # fmt: skip


def api_page() -> str:
    """The public names with their docstrings, by mkdocstrings."""
    sys.path.insert(0, str(ROOT))
    import pysteer

    parts = ["# API", "What `import pysteer` offers. Internal modules carry their own docstrings."]
    for name in _PUBLIC:
        found = getattr(pysteer, name.partition(".")[2])
        parts.append(f"::: {found.__module__}.{found.__qualname__}")
    return "\n\n".join(parts) + "\n"


PAGES = {"recipes": recipes_page, "performance": performance_page, "api": api_page}


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages that are made here."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, f"{name}.md", content=make()))
    return files


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked not in PAGES:
        sys.exit(f"say which page: {', '.join(PAGES)}")
    print(PAGES[asked](), end="")
