"""The report page of a sweep: target against damage, the settings, images of the best ones, where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.report import Facts, Figure, Paragraph, Report, Section, Table, labelled_rows, png, render
from pysteer.report import Row as SheetRow
from pysteer.report.drawn import drawn
from pysteer.report.figures import _THEMES, THEMES, Theme, _new
from pysteer.report.report import Block
from pysteer.sweep.query import Results, SettingRow, query, results
from pysteer.sweep.status import Status, status
from pysteer.sweep.store import Store

_SHOWN = 40  # settings in the table
_ABREAST = 8  # images of a setting


def write_page(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a sweep; returns its path.

    Raises:
        InputError: no sweep here, or no results yet.
    """
    folder = Path(folder)
    found, state = results(folder), status(folder)
    sections = [Section("settings", "Settings", [_table(found.rows[:_SHOWN])])]
    front = found.front
    if front:
        sections.insert(0, Section("front", "Target against damage", _front(folder, found)))
    sheet = _sheet(folder, (front or found.rows)[:4])
    if sheet:
        sections.append(Section("images", "Images", sheet))
    sections.append(Section("run", "Where it comes from", _origin(folder, state)))
    lead = f"{state.done} of {state.cells} cells in {len(found.rows)} settings"
    best = found.rows[0] if found.rows and found.rows[0].target is not None else None
    lead += "." if best is None else f"; the highest target is {best.target:.3f}, with {name_of(best)}."
    page = Report(f"Sweep {state.name}", lead, sections, footer=f"pysteer results {state.name} --report")
    return files.write_text(folder / "report.html", render(page))


def name_of(row: SettingRow) -> str:
    """A setting in words."""
    parts = [f"{k} {_number(v)}" for k, v in row.setting.items() if v not in (None, "")]
    return ", ".join(parts) or "the only setting"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[SettingRow]) -> Table:
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    fields = list(rows[0].setting) if rows else []
    lines = []
    for row in rows:
        interval = "" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        own = [_number(row.setting[name]) for name in fields]
        lines.append(
            [
                name_of(row),
                *own,
                str(row.count),
                str(row.failed),
                interval,
                *(_number(row.measures.get(m)) for m in measures),
            ]
        )
    strong = [i for i, row in enumerate(rows) if row.best]
    columns = ["setting", *fields, "cells", "failed", "target, 95 %", *measures]
    return Table("Best first; stressed ones are on the Pareto front.", columns, lines, strong=strong)


def _front(folder: Path, found: Results) -> list[Block]:
    scored = _points(found.rows)
    light, dark = (draw_front(found, theme) for theme in THEMES)
    files.write_bytes(folder / "figures" / "front.png", light)
    alt = f"Target against damage of {len(scored)} settings; {len(found.front)} of them are on the Pareto front."
    return [Figure(light, alt, dark=dark), Table("The front, by rising damage.", ["setting", "target", "damage"], [
        [name_of(row), _number(row.target), _number(row.damage)] for row in found.front
    ])]  # fmt: skip


def draw_front(found: Results, theme: Theme) -> bytes:
    """PNG of the settings as points, target against damage, with the Pareto front as a line."""
    colours = _THEMES[theme]
    figure, panels = _new(1, 1, (6.8, 4.0), colours)
    axis = panels[0, 0]
    axis.scatter(*zip(*_points(found.rows), strict=True), s=22, color=colours.soft, label="settings")
    front = _points(found.front)
    axis.plot(*zip(*front, strict=True), "o-", color=colours.target, linewidth=1.9, label="Pareto front")
    axis.set_xlabel(found.roles.get("damage", "damage"), fontsize=9, color=colours.soft)
    axis.set_ylabel(found.roles.get("target", "target"), fontsize=9, color=colours.soft)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=colours.ink)
    return drawn(figure, [
        {"setting": name_of(row), "damage": row.damage, "target": row.target, "on_front": row.best}
        for row in found.rows if row.damage is not None and row.target is not None
    ])  # fmt: skip


def _points(rows: Sequence[SettingRow]) -> list[tuple[float, float]]:
    """Damage and target of the settings that have both."""
    return [(row.damage, row.target) for row in rows if row.damage is not None and row.target is not None]


def _sheet(folder: Path, rows: Sequence[SettingRow]) -> list[Block]:
    import numpy as np
    import torch
    from PIL import Image

    lines = []
    for row in rows:
        conditions = [f'"{k}" IS NOT DISTINCT FROM {_literal(v)}' for k, v in row.setting.items()]
        where = " AND ".join(["status = 'ok'", *conditions])
        columns, cells, _ = query(f"SELECT * FROM cells WHERE {where} ORDER BY key", [folder])
        if "image" not in columns:
            return []
        place = columns.index("image")
        # The same prompt and noise stand in the same column.
        order = [columns.index(name) for name in ("prompt", "seed", "noise") if name in columns]
        cells = sorted(cells, key=lambda cell: [str(cell[i]) for i in order])[:_ABREAST]
        paths = [Store(folder).image_path(cell[place]) for cell in cells if cell[place]]
        if paths:
            images = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths])
            lines.append(SheetRow(name_of(row), torch.from_numpy(images)))
    if not lines:
        return []
    alt = "Images of the best settings, a row each: " + "; ".join(line.label for line in lines)
    return [Figure(png(labelled_rows(lines)), alt)]


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, (bool, int, float)):
        return str(value)
    return "'" + str(value).replace("'", "''") + "'"


def _origin(folder: Path, state: Status) -> list[Block]:
    mark = Store(folder).mark()
    facts = [
        ("cells", f"{state.done}/{state.cells}", f"{state.failed} failed"),
        ("task", state.task, f"pysteer {mark['pysteer']}"),
    ]
    blocks: list[Block] = [Facts(facts), Paragraph("pysteer sweep " + " ".join([state.task, *mark["words"]]))]
    blocks += [Paragraph(f"set aside: {name}") for name in state.damaged]
    return blocks
