"""The figures of docs/dream.md on unlearning: kept runs of the recipe `unlearn`.

python -m bench.unlearn_table store results/unlearn    # keeps the figures of a run (or several)
python -m bench.unlearn_table                          # writes the newest of every concept into the page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import append, machine, stored, write_between
from pysteer.errors import InputError
from pysteer.files import read_json

PAGE = Path(__file__).resolve().parent.parent / "docs" / "dream.md"
START, END = "<!-- figures: python -m bench.unlearn_table -->", "<!-- /figures -->"
NAME = "unlearn"


def keep(folders: Sequence[Path]) -> None:
    """Store what finished runs of the recipe `unlearn` found, a result each."""
    for folder in folders:
        summary = read_json(folder / "summary.json", "summary of the run")
        if summary.get("recipe") != "unlearn":
            raise InputError("run", value=str(folder), allowed="a finished run of the recipe unlearn")
        append(NAME, {**machine(), **{name: summary[name] for name in ("headline", "tables", "seconds")}})


def _rate(value: dict[str, Any]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def text(runs: Sequence[dict[str, Any]]) -> str:
    """A row per concept, newest run each, and which other class loses most, if one does."""
    newest = {run["headline"]["concept"]: run for run in runs}
    lines = ["| concept | shown before | shown after | others after | other attribute of the others after | edit |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    notes = []
    for concept, run in newest.items():
        head = run["headline"]
        before, after, setting = head["unsteered"], head["unlearned"], head["setting"]
        edit = f"{len(head['latents'])} latents; " + ", ".join(f"{name} {value:g}" for name, value in setting.items())
        cells = [
            concept,
            *map(_rate, (before["concept"], after["concept"], after["others"], after["others_else"])),
            edit,
        ]
        lines.append("| " + " | ".join(cells) + " |")
        rest = [row for row in run["tables"]["classes"] if row["setting"] == "unlearned" and row["class"] != concept]
        plain = {row["class"]: row["value"] for row in run["tables"]["classes"] if row["setting"] == "unsteered"}
        worst = min(rest, key=lambda row: row["value"] - plain[row["class"]])
        if worst["value"] >= plain[worst["class"]]:
            continue
        notes.append(
            f"Without {concept}, {worst['class']} loses most: {_rate(worst)} of {worst['n']}, "
            f"{100 * plain[worst['class']]:.1f} before."
        )
    counts = {run["headline"]["unlearned"]["concept"]["n"] for run in newest.values()}
    images = " and ".join(str(n) for n in sorted(counts))
    return "\n".join(
        [*lines, "", f"Per cent of {images} fresh prompts each, Wilson 95 % intervals. " + " ".join(notes)]
    )


def main() -> None:
    """Store runs, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["store", "page"], default="page")
    parser.add_argument("folders", nargs="*", type=Path)
    asked = parser.parse_args()
    if asked.what == "store":
        if not asked.folders:
            parser.error("store needs the folder of a run, or of several")
        keep(asked.folders)
    write_between(PAGE, START, END, text(stored(NAME)))


if __name__ == "__main__":
    main()
