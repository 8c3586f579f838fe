"""Two stored results side by side: what got slower, or worse, beyond the noise of both.

    python -m bench.compare speed              the newest stored result against the one before
    python -m bench.compare speed 3 5          numbers count from 0; -1 is the newest
    python -m bench.compare old.json new.json  two files with a result, or a list of results, each

A speed is a regression where the quartiles of the ratios do not overlap and the median grew by more than `--least`; an
effect where the intervals of the scores do not overlap. The exit code is 1 when there is a regression.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.record import stored
from pysteer.errors import InputError
from pysteer.files import read_json

Row = dict[str, Any]
_NAMES = ("part", "work", "mode", "model", "settings", "contender", "batch", "generator", "concept", "method", "pairs",
          "control", "op", "shape", "device")  # fmt: skip


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row.get(name) for name in _NAMES)


def label(row: Row) -> str:
    """The same in words."""
    return ", ".join(str(row[name]) for name in _NAMES if row.get(name) not in (None, ""))


def _spans(row: Row) -> dict[str, tuple[float, float, float, bool]]:
    """Figure -> value, low, high, and whether less is better."""
    found = {}
    if row.get("ratio_quartiles"):
        low, high = row["ratio_quartiles"]
        found["time / base"] = (row["ratio"], low, high, True)
    if isinstance(row.get("score"), dict):
        score = row["score"]
        found["score"] = (score["value"], score["low"], score["high"], False)
    for name, figures in (row.get("times_floor") or {}).items():
        if name != row.get("floor"):
            found[f"{name} / floor"] = (figures["p50"], figures["p20"], figures["p80"], True)
    return found


def _ours(row: Row) -> bool:
    """Whether a row tells of pysteer: others may change as they like."""
    if "contender" in row and "ours" in row:
        return bool(row["ours"])
    return not str(row.get("contender", "")).startswith(("unsteered", "hooks"))


def compare(old: Row, new: Row, least: float = 0.02) -> dict[str, list[str]]:
    """What got worse, what got better, and what is only in one of two results.

    Args:
        old, new: results with `rows`.
        least: relative change of a time below which nothing is said.
    """
    before = {identity(row): row for row in old["rows"]}
    after = {identity(row): row for row in new["rows"]}
    found: dict[str, list[str]] = {"worse": [], "better": [], "gone": [], "refused": []}
    for key, row in before.items():
        if key not in after:
            found["gone"].append(label(row))
            continue
        if after[key].get("refused") and not row.get("refused") and _ours(row):
            found["refused"].append(f"{label(row)}: {after[key]['refused']}")
        now = _spans(after[key])
        for name, (value, low, high, less) in _spans(row).items():
            if name not in now or not _ours(row):
                continue
            value2, low2, high2, _ = now[name]
            apart = abs(value2 - value) > least * abs(value)
            text = f"{label(row)}: {name} {value:.3f} [{low:.3f}, {high:.3f}] -> {value2:.3f} [{low2:.3f}, {high2:.3f}]"
            if apart and low2 > high:
                found["worse" if less else "better"].append(text)
            elif apart and high2 < low:
                found["better" if less else "worse"].append(text)
    return found


def _result(word: str, name: str) -> Row:
    """A stored result by number, or the last one of a file."""
    if word.lstrip("-").isdigit():
        results = stored(name)
        try:
            return results[int(word)]
        except IndexError as error:
            allowed = f"0 to {len(results) - 1}" if results else "nothing is stored yet"
            raise InputError(f"result of {name}", value=word, allowed=allowed) from error
    found = read_json(Path(word), "result")
    return found[-1] if isinstance(found, list) else found


def main(words: list[str] | None = None) -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", help="a name of bench/results and two numbers, or two files")
    parser.add_argument("--least", type=float, default=0.02, help="relative change of a time that counts")
    asked = parser.parse_args(words)
    name, *numbers = asked.which
    if Path(name).is_file():
        name, numbers = "", asked.which
    numbers = numbers or ["-2", "-1"]
    if len(numbers) != 2:
        raise InputError("results to compare", value=" ".join(asked.which), allowed="two numbers or two files")
    old, new = (_result(word, name) for word in numbers)
    machines = [f"{r['machine']['gpu'] or r['machine']['processor']}" for r in (old, new)]
    if machines[0] != machines[1] or bool(old.get("quick")) != bool(new.get("quick")):
        print(f"note: not the same conditions: {machines[0]} against {machines[1]}", file=sys.stderr)
    found = compare(old, new, asked.least)
    for kind, texts in found.items():
        for text in texts:
            print(f"{kind}: {text}")
    if not any(found.values()):
        print("no difference beyond the noise")
    if found["worse"] or found["refused"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
