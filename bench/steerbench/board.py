"""The leaderboard of SteerBench: figures with bootstrap intervals over seeds and prompts, a table, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.steerbench.cells import main_pairs

Row = dict[str, Any]
DRAWS = 1000
_SHARES = ("target", "kept", "kept_unsteered", "beside", "beside_unsteered", "target_unsteered", "target_swap")


def _means(measured: Sequence[Row], draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Shares of every draw `[draws + 1]`, the first of them of what was measured.

    A draw takes seeds with replacement, and of each of them prompts with replacement; the same prompts for all figures.
    """
    rng = np.random.default_rng(seed)
    names = [name for name in _SHARES if name in measured[0]]
    columns: dict[str, list[list[NDArray[np.float64]]]] = {name: [] for name in names}
    for row in measured:
        count = len(row["target"])
        picks = np.vstack([np.arange(count), rng.integers(count, size=(draws, count))])
        for name in names:
            values = np.asarray(row[name], dtype=np.float64)
            same = len(values) == count  # prompts of other classes are drawn on their own
            own = (
                picks
                if same
                else np.vstack([np.arange(len(values)), rng.integers(len(values), size=(draws, len(values)))])
            )
            columns[name].append([values[own].mean(1)])
    chosen = np.vstack([np.arange(len(measured)), rng.integers(len(measured), size=(draws, len(measured)))])
    found = {}
    for name in names:
        by_seed = np.stack([each[0] for each in columns[name]], axis=1)  # [draws + 1, seeds]
        found[name] = np.take_along_axis(by_seed, chosen, axis=1).mean(1)
    return found


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """The measured value with the middle 95 % of the draws."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(min(low, values[0])), "high": float(max(high, values[0]))}


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(1.0, part / np.maximum(whole, 1e-9))


def summarise(measured: Sequence[Row], draws: int = DRAWS, seed: int = 0) -> Row:
    """Figures of one method from its results over seeds.

    target: share of prompts that came to the concept. kept: share that kept everything else the prompt states, relative
    to unsteered. specific: share of prompts of other classes that kept theirs, relative to unsteered. score: their
    product (what cannot be measured counts as 1).
    """
    means = _means(measured, draws, seed)
    score = means["target"].copy()
    row: Row = {"target": interval(means["target"]), "unsteered": float(means["target_unsteered"][0])}
    if "target_swap" in means:
        row["swap"] = float(means["target_swap"][0])
    for name, source in (("kept", "kept"), ("specific", "beside")):
        if source in means:
            share = _share(means[source], means[f"{source}_unsteered"])
            row[name] = interval(share)
            score = score * share
    row["score"] = interval(score)
    for name in ("outside", "distance", "diversity", "monotone", "perplexity", "strength"):
        values = [value for one in measured for value in np.atleast_1d(one.get(name, [])) if value is not None]
        if values:
            row[name] = float(np.mean(np.asarray(values, dtype=np.float64)))
    told = {"dtype": measured[0]["dtype"]} if "dtype" in measured[0] else {}
    return row | told | {"seeds": len(measured), "place": measured[0].get("place", "")}


def board_of(results: Sequence[Row]) -> list[Row]:
    """A row per generator, concept, method, examples and control, best score first within a generator and concept.

    Args:
        results: cells as plain values (`Cell` fields) with what was `measured`.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in results:
        if "left_out" not in one["measured"]:
            key = tuple(one[name] for name in ("generator", "concept", "method", "pairs", "control"))
            groups.setdefault(key, []).append(one["measured"])
    rows = []
    for (generator, concept, method, pairs, control), measured in groups.items():
        named = {"generator": generator, "concept": concept, "method": method, "pairs": pairs, "control": control}
        rows.append(named | summarise(measured))
    return sorted(
        rows, key=lambda row: (row["generator"], row["concept"], bool(row["control"]), -row["score"]["value"])
    )


