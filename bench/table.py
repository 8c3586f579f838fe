"""Tables and plots of stored measurements of the ops.

python -m bench.table             the newest stored figures of every op and shape as a Markdown table
python -m bench.table --plot ops.svg        and a plot of them; `pysteer bench table` draws that of the documentation
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from bench.record import stored

OWN = ("in place", "out=", "op")  # labels of the op itself, best first
COMPILED, EAGER = ("compile out=", "compile"), ("eager",)


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of every op and shape on every machine, with `where` it was measured."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in results:
        machine = result["machine"]
        name = machine["gpu"] or f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
        for row in result["rows"]:
            where = f"{name}, torch {result['versions']['torch']}, {result['date'][:10]}, commit {result['commit']}"
            found[(name, row["op"], row["shape"])] = {**row, "where": where, "on": name}
    return sorted(found.values(), key=lambda row: (row["device"], row["on"], row["op"]))


def by_machine(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every machine."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["on"], []).append(row)
    return found


def best(row: dict[str, Any], labels: tuple[str, ...]) -> tuple[str, float] | None:
    """The first of the labels that was measured, and its median as a multiple of the floor."""
    for label in labels:
        if label in row["times_floor"]:
            return label, row["times_floor"][label]["p50"]
    return None


def own(row: dict[str, Any]) -> float:
    """The op as it serves when left alone, as a multiple of the floor."""
    found = best(row, OWN)
    assert found is not None
    return found[1]


def naive(row: dict[str, Any]) -> tuple[str, float] | None:
    """The field's way: what is neither the floor, nor the op, nor plain torch."""
    known = {row["floor"], *COMPILED, *EAGER}
    others = [label for label in row["times_floor"] if label not in known and not label.startswith(OWN)]
    return (others[0], row["times_floor"][others[0]]["p50"]) if others else None


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table; no speed-up is given where the result was wrong."""
    if not timed(row):
        return [row["op"], row["shape"], "wrong result, not timed", "", "", "", "", ""]
    mine = own(row)
    seconds = row["seconds"][row["floor"]]["p50"]
    fused, plain, field = best(row, COMPILED), best(row, EAGER), naive(row)
    return [
        row["op"],
        row["shape"],
        row["backend"],
        f"{row['floor']} {1e3 * seconds:.3g} ms",
        f"{mine:.2f}",
        *(f"{each[1] / mine:.1f}x" if each else "-" for each in (fused, plain)),
        f"{field[1] / mine:.1f}x ({field[0]})" if field else "-",
    ]


def table(*results: dict[str, Any]) -> str:
    """The Markdown tables of stored results, one per machine."""
    head = ["op", "shape", "backend", "floor", "op / floor", "compile / op", "eager / op", "usual way / op"]
    parts = []
    for name, rows in by_machine(newest(list(results))).items():
        lines = [f"On {name}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
        lines += ["", "Measured on:", *(f"- {where}" for where in dict.fromkeys(row["where"] for row in rows))]
        parts.append("\n".join(lines))
    told = "Medians of ratios within a round; `op / floor` of an op that steers is in place."
    return "\n\n".join([*parts, told])


def digest(results: list[dict[str, Any]]) -> str:
    """What a plot of these results is known by: it changes with every figure in it."""
    drawn = [[row["op"], row["shape"], row["on"], *points(row).values()] for row in newest(results) if timed(row)]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def timed(row: dict[str, Any]) -> bool:
    """Whether a row has times: its result was right."""
    return "times_floor" in row


def points(row: dict[str, Any]) -> dict[str, float | None]:
    """Times of a row as multiples of the floor: the op, torch.compile, eager torch and the field's way, if measured."""
    others = {"torch.compile": best(row, COMPILED), "eager torch": best(row, EAGER), "usual way": naive(row)}
    return {"op": own(row), **{kind: found[1] if found else None for kind, found in others.items()}}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel per machine with a line per op and shape: the op, torch.compile, eager torch and the field's way.

    All are multiples of the floor. The same results give the same file; an SVG holds their `digest`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = by_machine([row for row in newest(results) if timed(row)])
    counts = [len(rows) for rows in panels.values()]
    with matplotlib.rc_context({"svg.hashsalt": "pysteer", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 1.2 + 0.17 * sum(counts) + 0.4 * len(counts)), layout="constrained")
        every = figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
        for axes, (name, rows) in zip(every, panels.items(), strict=True):
            _draw(axes, rows[::-1])
            axes.set_title(f"On {name}", fontsize=9, loc="left")
        every[0].set_xscale("log")
        every[0].legend(loc="lower right", fontsize=8)
        every[-1].set_xlabel("time as a multiple of the floor, which the table names (left is better)")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"pysteer {digest(results)}"} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=about)


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The lines of one machine, the first at the bottom."""
    looks = (("op", "#1b5e9b", "o"), ("torch.compile", "#e08e2b", "D"), ("eager torch", "#9a9a9a", "|"))
    values = [points(row) for row in rows]
    for place, each in enumerate(values):
        known = [value for kind, value in each.items() if value is not None and kind != "usual way"]
        axes.plot([min(known), max(known)], [place, place], color="#dddddd", linewidth=1, zorder=1)
    for kind, colour, marker in (*looks, ("usual way", "#b5483d", "x")):
        found = [(each[kind], place) for place, each in enumerate(values) if each[kind] is not None]
        if found:
            axes.scatter(*zip(*found, strict=True), s=22, label=kind, color=colour, marker=marker)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['op']}  {row['shape']}" for row in rows], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)


def main() -> None:
    """Print the table, and draw the plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="also draw a plot into this file (.svg or .png)")
    asked = parser.parse_args()
    results = stored("ops")
    if not results:
        print("nothing is stored yet: run python -m bench.run")
        return
    print(table(*results))
    if asked.plot:
        plot(results, asked.plot)


if __name__ == "__main__":
    main()
