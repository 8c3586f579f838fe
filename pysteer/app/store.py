"""What lies in a folder of results: runs, tables and images, read only, with what is wrong said in words.

A run is a folder with `run.json` (a recipe), `sweep.json` (a sweep) or the index of a representation of features. Its
id is its path inside the results folder, with `/`; "." is the results folder itself.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.app.tables import Table
from pysteer.errors import InputError
from pysteer.recipes.flat import flat_rows

SERVED = frozenset((".png", ".jpg", ".jpeg", ".webp", ".svg", ".csv", ".json", ".txt", ".yaml", ".html"))
PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp"))
_MARKS = {"run.json": "recipe", "sweep.json": "sweep"}
_FEATURES = "pysteer-features-1"
_DEEP = 3  # folders between the results folder and a run
_MOST_FOLDERS = 20_000
_MOST_IMAGES = 200_000
_LARGEST = 64 << 20  # bytes of a JSON file that is read whole


class NotFound(InputError):
    """There is no such run, table or file here."""


@dataclass(frozen=True)
class RunInfo:
    """One line of the list of runs.

    Attributes:
        id: path inside the results folder.
        kind: recipe, sweep or features.
        recipe: name of the recipe, or of the task of a sweep.
        state: finished, unfinished or broken.
        problem: what is wrong, "" if nothing.
        best: the best setting and its figures.
        config: the configuration, plain values.
        seconds: how long it took.
        changed: time of the last change, seconds since 1970.
        hash: of the configuration.
        version: of pysteer.
    """

    id: str
    kind: str
    recipe: str = ""
    state: str = "unfinished"
    problem: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    changed: float = 0.0
    hash: str = ""
    version: str = ""

    @property
    def words(self) -> str:
        """Everything a search looks at, in lower case."""
        return f"{self.id} {self.recipe} {self.state} {json.dumps(self.config, ensure_ascii=False)}".lower()


class Results:
    """A folder of results.

    Args:
        folder: holds runs, or is one.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise InputError(
                "folder of results", value=str(folder), allowed="a folder", fix="run a recipe or a sweep first, for "
                "example: pysteer run infinity-prototype",
            )  # fmt: skip
        self._infos: dict[str, tuple[Any, RunInfo]] = {}
        self._tables: dict[tuple[str, str], tuple[Any, Table]] = {}
        self._pictures: dict[str, tuple[Any, list[str]]] = {}
        self._lock = threading.RLock()

    # -- paths

    def path(self, name: str) -> Path:
        """A file or folder inside the results folder; links that lead out of it are refused as well.

        Raises:
            NotFound: it leads out of the folder, or is not there.
        """
        if "\0" in name or len(name) > 4096:
            raise NotFound("path of the results", value=name, allowed="a path inside the results folder")
        try:
            found = (self.folder / name).resolve()
            inside = found.is_relative_to(self.folder) and found.exists()
        except (OSError, RuntimeError) as error:
            raise NotFound("path of the results", value=name, allowed="a path inside the results folder") from error
        if not inside or any(part.startswith(".") for part in found.relative_to(self.folder).parts):
            raise NotFound("path of the results", value=name, allowed="a path inside the results folder")
        return found

    def served(self, name: str) -> Path:
        """A file that may be shown: a picture, a report, a table or plain text of a run.

        Raises:
            NotFound: another kind of file, or none.
        """
        found = self.path(name)
        if not found.is_file() or found.suffix.lower() not in SERVED:
            raise NotFound("file of the results", value=name, allowed=", ".join(sorted(SERVED)))
        return found

    # -- runs

    def runs(self) -> list[RunInfo]:
        """All runs, the latest first."""
        found = [self._info(folder, kind) for folder, kind in self._find()]
        return sorted(found, key=lambda run: (-run.changed, run.id))

    def run(self, name: str) -> RunInfo:
        """One run.

        Raises:
            NotFound: no run has that id.
        """
        folder = self.path(name or ".")
        kind = _kind(folder) if folder.is_dir() else ""
        if not kind:
            raise NotFound("run", value=name, allowed="one of the list of runs")
        return self._info(folder, kind)

    def _find(self) -> Iterator[tuple[Path, str]]:
        waiting = [(self.folder, 0)]
        seen = 0
        while waiting:
            folder, depth = waiting.pop()
            seen += 1
            kind = _kind(folder)
            if kind:
                yield folder, kind
            if (kind and folder != self.folder) or depth >= _DEEP or seen > _MOST_FOLDERS:
                continue
            waiting += [(entry, depth + 1) for entry in _folders(folder)]

    def _info(self, folder: Path, kind: str) -> RunInfo:
        name = folder.relative_to(self.folder).as_posix()
        stamp = (kind, *(_stamp(folder / file) for file in ("run.json", "summary.json", "sweep.json", "index.json")))
        if kind == "sweep":
            stamp += (_stamp(folder / "shards"), _stamp(folder / "quarantine"))
        with self._lock:
            kept = self._infos.get(name)
            if kept is None or kept[0] != stamp:
                kept = self._infos[name] = (stamp, _describe(folder, name, kind))
            return kept[1]

    # -- tables

    def tables(self, run: str) -> list[str]:
        """Names of the tables of a run: `rows` of a sweep, Parquet files, and those of its summary."""
        folder = self.path(run)
        names = ["rows"] if (folder / "shards").is_dir() else []
        names += sorted(p.name for p in folder.glob("*.parquet") if not p.name.startswith("."))
        names += [f"summary:{name}" for name, rows in self._summary(folder).get("tables", {}).items() if rows]
        return [*names, "pictures"] if self.pictures(run) else names

    def table(self, run: str, name: str = "") -> Table:
        """A table of a run, the first one without a name.

        Raises:
            NotFound: there is none of that name.
            InputError: it is damaged; a damaged shard of a sweep only counts as a problem of the table.
        """
        folder, known = self.path(run), self.tables(run)
        name = name or (known[0] if known else "")
        if name not in known:
            raise NotFound(f"table of run {run}", value=name, allowed=", ".join(known) or "none, it has no tables")
        stamp = self._table_stamp(folder, name)
        with self._lock:
            kept = self._tables.get((run, name))
            if kept is None or kept[0] != stamp:
                kept = (stamp, self._read(folder, run, name))
                self._tables[run, name] = kept
                while len(self._tables) > 16:
                    self._tables.pop(next(iter(self._tables)))
            return kept[1]

    def _table_stamp(self, folder: Path, name: str) -> Any:
        if name == "rows":
            return [(entry.name, entry.stat().st_size) for entry in sorted((folder / "shards").glob("*.parquet"))]
        if name.startswith("summary:"):
            return _stamp(folder / "summary.json")
        return _stamp(folder / ("images" if name == "pictures" else name))

    def _read(self, folder: Path, run: str, name: str) -> Table:
        if name == "rows":
            return _sweep_table(folder)
        if name == "pictures":
            return Table.of(picture_rows(self.pictures(run)), folder="")
        if name.startswith("summary:"):
            return Table.of(flat_rows(self._summary(folder)["tables"][name.partition(":")[2]]))
        return Table(_parquet(folder / name))

    def _summary(self, folder: Path) -> dict[str, Any]:
        """`summary.json`, empty where it is missing or damaged: the list of runs says so."""
        try:
            found = _json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
        except InputError:
            return {}
        tables = found.get("tables") if isinstance(found, dict) else None
        return {**found, "tables": tables if isinstance(tables, dict) else {}} if isinstance(found, dict) else {}

    def summary(self, run: str) -> dict[str, Any]:
        """The summary of a run, {} where there is none that can be read."""
        return self._summary(self.path(run))

    # -- pictures

    def pictures(self, run: str) -> list[str]:
        """Pictures below `images/` of a run that has no table of them, as paths inside the run."""
        folder = self.path(run)
        root = folder / "images"
        if not root.is_dir() or (folder / "shards").is_dir() or _kind(folder) == "features":
            return []
        stamp = _stamp(root)
        with self._lock:
            kept = self._pictures.get(run)
            if kept is None or kept[0] != stamp:
                kept = self._pictures[run] = (stamp, list(_pictures(root)))
            return kept[1]

    def figures(self, run: str) -> list[str]:
        """Figures of a run, as paths of PNG files inside the run."""
        folder = self.path(run)
        return [f"figures/{p.name}" for p in sorted((folder / "figures").glob("*.png"))]

    def fits(self) -> list[Path]:
        """Folders with fitted parameters of all runs."""
        found: list[Path] = []
        for info in self.runs():
            base = self.path(info.id)
            found += [p.parent for place in ("fits/*", "fitted/*/*") for p in sorted(base.glob(f"{place}/config.json"))]
        return found


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(e.path) for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_mtime_ns, found.st_size