def conclusions(rows: Sequence[Row], pairs: int) -> list[str]:
    """Who is better than whom at a concept: said only where the intervals of the scores do not overlap."""
    found = []
    places = dict.fromkeys((row["generator"], row["concept"]) for row in rows)
    for generator, concept in places:
        every = main_pairs(concept, pairs)
        here = [r for r in rows if (r["generator"], r["concept"]) == (generator, concept) and r["pairs"] == every]
        methods = [row for row in here if not row["control"]]
        if not methods:
            continue
        best = methods[0]
        beaten = [row["method"] for row in methods[1:] if row["score"]["high"] < best["score"]["low"]]
        equal = [row["method"] for row in methods[1:] if row["method"] not in beaten]
        text = f"{generator}, {concept}: {best['method']} has the highest score"
        text += f", above {', '.join(beaten)}" if beaten else ", and no interval separates it from another"
        text += f"; not separated from {', '.join(equal)}" if beaten and equal else ""
        for row in here:
            real = next((m for m in methods if m["method"] == row["method"]), None)
            if row["control"] and real is not None and row["score"]["high"] >= real["score"]["low"]:
                text += f"; its control ({row['control']}) is not separated from {row['method']}"
        found.append(text + ".")
    return found


def percent(value: dict[str, float] | None) -> str:
    """`96 [93, 98]`."""
    return "-" if value is None else f"{100 * value['value']:.0f} [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def _number(row: Row, name: str, form: str) -> str:
    return format(row[name], form) if name in row else "-"


def line(row: Row) -> str:
    """One line of the leaderboard."""
    name = f"{row['method']}" + (f" ({row['control']})" if row["control"] else "")
    change = _number(row, "outside", ".3f") if "outside" in row else f"ppl x{row['perplexity']:.2f}"
    return (
        f"| {row['generator']} | {row['concept']} | {name} | {row['pairs']} | {percent(row['score'])} | "
        f"{percent(row['target'])} | {percent(row.get('kept'))} | {percent(row.get('specific'))} | {change} | "
        f"{_number(row, 'distance', '.0f')} | {_number(row, 'diversity', '.2f')} | {_number(row, 'monotone', '.2f')} | "
        f"{row['seeds']} |"
    )


def table(rows: Sequence[Row]) -> str:
    """The leaderboard in Markdown."""
    head = ("generator", "concept", "method @ place", "examples", "score", "target, %", "kept, %", "specific, %",
            "change outside", "feature distance", "diversity", "monotone", "seeds")  # fmt: skip
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(line(row) for row in rows)])


def figure(rows: Sequence[Row], pairs: int, path: Path) -> Path:
    """Bars of the scores with intervals, a panel per generator and concept."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["pairs"] == main_pairs(row["concept"], pairs)]
    panels = list(dict.fromkeys((row["generator"], row["concept"]) for row in shown))
    drawing = Figure(figsize=(9, 0.7 + 0.3 * len(shown) + 0.5 * len(panels)), layout="constrained")
    counts = [sum((r["generator"], r["concept"]) == panel for r in shown) for panel in panels]
    axes = np.atleast_1d(drawing.subplots(len(panels), 1, sharex=True, height_ratios=counts))
    for axis, panel in zip(axes, panels, strict=True):
        own = [row for row in shown if (row["generator"], row["concept"]) == panel][::-1]
        for place, row in enumerate(own):
            score = row["score"]
            reach = [[score["value"] - score["low"]], [score["high"] - score["value"]]]
            colour = "#b9b9b9" if row["control"] else "#1b5e9b"
            axis.barh(place, score["value"], xerr=reach, color=colour, height=0.7, error_kw={"elinewidth": 1})
        names = [row["method"] + (f" ({row['control']})" if row["control"] else "") for row in own]
        axis.set_yticks(range(len(own)), names, fontsize=7)
        axis.set_title(", ".join(panel), fontsize=9, loc="left")
        axis.set_xlim(0, 1)
    axes[-1].set_xlabel("score: target x kept x specific, with 95 % intervals (grey: controls, which must not work)")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
    return path
