"""Tables of README and docs, written from the stored results between two marks, and the plot of the ops.

    python -m bench.docs            writes them
    python -m bench.docs --check    says where a document disagrees with what is stored; exit code 1

A mark is `<!-- bench: NAME -->`, ended by `<!-- /bench -->`. That nobody writes a figure by hand is tested.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import headline
from bench.record import stored
from pysteer.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/ops.svg"
_MARK = re.compile(r"(<!-- bench: ([a-z-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def _speed() -> str:
    from bench.speed_table import speed_table

    results = stored("speed")
    return speed_table(results) if results else "Not measured yet."


def _summary() -> str:
    from bench.summary import summary_table

    results = stored("speed")
    return summary_table(results) if results else "Not measured yet."


def _effect() -> str:
    from bench.effect import newest, report

    results = stored("effect")
    return report(newest(results)) if results else "Not measured yet."


def _rows() -> str:
    from bench.rows import table

    results = stored("rows")
    full = [one for one in results if not one.get("quick")]
    return table((full or results)[-1]) if results else "Not measured yet."


def _methods() -> str:
    from bench.methods_table import newest, table

    return "\n\n".join(table(one) for one in newest(stored("methods"))) or "Not measured yet."


def _language() -> str:
    """Newest rows of `bench.language`: ratios to the unsteered model."""
    results = stored("language")
    if not results:
        return "Not measured yet."
    newest: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            newest[row.get("mode", "eager"), row["work"], row["contender"]] = (row, result)
    lines = ["| mode | work | contender | time / unsteered |", "|---|---|---|---|"]
    for (mode, work, contender), (row, _) in sorted(newest.items(), key=lambda item: item[0][:2]):
        ratio = f"no time: {row['refused']}" if row["refused"] else f"{row['ratio']:.3f}"
        lines.append(f"| {mode} | {work} | {contender} | {ratio} |")
    ratios = {(mode, work, who): row["ratio"] for (mode, work, who), (row, _) in newest.items() if row["ratio"]}
    slower = [
        f"{mode}, {work}: hooks {ratios[mode, work, 'hooks']:.3f} against {ratio:.3f}"
        for (mode, work, who), ratio in ratios.items()
        if who == "steered" and ratios.get((mode, work, "hooks"), ratio) < ratio
    ]
    if slower:
        lines += ["", f"Pysteer is not the fastest here: {'; '.join(slower)}."]
    return "\n".join([*lines, "", f"Newest of every row; the last on {_where(results[-1])}."])


def _sweep() -> str:
    from bench.sweep import table

    results = stored("sweep")
    return f"{table(results[-1]['sweep'])}\n\n{_where(results[-1])}." if results else "Not measured yet."


def _inspector() -> str:
    """Seconds until the pages of the inspector are there."""
    results = stored("inspector")
    if not results:
        return "Not measured yet."
    last = results[-1]
    lines = ["| what | first time, s | then, s |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['first s']:.3f} | {row['median s']:.3f} |" for row in last["rows"]]
    said = (
        f"{last['cells']:,} cells. The first time includes reading the shards, then the median of further requests; "
        f"the command was given three times, quickest and median. {_where(last)}."
    )
    return "\n".join([*lines, "", said])


def _dream() -> str:
    from bench.dream import table

    results = stored("dream")
    return table(results) if results else "Not measured yet."


def _where(result: dict[str, Any]) -> str:
    return f"{result['machine']['processor']}, torch {result['versions']['torch']}, {result['date'][:10]}"


TABLES: dict[str, Callable[[], str]] = {
    "speed": _speed,
    "summary": _summary,
    "effect": _effect,
    "rows": _rows,
    "methods": _methods,
    "language": _language,
    "sweep": _sweep,
    "inspector": _inspector,
    "dream": _dream,
}


def documents() -> list[Path]:
    """README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """The text of a document with all its tables as they are stored."""
    known: dict[str, str] = {}

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise ValueError(f"no table {name}; there are {', '.join(TABLES)}")
        if name not in known:
            known[name] = TABLES[name]()
        return f"{found[1]}{known[name]}\n{found[4]}"

    text = _MARK.sub(fill, text)
    runs = stored("headline")
    return headline.readme_text(text, runs[-1]) if headline.START in text and runs else text


def picture_is_stale() -> bool:
    """Whether the plot of the ops was drawn from other results than those that are stored."""
    from bench.table import digest

    results = stored("ops")
    return bool(results) and (not PICTURE.is_file() or digest(results) not in PICTURE.read_text(encoding="utf-8"))


def _draw() -> None:
    from bench.table import plot

    plot(stored("ops"), PICTURE)


def main(words: list[str] | None = None) -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what disagrees")
    asked = parser.parse_args(words)
    stale = []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if before != after:
            stale.append(path.name)
            if not asked.check:
                write_text(path, after)
    if picture_is_stale():
        stale.append(PICTURE.name)
        if not asked.check:
            _draw()
    print(f"{'out of date' if asked.check else 'written'}: {', '.join(stale)}" if stale else "all tables are as stored")
    if stale and asked.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
