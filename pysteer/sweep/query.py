"""Questions about results: views of DuckDB over the shards, the table of settings, and its Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer.errors import InputError
from pysteer.sweep.rows import COMMON, column_of
from pysteer.sweep.store import MARK, Damaged, Store

_NUMBERS = ("BOOLEAN", "DOUBLE", "BIGINT", "INTEGER", "FLOAT")


def sweeps_in(out: Path) -> list[Path]:
    """Folders of sweeps in `out`, the one that changed last first."""
    found = [path.parent for path in out.glob(f"*/{MARK}")] if out.is_dir() else []
    return sorted(found, key=lambda folder: -(folder / MARK).stat().st_mtime)


def open_database(folders: Sequence[Path]) -> tuple[Any, list[Damaged]]:
    """A DuckDB connection with a view per sweep, by the name of its folder, and `cells` for the first one.

    Returns:
        The connection, and the damaged files that were set aside.

    Raises:
        InputError: no sweep, or one without results.
    """
    import duckdb

    connection, damaged = duckdb.connect(), []
    for number, folder in enumerate(folders):
        store = Store(folder)
        store.mark()
        damaged += store.check()
        shards = [str(path) for path in store.shards()]
        if not shards:
            if number == 0:
                raise InputError("results of the sweep", value=str(folder), allowed="at least one finished batch")
            continue
        listed = ", ".join(f"'{_quoted(path)}'" for path in shards)
        source = f"SELECT * FROM read_parquet([{listed}], union_by_name = true)"
        for name in (folder.name, *(("cells",) if number == 0 else ())):
            connection.execute(f'CREATE VIEW "{name}" AS {source}')
    return connection, damaged


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def query(sql: str, folders: Sequence[Path]) -> tuple[list[str], list[tuple[Any, ...]], list[Damaged]]:
    """Column names and rows of a question.

    Raises:
        InputError: no sweep, or SQL that cannot be run.
    """
    import duckdb

    connection, damaged = open_database(folders)
    try:
        found = connection.execute(sql)
    except duckdb.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"question ({reason})", value=sql, allowed="SQL over the view cells") from error
    return [column[0] for column in found.description or ()], found.fetchall(), damaged


@dataclass
class SettingRow:
    """One setting, over its prompts and seeds.

    Attributes:
        setting: the fields in which settings of the sweep differ.
        count: cells that went well.
        failed: cells that did not.
        measures: means of every measure that is a number or yes/no.
        target: rate (or mean) of what is to be high, with its Wilson interval where it is a rate.
        damage: mean of what is to be low.
        best: whether no other setting has a higher target and less damage.
    """

    setting: dict[str, Any]
    count: int
    failed: int
    measures: dict[str, float]
    target: float | None = None
    interval: tuple[float, float] | None = None
    damage: float | None = None
    best: bool = False


@dataclass
class Results:
    """The table of a sweep: settings, best first."""

    name: str
    rows: list[SettingRow]
    roles: Mapping[str, str]
    damaged: list[Damaged]

    @property
    def front(self) -> list[SettingRow]:
        """The Pareto front, by rising damage."""
        return sorted((row for row in self.rows if row.best), key=lambda row: row.damage or 0.0)


def results(folder: str | Path) -> Results:
    """The settings of a sweep with their measures.

    Raises:
        InputError: no sweep here, or no results yet.
    """
    folder = Path(folder)
    mark = Store(folder).mark()
    connection, damaged = open_database([folder])
    kinds = dict(connection.execute("SELECT column_name, column_type FROM (DESCRIBE cells)").fetchall())
    repeats, roles = set(mark.get("repeats", ())), dict(mark.get("score", {}))
    fields = [column_of(name) for name in mark["base"] if column_of(name) in kinds and name not in repeats]
    varying = [name for name in fields if _differs(connection, name)]
    known = {*map(column_of, mark["base"]), *COMMON}
    measured = [name for name, kind in kinds.items() if name not in known and kind in _NUMBERS]
    means = "".join(f', avg("{name}"::DOUBLE)' for name in measured)
    keys = ", ".join(f'"{name}"' for name in varying)
    sql = (
        f"SELECT {keys + ', ' if keys else ''}count(*) FILTER (status = 'ok'), count(*) FILTER (status <> 'ok'){means}"
    )
    found = connection.execute(f"{sql} FROM cells {'GROUP BY ' + keys if keys else ''}").fetchall()
    rows = []
    for values in found:
        own, rest = dict(zip(varying, values, strict=False)), values[len(varying) :]
        numbers = {n: float(v) for n, v in zip(measured, rest[2:], strict=True) if v is not None}
        rows.append(SettingRow(own, int(rest[0]), int(rest[1]), numbers))
    _score(rows, roles, kinds)
    rows.sort(key=lambda r: (-(r.target if r.target is not None else -1.0), r.damage or 0.0, str(r.setting)))
    return Results(folder.name, rows, roles, damaged)


def _differs(connection: Any, name: str) -> bool:
    return bool(
        connection.execute(f"SELECT count(DISTINCT coalesce(\"{name}\"::VARCHAR, '')) > 1 FROM cells").fetchone()[0]
    )


def _score(rows: Sequence[SettingRow], roles: Mapping[str, str], kinds: Mapping[str, str]) -> None:
    from pysteer.metrics.rates import wilson

    target, damage = roles.get("target", ""), roles.get("damage", "")
    for row in rows:
        row.target, row.damage = row.measures.get(target), row.measures.get(damage)
        if row.target is not None and row.count and kinds.get(target) == "BOOLEAN":
            row.interval = wilson(round(row.target * row.count), row.count)
    scored = [row for row in rows if row.target is not None and row.damage is not None]
    least = float("inf")
    for row in sorted(scored, key=lambda r: (-(r.target or 0.0), r.damage or 0.0)):
        row.best = row.damage is not None and row.damage < least
        least = min(least, row.damage if row.damage is not None else least)