def _kind(folder: Path) -> str:
    for mark, kind in _MARKS.items():
        if (folder / mark).is_file():
            return kind
    if (folder / "features.parquet").is_file() and (folder / "index.json").is_file():
        return "features"
    return ""


def _json(path: Path) -> Any:
    if _stamp(path)[1] > _LARGEST:
        raise InputError("JSON file", value=path.name, allowed=f"up to {_LARGEST >> 20} MiB")
    return files.read_json(path, path.name)


def _describe(folder: Path, name: str, kind: str) -> RunInfo:
    facts: dict[str, Any] = {"changed": max(_stamp(folder / f)[0] for f in ("summary.json", *_MARKS, "log.txt")) / 1e9}
    try:
        if kind == "sweep":
            facts |= _describe_sweep(folder)
        elif kind == "features":
            about = _json(folder / "index.json")
            good = isinstance(about, dict) and about.get("format") == _FEATURES
            if not good:
                raise InputError("index.json of features", value=str(about)[:80], allowed=f"format {_FEATURES}")
            facts |= {"recipe": "features", "state": "finished", "config": about}
        else:
            facts |= _describe_recipe(folder)
    except InputError as error:
        facts |= {"state": "broken", "problem": str(error)}
    return RunInfo(name, kind, **facts)


def _describe_recipe(folder: Path) -> dict[str, Any]:
    mark = _json(folder / "run.json")
    if not isinstance(mark, dict):
        raise InputError("run.json", value=type(mark).__name__, allowed="a JSON object")
    config = mark.get("config")
    facts: dict[str, Any] = {"recipe": str(mark.get("recipe", "")), "version": str(mark.get("pysteer", ""))}
    facts["config"] = config if isinstance(config, dict) else {}
    if not (folder / "summary.json").is_file():
        done = len(list((folder / "stages").glob("*.json"))) if (folder / "stages").is_dir() else 0
        return {**facts, "problem": f"not finished, {done} stages done; the same command continues it"}
    summary = _json(folder / "summary.json")
    if not isinstance(summary, dict):
        return {**facts, "state": "broken", "problem": "summary.json does not hold an object"}
    best, seconds = summary.get("best"), summary.get("seconds")
    return {
        **facts, "state": "finished", "best": best if isinstance(best, dict) else {}, "hash": str(summary.get(
        "config_hash", "")), "seconds": seconds if isinstance(seconds, (int, float)) else None,
    }  # fmt: skip


