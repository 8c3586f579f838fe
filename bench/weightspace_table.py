"""The figures of docs/weightspace.md: a kept run of the recipes, and the newest benchmark.

python -m bench.weightspace_table store results/weightspace    # keeps the figures of a run
python -m bench.weightspace_table                              # writes the newest of them into the page
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.record import append, machine, stored
from bench.weightspace import table
from pysteer.errors import InputError
from pysteer.files import read_json, write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "weightspace.md"
START, END = "<!-- figures: python -m bench.weightspace_table -->", "<!-- /figures -->"
NAME = "weightspace_experiment"


def keep(folder: Path) -> None:
    """Store what a finished run of the recipe `weightspace` found."""
    summary = read_json(folder / "summary.json", "summary of the run")
    if summary.get("recipe") != "weightspace":
        raise InputError("run", value=str(folder), allowed="a finished run of the recipe weightspace")
    names = ("headline", "tables", "best", "seconds")
    append(NAME, {**machine(), **{name: summary[name] for name in names}})


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _rate(value: dict[str, Any]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def accuracy_table(run: dict[str, Any]) -> list[str]:
    """A row per family, a column per model."""
    rows = [row for row in run["tables"]["families"] if not row["shuffled"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    families = sorted({row["family"] for row in rows}, key=lambda name: -max(
        row["accuracy"] for row in rows if row["family"] == name))  # fmt: skip
    shared = {row["family"]: row for row in run["tables"]["fixed_init"]}
    head = ["features", "how many", *models] + (["ridge, shared initial factors"] if shared else [])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for family in families:
        own = {row["model"]: row for row in rows if row["family"] == family}
        cells = [f"`{family}`", f"{next(iter(own.values()))['features']:,}"]
        cells += [_percent(own[model]) if model in own else "" for model in models]
        cells += [_percent(shared[family]) if family in shared else ""] if shared else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def edit_table(run: dict[str, Any]) -> list[str]:
    """A row per direction, a column per strength: how often pictures show the target class."""
    rows = run["tables"]["edits"]
    if not rows:
        return []
    strengths = list(dict.fromkeys(row["t"] for row in rows))
    lines = ["| edit | direction | " + " | ".join(f"t = {t:g}" for t in strengths) + " |",
             "|---|---" + "|---" * len(strengths) + "|"]  # fmt: skip
    for pair, kind in dict.fromkeys((row["pair"], row["direction"]) for row in rows):
        own = {row["t"]: row for row in rows if (row["pair"], row["direction"]) == (pair, kind)}
        lines.append(f"| {pair} | {kind} | " + " | ".join(_rate(own[t]["target"]) for t in strengths) + " |")
    total = rows[0]["target"]["n"]
    return [*lines, "", f"Per cent of {total} pictures that show the target class, Wilson 95 % intervals."]


def text() -> str:
    """Everything between the marks of the page."""
    parts: list[str] = []
    runs, benches = stored(NAME), stored("weightspace")
    if runs:
        run = runs[-1]
        head, control = run["headline"], run["headline"]["shuffled"]
        parts += [
            f"Test accuracy in per cent on {head['adapters']:,} adapters of {head['classes']} classes "
            f"(d = {head['d']:,}), no image shared between parts of a split, mean and 95 % interval over "
            f"{head['best']['runs']} runs:",
            "", *accuracy_table(run), "",
            f"With shuffled labels `{control['family']}` ({control['model']}) is right in {_percent(control)} %; "
            f"chance is {100 / head['classes']:.0f} %. The whole run took {run['seconds']:.0f} s, "
            f"{run['machine']['processor']}.",
        ]  # fmt: skip
        parts += ["", *edit_table(run)] if run["tables"]["edits"] else []
    if benches:
        parts += ["", table(benches[-1])]
    return "\n".join(parts)


def main() -> None:
    """Store a run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["store", "page"], default="page")
    parser.add_argument("folder", nargs="?", type=Path)
    asked = parser.parse_args()
    if asked.what == "store":
        if asked.folder is None:
            parser.error("store needs the folder of a run")
        keep(asked.folder)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, mark, after = rest.partition(END)
    if not mark:
        raise InputError("page", value=str(PAGE), allowed=f"the marks {START} and {END}")
    write_text(PAGE, f"{before}{START}\n{text()}\n{END}{after}")
    print(text())


if __name__ == "__main__":
    main()
