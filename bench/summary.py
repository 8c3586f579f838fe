"""The speed results in short, a line per work: pysteer, plain hooks, and the quickest way or package of others."""

from __future__ import annotations

from typing import Any

from bench.speed_table import UNSTEERED, Row, base_of, machine_of, newest_parts

HEAD = "| work | base | pysteer | plain hooks | quickest of the others |"
_PLAIN = ("plain hooks", "plain formulas")


def _quickest(rows: list[Row]) -> str:
    """The lowest ratio with the name of who has it; a dash where nobody has a time."""
    best = min(rows, key=lambda row: row["ratio"], default=None)
    return "-" if best is None else f"{best['ratio']:.3f} ({best['contender']})"


def _line(work: str, rows: list[Row]) -> str:
    ours = [row for row in rows if row.get("ours")]
    plain = [row for row in rows if row["contender"].startswith(_PLAIN)]
    known = (*UNSTEERED, *_PLAIN, "our reference")
    others = [row for row in rows if not row.get("ours") and not row["contender"].startswith(known)]
    return f"| {work} | {base_of(rows)} | **{_quickest(ours)}** | {_quickest(plain)} | {_quickest(others)} |"


def summary_table(results: list[dict[str, Any]]) -> str:
    """Markdown of the newest result of every part: time over that of the base, medians of ratios within a round."""
    lines, machines = [HEAD, "|---" * 5 + "|"], {}
    for part, result in newest_parts(results).items():
        rows = [row for row in result["rows"] if row["part"] == part and "ratio" in row and not row.get("refused")]
        works = dict.fromkeys(row["work"] for row in rows)
        lines += [_line(work, [row for row in rows if row["work"] == work]) for work in works]
        machines[machine_of(result)] = None
    told = f"Time over that of the base, one thread each, on {' and '.join(machines)}."
    return "\n".join([*lines, "", told])
