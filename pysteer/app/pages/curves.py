"""Dose response, and target against damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pysteer.app import charts
from pysteer.app.pages.grid import X_FIRST
from pysteer.app.pages.query import Query, named
from pysteer.app.pages.rows import runs_with, serves, table_of
from pysteer.app.tables import Point, text_of
from pysteer.errors import InputError

if TYPE_CHECKING:
    from pysteer.app.server import Inspector

_MEASURES = ("target", "target_rate", "hit", "concept_rate", "accuracy", "kept_rate", "mse")
_DAMAGE = ("change", "feature_distance", "change_outside", "distance", "perplexity_ratio", "pixel_change", "kl")


def curves_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Dose response of a measure, and what it costs: target against damage with its Pareto front."""
    runs = runs_with(app, "curve")
    if not runs and not query.text("run"):
        return {"title": "Curves", "runs": [], "query": query}
    query["run"] = named(runs, query)
    info, known, name, table = table_of(app, query, "curve")
    tables = [one for one in known if serves(app, info.id, one, "curve")]
    numbers = [n for n in table.axes() if table.kinds[n] == "number"]
    measures = table.measures()
    if not numbers or not measures:
        raise InputError("table with numbers", value=name, allowed=", ".join(tables) or "none of this run")
    x = query.choice("x", numbers, next((n for n in X_FIRST if n in numbers), numbers[0]))
    y = query.choice("y", measures, next((n for n in _MEASURES if n in measures), measures[0]))
    damage = query.choice("damage", measures, next((n for n in _DAMAGE if n in measures), measures[-1]))
    groups = ["none", *(n for n in table.axes() if n != x and len(table.coded(n)[1]) <= 24)]
    by = query.choice("by", groups, next((n for n in ("method", "kind", "condition", "family") if n in groups), "none"))
    key = "" if by == "none" else by
    rows = table.chosen(query.filters, query.text("q"))
    good, cost = table.curves(x, y, key, rows), table.curves(x, damage, key, rows)

    def address(line: charts.Line, point: Point) -> str:
        from pysteer.app.server import link

        extra = {f"f.{key}": line.label} if key else {}
        kept = {f"f.{n}": v for n, v in query.filters.items()}
        return link("/rows", {"run": info.id, "table": name, "q": query.text("q"), **kept, **extra,
                              f"f.{x}": f"{point.x:.9g}..{point.x:.9g}"})  # fmt: skip

    lines = [charts.Line(label, points) for label, points in good.items()]
    dose = charts.line_chart(lines, x_name=x, y_name=y, title=f"{y} against {x}", link=address)
    trade, front = _trade(good, cost)
    shown = charts.line_chart(
        [*trade, front], x_name=damage, y_name=y, title=f"{y} against {damage}", link=lambda line, p: ""
    )
    return {
        "title": "Curves", "runs": runs, "info": info, "known": tables, "name": name, "numbers": numbers,
        "measures": measures, "groups": groups, "x": x, "y": y, "damage": damage, "by": by, "dose": dose,
        "trade": shown, "query": query, "good": good, "text": text_of, "problems": table.problems,
        "others": table.filters([x, key]),
        "counts": (len(rows), len(table)),
    }  # fmt: skip


def _trade(good: Mapping[str, list[Point]], cost: Mapping[str, list[Point]]) -> tuple[list[charts.Line], charts.Line]:
    """Points of target against damage per curve, and the front of those that nothing beats."""
    lines, every = [], []
    for label, points in good.items():
        costs = {point.x: point for point in cost.get(label, [])}
        pairs = [(costs[p.x], p) for p in points if p.x in costs]
        moved = [Point(c.value, p.value, p.low, p.high, p.count) for c, p in pairs]
        lines.append(charts.Line(label, moved, band=False, labels=[f"{c.x:.4g}" for c, _ in pairs]))
        every += moved
    kept = charts.pareto([(point.x, point.value) for point in every])
    return lines, charts.Line("Pareto front", [every[i] for i in kept], band=False)
