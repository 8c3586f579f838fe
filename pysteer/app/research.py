"""What the pages on training dynamics and weight space show: channel histories, dead channels, maps of adapters."""

from __future__ import annotations

import csv
import io
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysteer.app.store import NotFound, Results
from pysteer.errors import InputError

_MOST_ROWS = 20_000  # of a CSV file
_MOST_NUMBERS = 400_000_000  # of a collection of adapters that is mapped here


def trainings(results: Results, run: str) -> list[str]:
    """Trainings of a run of vae-dynamics: folders below `runs/`, or "." for a single one, in the run itself."""
    base = results.path(run)
    folder = base / "runs"
    if folder.is_dir():
        return sorted(p.name for p in folder.iterdir() if p.is_dir())
    return ["."] if any((base / mark).exists() for mark in ("training_log.csv", "channel_history")) else []


def training_path(run: str, training: str) -> str:
    """Folder of a training below the results."""
    parts = [part for part in (run, "" if training == "." else f"runs/{training}") if part not in ("", ".")]
    return "/".join(parts) or "."


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, at most `_MOST_ROWS`; [] where there is none.

    Raises:
        InputError: it is not text.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [row for _, row in zip(range(_MOST_ROWS), csv.DictReader(stream), strict=False)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"table {path.name} cannot be read", value=str(error), fix="run it again") from error


def curve(rows: list[dict[str, str]], x: str, y: str) -> list[tuple[float, float]]:
    """Pairs of two columns, rows without them left out."""
    found = []
    for row in rows:
        try:
            pair = (float(row[x]), float(row[y]))
        except (KeyError, TypeError, ValueError):
            continue
        if all(math.isfinite(value) for value in pair):
            found.append(pair)
    return found


class Histories:
    """Channel histories of trainings, the last few kept in memory."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def folder(self, run: str, training: str) -> Path:
        """Folder of the history of a training.

        Raises:
            NotFound: it has none.
        """
        if training not in trainings(self.results, run):
            raise NotFound(f"training of {run}", value=training, allowed=", ".join(trainings(self.results, run)))
        found = self.results.path(training_path(run, training)) / "channel_history"
        if not (found / "capture.json").is_file():
            raise NotFound("channel history of the training", value=training, allowed="one that has written a window")
        return found

    def sites(self, run: str, training: str) -> list[str]:
        """The points that were watched."""
        from pysteer import files

        found = files.read_json(self.folder(run, training) / "capture.json", "channel history")
        points = found.get("points") if isinstance(found, dict) else None
        if not isinstance(points, dict) or not points:
            raise InputError("channel history", value=training, allowed="one with points", fix="train again")
        return list(points)

    def series(self, run: str, training: str, site: str, stat: str) -> tuple[list[int], NDArray[np.float64]]:
        """Steps, and a statistic of every channel `[T, C]` in the windows of training."""
        from pysteer.dynamics.history import History

        folder = self.folder(run, training)
        if site not in self.sites(run, training):
            raise NotFound("site of the history", value=site, allowed=", ".join(self.sites(run, training)[:8]))
        key = (str(folder), site, stat, (folder / "prompts.parquet").stat().st_mtime_ns)
        if key not in self._kept:
            steps, values = History(folder).series(site, stat)
            self._kept[key] = (steps, values.numpy().astype(np.float64))
            while len(self._kept) > 32:
                self._kept.popitem(last=False)
        found: tuple[list[int], NDArray[np.float64]] = self._kept[key]
        return found


def heat_png(values: NDArray[np.float64], scale: int = 1) -> bytes:
    """PNG of a matrix, dark to light; NaN is grey. Every number becomes `scale x scale` pixels."""
    from PIL import Image

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    share = np.nan_to_num((values - low) / max(high - low, 1e-12))[..., None]
    # Three anchors of a map that rises in lightness, so that it reads in greys as well.
    dark, middle, light = np.array([[24, 28, 72]]), np.array([[196, 62, 92]]), np.array([[252, 232, 140]])
    colours = np.where(share < 0.5, dark + (middle - dark) * share * 2, middle + (light - middle) * (share * 2 - 1))
    colours[~np.isfinite(values)] = 128
    image = Image.fromarray(colours.round().astype(np.uint8))
    out = io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(out, "png")
    return out.getvalue()


class Adapters:
    """Collections of adapters: a map by principal components, and the nearest neighbours of each."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._kept: dict[str, Any] = {}

    def folder(self, run: str) -> Path | None:
        """Where the rows of a run are, None where it has none."""
        root = self.results.path(run)
        known = ("rows", "collection/.pysteer-rows", ".pysteer-rows")
        return next((root / name for name in known if (root / name / "index.json").is_file()), None)

    def load(self, run: str) -> dict[str, Any]:
        """`names`, `labels`, `places` `[N, 2]`, `share` of the variance per component, `cosines` `[N, N]`.

        Raises:
            NotFound: the run has no adapters.
            InputError: the rows are damaged, or too many for a page.
        """
        folder = self.folder(run)
        if folder is None:
            raise NotFound("adapters of run", value=run, allowed="a run of weightspace or lora-farm")
        rows = folder / "rows.f32"
        stamp = (rows.stat().st_mtime_ns, rows.stat().st_size) if rows.is_file() else (0, 0)
        kept = self._kept.get(run)
        if kept is None or kept["stamp"] != stamp:
            kept = self._kept[run] = {"stamp": stamp, **_map(folder, stamp[1])}
        found: dict[str, Any] = kept
        return found


def _map(folder: Path, size: int) -> dict[str, Any]:
    from pysteer import files

    index = files.read_json(folder / "index.json", "index of adapters")
    entries = index.get("entries") if isinstance(index, dict) else None
    if not isinstance(entries, list) or not entries or size % (4 * len(entries)) or not size:
        raise InputError("rows of adapters", value=folder.name, allowed="as many as the index says", fix="run it again")
    if size // 4 > _MOST_NUMBERS:
        raise InputError("adapters on a page", value=f"{size >> 20} MiB", allowed=f"{_MOST_NUMBERS * 4 >> 20} MiB")
    rows = np.memmap(folder / "rows.f32", np.float32, "r").reshape(len(entries), -1)
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    gram = np.zeros((len(entries), len(entries)))
    for start in range(0, rows.shape[1], 65536):
        block = rows[:, start : start + 65536] - mean[start : start + 65536]
        gram += block @ block.T
    values, vectors = np.linalg.eigh(gram)
    values = values.clip(0)[::-1]
    places = vectors[:, ::-1][:, :2] * np.sqrt(values[:2])
    lengths = np.sqrt(np.diag(gram).clip(1e-24))
    return {
        "names": [Path(str(entry.get("path", i))).stem for i, entry in enumerate(entries)],
        "labels": [str(entry.get("label") or "") for entry in entries],
        "places": places,
        "share": values[:2] / max(float(values.sum()), 1e-24),
        "cosines": gram / np.outer(lengths, lengths),
    }
