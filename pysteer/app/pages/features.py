"""Features of a model: the list, and everything that is known of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pysteer.app import charts
from pysteer.app.pages.query import ROWS_PER_PAGE, Query, flat_config
from pysteer.app.store import NotFound, RunInfo
from pysteer.app.tables import Point, text_of

if TYPE_CHECKING:
    from pysteer.app.server import Inspector


def representations(app: Inspector, info: RunInfo) -> list[str]:
    """Ids of representations of features in a run."""
    if info.kind == "features":
        return [info.id]
    inside = "representation" if info.id == "." else f"{info.id}/representation"
    folder = app.results.folder / inside
    return [inside] if (folder / "index.json").is_file() else []


def features_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Features of a model: the list, or one with its profile, dreams, priors and examples."""
    from pysteer.dream.representation import Representation

    known = list(dict.fromkeys(one for run in app.results.runs() for one in representations(app, run)))
    if not known and not query.text("run"):
        return {"title": "Features", "known": [], "query": query, "one": None}
    run = query.choice("run", known, known[0] if known else "")
    shown = Representation.open(app.results.path(run))
    kind = query.choice("kind", [str(kind) for kind in shown.about["kinds"]])
    rows = shown.features(kind, live=query.text("dead") == "")
    words = query.text("q").lower()
    rows = [row for row in rows if words in f"{row['feature']} {row['label']}".lower()]
    sort = query.choice("sort", ["activity", "selectivity", "largest", "feature"], "activity")
    column = {"selectivity": "area"}.get(sort, sort)
    rows.sort(key=lambda row: row["feature"] if column == "feature" else -_number(row[column]))
    rows = (
        [row for row in rows if row["cover"]] + [row for row in rows if not row["cover"]]
        if sort == "activity"
        else rows
    )
    facts: dict[str, Any] = {
        "title": "Features", "known": known, "run": run, "kind": kind, "kinds": shown.about["kinds"], "query": query,
        "about": flat_config({k: v for k, v in shown.about.items() if k != "format"}), "count": len(rows), "sort": sort,
        "text": text_of, "one": None,
    }  # fmt: skip
    chosen = query.text("feature")
    if chosen:
        numbers = [int(row["feature"]) for row in rows]
        number = query.whole("feature", 0, 0, 10**9)
        row = next((row for row in shown.features(kind, live=False) if row["feature"] == number), None)
        if row is None:
            raise NotFound("feature", value=number, allowed=f"one of {kind}")
        place = numbers.index(number) if number in numbers else -1
        facts["before"] = numbers[place - 1] if place > 0 else None
        facts["after"] = numbers[place + 1] if 0 <= place < len(numbers) - 1 else None
        return {**facts, "one": _feature(shown, kind, row, query)}
    last = max(1, math.ceil(len(rows) / ROWS_PER_PAGE))
    number = query.whole("page", 1, 1, last)
    return {
        **facts,
        "rows": rows[(number - 1) * ROWS_PER_PAGE : number * ROWS_PER_PAGE],
        "number": number,
        "last": last,
    }


def _number(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(float(value)) else -math.inf


def _feature(shown: Any, kind: str, row: Mapping[str, Any], query: Query) -> dict[str, Any]:
    """One feature: curves over the timesteps with peaks, and its images near the chosen timestep."""
    number = int(row["feature"])
    profile = shown.profile(kind, number) if row["live"] else None
    images = shown.images(kind, number)
    times = sorted({i["timestep"] for i in images if i["timestep"] is not None and i["timestep"] >= 0})
    times = sorted({*times, *((profile or {}).get("timesteps") or [])})
    wanted = query.whole("t", int(row["peaks"][0]) if row["peaks"] else int(times[0]) if times else 0, 0, 10**6)
    chart = most = ""
    if profile:
        marks = {float(peak): "peak" for peak in row["peaks"]}
        for name, title in (("frequency", "share of images with it among the top"), ("most", "largest activation")):
            points = [Point(t, v, v, v, 1) for t, v in zip(profile["timesteps"], profile[name], strict=True)]
            line, words = charts.Line("", points, band=False), f"{title}, over the timesteps"
            drawn = charts.line_chart(
                [line], x_name="timestep", y_name=title, title=words, marks=marks, here=float(wanted)
            )
            chart, most = (drawn, most) if name == "frequency" else (chart, drawn)
    by_role = {role: [i for i in images if i["role"] == role] for role in ("dream", "snapshot", "prior", "example")}
    near = {role: _near(found, wanted) for role, found in by_role.items() if role != "prior"}
    variants = sorted({i["variant"] for i in by_role["dream"] if i["variant"]})
    variant = query.choice("variant", variants, "") if variants else ""
    return {
        "row": row, "chart": chart, "most": most, "times": times, "wanted": wanted, "variants": variants,
        "variant": variant, "peaks": row["peaks"], "priors": by_role["prior"],
        "examples": sorted(near["example"], key=lambda i: i["rank"] or 0)[:40],
        "dreams": _progress(near["dream"], near["snapshot"], variant), "heat": heat_cells,
    }  # fmt: skip


def _near(images: list[dict[str, Any]], wanted: float) -> list[dict[str, Any]]:
    """Those of the timestep that is nearest to the wanted one."""
    known = [i["timestep"] for i in images if i["timestep"] is not None]
    if not known:
        return images
    best = min(known, key=lambda t: abs(t - wanted))
    return [i for i in images if i["timestep"] == best]


def _progress(dreams: list[dict[str, Any]], snapshots: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """A dream per seed with its way there, by step."""
    found = []
    for dream in (d for d in dreams if d["variant"] in (variant, None) or not variant):
        way = [s for s in snapshots if s["seed"] == dream["seed"] and s["variant"] == dream["variant"]]
        frames = sorted([*way, dream], key=lambda frame: frame["step"] if frame["step"] is not None else 10**9)
        found.append({"seed": dream["seed"], "timestep": dream["timestep"], "frames": frames})
    return found


def heat_cells(values: list[float] | None) -> list[tuple[float, float, float, float]]:
    """(x, y, side, opacity) of the cells of a map in units of the picture, the largest at 0.75."""
    if not values:
        return []
    side = math.isqrt(len(values))
    most = max((v for v in values if math.isfinite(v)), default=0.0)
    if side * side != len(values) or most <= 0:
        return []
    return [
        (i % side / side, i // side / side, 1 / side, round(0.75 * v / most, 3))
        for i, v in enumerate(values) if v > 0.02 * most
    ]  # fmt: skip
