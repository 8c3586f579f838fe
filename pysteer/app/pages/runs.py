"""The list of runs, runs side by side, and one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pysteer.app.pages.features import representations
from pysteer.app.pages.query import Query, flat_config
from pysteer.app.tables import text_of
from pysteer.errors import InputError

if TYPE_CHECKING:
    from pysteer.app.server import Inspector

RUNS_PER_PAGE = 100


def runs_page(app: Inspector, query: Query) -> dict[str, Any]:
    """List of runs: searched, filtered by recipe and state, in pages."""
    every = app.results.runs()
    words = query.text("q").lower()
    recipe, state = query.text("recipe"), query.text("state")
    found = [
        run for run in every
        if words in run.words and recipe in ("", run.recipe) and state in ("", run.state)
    ]  # fmt: skip
    sort = query.choice("sort", ["changed", "name", "seconds", "recipe"], "changed")
    keys: dict[str, Any] = {
        "name": lambda r: r.id,
        "seconds": lambda r: -(r.seconds or 0),
        "recipe": lambda r: r.recipe,
    }
    found = sorted(found, key=keys[sort]) if sort in keys else found
    last = max(1, math.ceil(len(found) / RUNS_PER_PAGE))
    number = query.whole("page", 1, 1, last)
    return {
        "title": "Runs", "found": found[(number - 1) * RUNS_PER_PAGE : number * RUNS_PER_PAGE], "count": len(found),
        "total": len(every), "recipes": sorted({run.recipe for run in every if run.recipe}), "query": query,
        "number": number, "last": last, "best": {run.id: brief(run.best) for run in found},
    }  # fmt: skip


def brief(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {text_of(v)}" for k, v in values.items() if not isinstance(v, (dict, list)))[:160]


def compare_page(app: Inspector, query: Query) -> dict[str, Any]:
    """Configurations side by side, those keys that differ first, and the best figures of each."""
    names = [name for name in (query.text("runs") or query.text("run")).split(",") if name][:8]
    chosen = [app.results.run(name) for name in names]
    if len(chosen) < 2:
        raise InputError("runs to compare", value=len(chosen), allowed="2 to 8", fix="tick them in the list of runs")
    configs = [flat_config(run.config) for run in chosen]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    values = {key: [config.get(key, "") for config in configs] for key in keys}
    rows = [(key, of_each, len(set(of_each)) > 1) for key, of_each in values.items()]
    figures = [flat_config(run.best) for run in chosen]
    names = list(dict.fromkeys(key for best in figures for key in best))
    bests = [(key, [best.get(key, "") for best in figures]) for key in names]
    rows.sort(key=lambda row: not row[2])
    return {"title": "Compare", "chosen": chosen, "rows": rows, "bests": bests, "query": query}


def run_page(app: Inspector, query: Query) -> dict[str, Any]:
    """One run: its figures, tables, pictures, report and configuration."""
    info = app.results.run(query.text("run"))
    from pysteer.app.research import trainings

    folder = app.results.path(info.id)
    files = [n for n in ("report.html", "summary.json", "config.yaml", "log.txt") if (folder / n).is_file()]
    problems = [] if not info.problem else [info.problem]
    facts: dict[str, Any] = {
        "title": info.id if info.id != "." else app.results.folder.name, "info": info, "files": files,
        "config": flat_config(info.config), "best": flat_config(_rounded(info.best)),
        "figures": app.results.figures(info.id),
        "forms": {n: [form for form in ("svg", "csv") if (folder / n).with_suffix(f".{form}").is_file()]
                  for n in app.results.figures(info.id)},
        "csv": sorted(path.name for path in (folder / "tables").glob("*.csv")),
        "tables": app.results.tables(info.id), "query": query, "problems": problems,
        "has_features": bool(representations(app, info)), "has_dynamics": bool(trainings(app.results, info.id)),
        "has_adapters": app.adapters.folder(info.id) is not None,
    }  # fmt: skip
    return facts


def _rounded(values: Any) -> Any:
    """The same with numbers to four digits; everything else as it is."""
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.4g}") if isinstance(values, float) and math.isfinite(values) else values
