"""The figures of docs/weightspace.md: a kept run of the recipes, and the newest benchmark.

python -m bench.weightspace_table store results/weightspace    # keeps the figures of a run (or several)
python -m bench.weightspace_table                              # writes the newest of them into the page
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import append, machine, stored, write_between
from bench.weightspace import table
from pysteer.errors import InputError
from pysteer.files import read_json

PAGE = Path(__file__).resolve().parent.parent / "docs" / "weightspace.md"
START, END = "<!-- figures: python -m bench.weightspace_table -->", "<!-- /figures -->"
NAME = "weightspace_experiment"


def keep(folders: Sequence[Path]) -> None:
    """Store what finished runs of the recipe `weightspace` on one collection found, as one result."""
    found: dict[str, Any] = {}
    for folder in folders:
        summary = read_json(folder / "summary.json", "summary of the run")
        if summary.get("recipe") != "weightspace":
            raise InputError("run", value=str(folder), allowed="a finished run of the recipe weightspace")
        if not found:
            found = {name: summary[name] for name in ("headline", "tables", "best", "seconds")}
            continue
        if summary["headline"]["adapters"] != found["headline"]["adapters"]:
            raise InputError("run", value=str(folder), allowed="runs on one collection")
        found["seconds"] += summary["seconds"]
        for name, rows in summary["tables"].items():
            known = {_key(row) for row in found["tables"].get(name, [])}
            found["tables"].setdefault(name, []).extend(row for row in rows if _key(row) not in known)
    append(NAME, {**machine(), **found})


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("family", "model", "shuffled", "layer", "pair", "direction", "what", "t", "strength")
    return tuple(row.get(name) for name in names)


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


def shared_table(run: dict[str, Any]) -> list[str]:
    """The control: adapters with noise of their own to start from, and adapters that share it."""
    shared = {(row["family"], row["model"]): row for row in run["tables"]["fixed_init"]}
    own = {(row["family"], row["model"]): row for row in run["tables"]["families"] if not row["shuffled"]}
    lines = ["| features | model | initial factors of its own | shared initial factors |", "|---|---|---|---|"]
    lines += [
        f"| `{key[0]}` | {key[1]} | {_percent(own[key])} | {_percent(shared[key])} |" for key in shared if key in own
    ]
    count = f"{run['headline']['adapters']:,} adapters, trained alike but for what `down` starts from"
    return [f"Test accuracy in per cent on {count}:", "", *lines]


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
    about = (
        f"Adapters of the source class out of a collection of {run['headline']['adapters']:,}, moved by t; the judge "
    )
    note = f"Per cent of {total} pictures that show the target class, Wilson 95 % intervals."
    return [about + "is the bundled classifier, t = 1 the difference of the class means:", "", *lines, "", note]


def bridge_table(run: dict[str, Any]) -> list[str]:
    """The direction on the generator itself: in weights, as the shift it predicts, as a shift fitted on activations."""
    rows = run["tables"].get("bridges", [])
    if not rows:
        return []
    strengths = sorted({row["strength"] for row in rows if row["strength"]})
    lines = ["| direction | what is changed | unsteered | " + " | ".join(f"strength {s:g}" for s in strengths) + " |",
             "|---|---|---" + "|---" * len(strengths) + "|"]  # fmt: skip
    for pair, what in dict.fromkeys((row["pair"], row["what"]) for row in rows if row["strength"]):
        own = {row["strength"]: _rate(row["target"]) for row in rows if (row["pair"], row["what"]) == (pair, what)}
        plain = next(_rate(row["target"]) for row in rows if row["pair"] == pair and not row["strength"])
        lines.append(f"| {pair} | {what} | {plain} | " + " | ".join(own[s] for s in strengths) + " |")
    cosines = {row["pair"]: row["mean_cosine"] for row in rows}
    said = ", ".join(f"{pair} {value:+.2f}" for pair, value in cosines.items())
    about = (
        "The same direction on the generator itself, as a change of weights, as the mean shift dW h that it predicts, "
    )
    note = f"Mean cosine between the predicted and the fitted shift, over layers and steps: {said}."
    return [about + "and a shift fitted on activations at the same layers:", "", *lines, "", note]


def text() -> str:
    """Everything between the marks of the page."""
    parts: list[str] = []
    runs, benches = stored(NAME), stored("weightspace")
    if runs:
        # The largest collection says most about accuracies; edits and controls may have been measured on another one.
        run = max(reversed(runs), key=lambda each: each["headline"]["adapters"])
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
        for name, make in (("fixed_init", shared_table), ("edits", edit_table), ("bridges", bridge_table)):
            newest = next((each for each in reversed(runs) if each["tables"].get(name)), None)
            parts += ["", *make(newest)] if newest else []
    if benches:
        parts += ["", table(benches[-1])]
    return "\n".join(parts)


def main() -> None:
    """Store a run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["store", "page"], default="page")
    parser.add_argument("folders", nargs="*", type=Path)
    asked = parser.parse_args()
    if asked.what == "store":
        if not asked.folders:
            parser.error("store needs the folder of a run, or of several on one collection")
        keep(asked.folders)
    write_between(PAGE, START, END, text())
    print(text())


if __name__ == "__main__":
    main()
