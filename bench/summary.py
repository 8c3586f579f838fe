"""The speed results in short, a line per work: pysteer, plain hooks, and the quickest way or package of others."""

from __future__ import annotations

from typing import Any

from bench.speed_table import UNSTEERED, Row, newest_parts

HEAD = "| work | base | pysteer | plain hooks | quickest of the others |"
_OWN_FORMULAS = ("plain hooks", "plain formulas", "our reference")  # what is no way or package of others


def _quickest(rows: list[Row]) -> str:
    """The lowest ratio with the name of who has it; a dash where nobody has a time."""
    best = min(rows, key=lambda row: row["ratio"], default=None)
    return "-" if best is None else f"{best['ratio']:.3f} ({best['contender']})"


def _line(work: str, rows: list[Row]) -> str:
    base = next((row["contender"] for row in rows if row["ratio_quartiles"] == [1.0, 1.0]), "-")
    ours = [row for row in rows if row.get("ours")]
    plain = [row for row in rows if row["contender"].startswith(("plain hooks", "plain formulas"))]
    known = (*UNSTEERED, *_OWN_FORMULAS)
    others = [row for row in rows if not row.get("ours") and not row["contender"].startswith(known)]
    return f"| {work} | {base} | **{_quickest(ours)}** | {_quickest(plain)} | {_quickest(others)} |"


def summary_table(results: list[dict[str, Any]]) -> str:
    """Markdown of the newest result of every part: time over that of the base, medians of ratios within a round."""
    lines, machines = [HEAD, "|---" * 5 + "|"], {}
    for part, result in newest_parts(results).items():
        rows = [row for row in result["rows"] if row["part"] == part and "ratio" in row and not row.get("refused")]
        works = dict.fromkeys(row["work"] for row in rows)
        lines += [_line(work, [row for row in rows if row["work"] == work]) for work in works]
        machines[result["machine"]["gpu"] or result["machine"]["processor"]] = None
    told = f"Time over that of the base, one thread each, on {' and '.join(machines)}."
    return "\n".join([*lines, "", told])
