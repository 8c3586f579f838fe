"""The figures in the README: stored from a run of the main experiment, and written between two marks.

pysteer run infinity-prototype
python -m bench.headline store results/infinity-prototype
python -m bench.headline readme
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.record import RESULTS, append, machine, stored
from pysteer.files import read_json, write_text

README = RESULTS.parent.parent / "README.md"
START, END = "<!-- headline: python -m bench.headline readme -->", "<!-- /headline -->"


def percent(value: dict[str, Any] | None) -> str:
    """`96.1 [93.2, 97.8]` for a rate with its Wilson interval, in per cent."""
    if not value or not value.get("n"):
        return "-"
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def table(result: dict[str, Any]) -> str:
    """The Markdown table of one stored run: target and kept rates of every setting of every pair."""
    lines = [
        "| pair | setting | target class, % | other attributes kept, % of unsteered | change outside the object |",
        "|---|---|---|---|---|",
    ]
    for row in result["settings"]:
        kept = "-" if row["kept_rate"] is None else f"{100 * row['kept_rate']:.1f} ({row['kept_lowest']})"
        outside = "-" if row["change_outside"] is None else f"{row['change_outside']:.3f}"
        pair = row["pair"].replace("-to-", " → ")
        lines.append(f"| {pair} | {row['label']} | {percent(row['target_rate'])} | {kept} | {outside} |")
    prompts = max(row["prompts"] for row in result["settings"])
    where = result["machine"]
    lines.append("")
    lines.append(
        f"{prompts} prompts per setting, the same noise in every setting, Wilson 95 % intervals; the attribute that is "
        f"kept worst is named. {result['images']['generated']} images in {result['images']['seconds']:.0f} s on "
        f"{where['processor']}, {where['threads']} threads, torch {result['versions']['torch']}, {result['date'][:10]}."
    )
    return "\n".join(lines)


def store(folder: Path) -> None:
    """Keep what the README shows of a run folder."""
    summary = read_json(folder / "summary.json", "summary of the run")
    result = {"settings": summary["tables"]["settings"], "other_classes": summary["tables"]["other_classes"]}
    print(append("headline", {**result, "images": summary["headline"]["images"], **machine()}))


def readme_text(text: str, result: dict[str, Any]) -> str:
    """The README with the table of `result` between its marks."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(result)}\n{END}{after}"


def main() -> None:
    """Store a run, or write the newest stored run into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("store", "readme"))
    parser.add_argument("folder", type=Path, nargs="?", help="run folder, for `store`")
    arguments = parser.parse_args()
    if arguments.action == "store":
        if arguments.folder is None:
            parser.error("store needs the run folder")
        store(arguments.folder)
        return
    results = stored("headline")
    if not results:
        sys.exit("no stored result; fix: python -m bench.headline store results/infinity-prototype")
    write_text(README, readme_text(README.read_text(encoding="utf-8"), results[-1]))


if __name__ == "__main__":
    main()
