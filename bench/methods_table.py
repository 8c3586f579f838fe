"""The comparison of methods for the docs: stored from runs of the recipe, printed as Markdown.

pysteer run methods --name methods
python -m bench.methods_table store results/methods
python -m bench.methods_table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.headline import percent
from bench.record import append, machine, stored
from pysteer.files import read_json

_KEPT = ("method", "options", "place", "reaches", "label", "strength", "target_rate", "kept_rate", "kept_lowest",
         "change_outside", "feature_distance", "prompts")  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The Markdown table of one stored run: every method at its best strength, references and controls below."""
    lines = []
    for pair in dict.fromkeys(row["pair"] for row in result["rows"]):
        lines += [
            f"| {pair.replace('-to-', ' → ')}: method | fitted at | strength | target class, % | "
            "other attributes kept, % of unsteered | feature distance | change outside the object |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in result["rows"] if row["pair"] == pair]
        lines.append("")
    where = result["machine"]
    prompts = max(row["prompts"] for row in result["rows"])
    lines.append(
        f"`{result['generator']}`: {prompts} fresh prompts per setting, the same noise in every setting, Wilson 95 % "
        f"intervals; the attribute that is kept worst is named; in bold: at least {100 * result['reach']:.0f} % with "
        f"every other attribute at {100 * result['keep']:.0f} % of unsteered or more. {result['images']['generated']} "
        f"images on {where['processor']}, torch {result['versions']['torch']}, {result['date'][:10]}."
    )
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    name = f"**{row['label']}**" if row.get("reaches") else row["label"]
    kept = "-" if row["kept_rate"] is None else f"{100 * row['kept_rate']:.1f} ({row['kept_lowest']})"
    outside = "-" if row["change_outside"] is None else f"{row['change_outside']:.3f}"
    distance = "-" if row["feature_distance"] is None else f"{row['feature_distance']:.0f}"
    strength = f"{row['strength']:g}" if row["strength"] else ""
    place = row.get("place", "")
    return f"| {name} | {place} | {strength} | {percent(row['target_rate'])} | {kept} | {distance} | {outside} |"


def rows_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What is stored of a summary: methods, references and controls, pair by pair."""
    every = [*summary["tables"]["methods"], *summary["tables"]["references"]]
    pairs = dict.fromkeys(row["pair"] for row in every)
    kept = [{"pair": row["pair"], **{name: row[name] for name in _KEPT if name in row}} for row in every]
    return [row for pair in pairs for row in kept if row["pair"] == pair]


def store(folder: Path) -> None:
    """Keep what the table shows of a run folder."""
    summary = read_json(folder / "summary.json", "summary of the run")
    config = read_json(folder / "run.json", "marker of the run")["config"]
    bars = {name: config[name] for name in ("generator", "keep", "reach", "search_prompts", "fit_pairs")}
    print(append("methods", {**bars, "rows": rows_of(summary), "images": summary["headline"]["images"], **machine()}))


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every generator and pair the rows of the newest stored run that has them, one result a run, oldest first."""
    last = {(result["generator"], row["pair"]): result for result in results for row in result["rows"]}
    kept = [
        {**result, "rows": [row for row in result["rows"] if last[result["generator"], row["pair"]] is result]}
        for result in results
    ]
    order = list(dict.fromkeys(result["generator"] for result in results))
    return sorted((result for result in kept if result["rows"]), key=lambda result: order.index(result["generator"]))


def main() -> None:
    """Store a run, or print the newest stored rows of every generator and pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("store", "print"), nargs="?", default="print")
    parser.add_argument("folder", type=Path, nargs="?", help="run folder, for `store`")
    arguments = parser.parse_args()
    if arguments.action == "store":
        if arguments.folder is None:
            parser.error("store needs the run folder")
        store(arguments.folder)
        return
    results = newest(stored("methods"))
    if not results:
        sys.exit("no stored result; fix: python -m bench.methods_table store results/methods")
    print("\n\n".join(table(result) for result in results))


if __name__ == "__main__":
    main()