def _describe_sweep(folder: Path) -> dict[str, Any]:
    mark = _json(folder / "sweep.json")
    if not isinstance(mark, dict):
        raise InputError("sweep.json", value=type(mark).__name__, allowed="a JSON object")
    config = {key: value for key, value in mark.items() if key not in ("schema", "task")}
    shards = len(list((folder / "shards").glob("*.parquet"))) if (folder / "shards").is_dir() else 0
    aside = len(list((folder / "quarantine").glob("*.json"))) if (folder / "quarantine").is_dir() else 0
    words = [] if shards else ["no cell has finished yet"]
    words += [f"{aside} damaged files were set aside (quarantine/)"] if aside else []
    state = "broken" if aside else "finished" if shards else "unfinished"
    return {"recipe": f"sweep {mark.get('task', '')}", "config": config, "state": state, "problem": "; ".join(words)}


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"table {path.name} cannot be read ({reason})", fix="run the command again") from error


def _sweep_table(folder: Path) -> Table:
    """All rows of a sweep; a shard that cannot be read is named in the problems of the table."""
    import pyarrow as pa

    from pysteer.sweep.store import Store

    parts, problems = [], []
    for path in Store(folder).shards():
        try:
            parts.append(_parquet(path))
        except InputError as error:
            problems.append(str(error))
    if not parts:
        return Table(pa.table({"key": pa.array([], pa.string())}), problems, folder="images")
    rows = pa.concat_tables(parts, promote_options="permissive").combine_chunks()
    return Table(rows, problems, folder="images")


def _pictures(root: Path) -> Iterator[str]:
    count = 0
    for folder, inside, names in os.walk(root):
        inside.sort()
        inside[:] = [name for name in inside if not name.startswith(".")]
        for name in sorted(names):
            if Path(name).suffix.lower() in PICTURES and not name.startswith("."):
                count += 1
                if count > _MOST_IMAGES:
                    return
                yield (Path(folder) / name).relative_to(root.parent).as_posix()


def picture_rows(pictures: list[str]) -> list[dict[str, Any]]:
    """A row per picture: the folders of its path as columns `folder_1`, ... and its name, numbers as numbers."""
    rows = []
    for path in pictures:
        *folders, name = path.split("/")[1:]
        row: dict[str, Any] = {f"folder_{i + 1}": word for i, word in enumerate(folders)}
        rows.append({**row, "name": Path(name).stem, "image": path})
    for column in {key for row in rows for key in row} - {"image"}:
        words = [row.get(column) for row in rows]
        if all(_is_number(word) for word in words):
            for row in rows:
                row[column] = float(row[column])
    return rows


def _is_number(word: Any) -> bool:
    try:
        float(word)
    except (TypeError, ValueError):
        return False
    return str(word).replace(".", "").replace("-", "").isdigit()
