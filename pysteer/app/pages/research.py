"""Training dynamics, and the weight space of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pysteer.app import charts
from pysteer.app.pages.query import Query, named
from pysteer.app.store import NotFound
from pysteer.app.tables import Point

if TYPE_CHECKING:
    from pysteer.app.server import Inspector


def dynamics_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Trainings: losses, dead channels, interventions, and the history of every channel."""
    from pysteer.app.research import curve, read_csv, training_path, trainings
    from pysteer.dynamics.window import STATS

    runs = [run for run in app.results.runs() if run.kind == "recipe" and trainings(app.results, run.id)]
    if not runs and not query.text("run"):
        return {"title": "Dynamics", "runs": [], "query": query}
    run = named(runs, query)
    info = app.results.run(run)
    known = trainings(app.results, run)
    training = query.choice("training", known)
    if not training:
        raise NotFound("trainings of run", value=run, allowed="a run of vae-dynamics")
    place = training_path(run, training)
    folder, prefix = app.results.path(place), "" if place == "." else f"{place}/"
    nudges, dead = read_csv(folder / "nudges.csv"), read_csv(folder / "dead_channels.csv")
    log = read_csv(folder / "training_log.csv")
    facts: dict[str, Any] = {
        "title": "Dynamics", "runs": runs, "info": info, "known": known, "training": training, "query": query,
        "loss": _csv_chart(curve(log, "step", "loss"), "step", "loss"),
        "inactive": _csv_chart(curve(read_csv(folder / "intervention_history.csv"), "step", "inactive"), "step",
                               "inactive channels"), "nudges": nudges[:200], "dead": dead[:200],
        "totals": (len(nudges), len(dead)), "series": "", "sites": [], "site": "", "stat": "",
        "pictures": [f"{prefix}{p.relative_to(folder).as_posix()}" for p in sorted(folder.rglob("*.png"))
                     if not p.name.startswith(".") and p.parent != folder / "figures"][:60],
    }  # fmt: skip
    if not (folder / "channel_history" / "capture.json").is_file():
        return {**facts, "problems": ["this training has no channel history yet"]}
    sites = app.histories.sites(run, training)
    site, stat = query.choice("site", sites), query.choice("stat", list(STATS), "mean_abs")
    steps, values = app.histories.series(run, training, site, stat)
    channel = query.whole("channel", 0, 0, values.shape[1] - 1)
    points = [(float(s), float(v)) for s, v in zip(steps, values[:, channel], strict=True)]
    touched = {float(n["step"]): "nudged" for n in nudges if _touches(n, site, channel)}
    drawn = _csv_chart(points, "step", f"{stat} of channel {channel}", touched)
    return {**facts, "sites": sites, "site": site, "stats": list(STATS), "stat": stat, "series": drawn,
            "channel": channel, "channels": values.shape[1], "steps": steps, "problems": []}  # fmt: skip


def _touches(nudge: Mapping[str, str], site: str, channel: int) -> bool:
    layer = nudge.get("parameter", "").rpartition(".")[0]
    return bool(layer) and site.startswith(layer) and nudge.get("channel") == str(channel)


def _csv_chart(points: list[tuple[float, float]], x: str, y: str, marks: Mapping[float, str] | None = None) -> str:
    if not points:
        return ""
    line = charts.Line("", [Point(a, b, b, b, 1) for a, b in points], band=False)
    return charts.line_chart([line], x_name=x, y_name=y, title=f"{y} over {x}", marks=marks)


def weights_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Adapters on a map of principal components, the neighbours of one, and edits."""
    runs = [run for run in app.results.runs() if run.kind == "recipe" and app.adapters.folder(run.id) is not None]
    if not runs and not query.text("run"):
        return {"title": "Weight space", "runs": [], "query": query}
    run = named(runs, query)
    info, found = app.results.run(run), app.adapters.load(run)
    names, labels, places = found["names"], found["labels"], found["places"]
    number = query.whole("adapter", 0, 0, len(names) - 1)
    words = query.text("q").lower()
    lines: dict[str, list[int]] = {}
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        if words in f"{name} {label}".lower():
            lines.setdefault(label, []).append(i)
    indices = {label: {float(places[i, 0]): i for i in rows} for label, rows in lines.items()}

    def address(line: charts.Line, point: Point) -> str:
        from pysteer.app.server import link

        return link("/weights", query.state, run=run, adapter=indices[line.label][point.x])

    drawn = charts.line_chart(
        [charts.Line(label, [Point(float(places[i, 0]), float(places[i, 1]), 0.0, 0.0, 1) for i in rows], band=False,
                     joined=False, labels=[names[i] for i in rows]) for label, rows in lines.items()],
        x_name=f"component 1 ({found['share'][0]:.0%} of the variance)",
        y_name=f"component 2 ({found['share'][1]:.0%})", title="adapters by their first two principal components",
        link=address, here=(float(places[number, 0]), float(places[number, 1])),
    )  # fmt: skip
    order = [int(i) for i in np.argsort(-found["cosines"][number]) if i != number][:12]
    near = [(i, names[i], labels[i], float(found["cosines"][number, i])) for i in order]
    pictures = app.results.pictures(run)
    prefix = "" if run == "." else f"{run}/"
    return {
        "title": "Weight space", "runs": runs, "info": info, "map": drawn, "query": query, "name": names[number],
        "label": labels[number], "near": near, "count": len(names), "shown": sum(map(len, lines.values())),
        "edits": [prefix + name for name in pictures][:40], "figures": [prefix + f for f in app.results.figures(run)],
    }  # fmt: skip
