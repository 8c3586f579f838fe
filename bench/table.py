"""Tables and plots of stored measurements of the ops.

python -m bench.table             the newest stored figures of every op and shape as a Markdown table
python -m bench.table --plot bench/results/ops.svg
"""

from __future__ import annotations

import argparse
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
        name = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
        for row in result["rows"]:
            where = f"{name}, torch {result['versions']['torch']}, {result['date'][:10]}, commit {result['commit']}"
            found[(name, row["op"], row["shape"])] = {**row, "where": where}
    return sorted(found.values(), key=lambda row: (row["device"], row["op"]))


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
    if "times_floor" not in row:
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
    """The Markdown table of stored results."""
    rows = newest(list(results))
    head = ["op", "shape", "backend", "floor", "op / floor", "compile / op", "eager / op", "usual way / op"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", "Medians of ratios within a round; `op / floor` of an op that steers is in place. Measured on:"]
    lines += [f"- {where}" for where in dict.fromkeys(row["where"] for row in rows)]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the op against torch.compile, eager torch and the field's way, in multiples of the floor."""
    from matplotlib.figure import Figure

    rows = [row for row in newest(results) if "times_floor" in row][::-1]
    figure = Figure(figsize=(10, 1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "op": lambda row: own(row),
        "torch.compile": lambda row: (best(row, COMPILED) or ("", None))[1],
        "eager": lambda row: (best(row, EAGER) or ("", None))[1],
        "usual way": lambda row: (naive(row) or ("", None))[1],
    }
    colours = ("#1b5e9b", "#e08e2b", "#9a9a9a", "#b5483d")
    for place, (kind, value) in enumerate(kinds.items()):
        found = [(i + 0.3 - 0.2 * place, value(row)) for i, row in enumerate(rows)]
        found = [(y, x) for y, x in found if x is not None]
        axes.barh([y for y, _ in found], [x for _, x in found], 0.18, label=kind, color=colours[place])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['op']}  {row['shape']}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("time as a multiple of the floor (left is better)")
    axes.margins(y=0.01)
    axes.legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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
