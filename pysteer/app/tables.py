"""A table of results: columns by kind, filters, sorting, pages, and the measures drawn from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysteer.errors import InputError, did_you_mean

_HIDDEN = frozenset(
    ("key", "error", "image", "worker", "batch", "batch_rows", "time", "pysteer", "torch", "device", "weights",
     "prompt_hash", "parameters", "schema", "noise", "seconds", "text")
)  # fmt: skip
_MOST_VALUES = 2000  # different values of a column that can be an axis


@dataclass(frozen=True)
class Point:
    """A measure at one place of a curve, with an interval and how many rows it stands for."""

    x: float
    value: float
    low: float
    high: float
    count: int


class Table:
    """Rows in memory, as Arrow columns.

    Args:
        data: a `pyarrow.Table`.
        problems: what could not be read.
        folder: folder of images, inside the run, where the column `image` holds the hash of one; "" where it holds a
            path inside the run.
    """

    def __init__(self, data: Any, problems: Sequence[str] = (), folder: str = "") -> None:
        self.data, self.problems, self.folder = data, list(problems), folder

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], folder: str = "") -> Table:
        """A table of plain rows; columns of mixed types become text."""
        import pyarrow as pa

        columns = {}
        for name in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(name) for row in rows]
            try:
                columns[name] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                columns[name] = pa.array([None if v is None else str(v) for v in values])
        return cls(pa.table(columns) if columns else pa.table({"empty": pa.array([], pa.string())}), folder=folder)

    def __len__(self) -> int:
        return int(self.data.num_rows)

    @property
    def names(self) -> list[str]:
        """All columns."""
        return list(self.data.column_names)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Column -> number, flag, text or other."""
        import pyarrow.types as types

        found = {}
        for name, kind in zip(self.names, self.data.schema.types, strict=True):
            number = types.is_integer(kind) or types.is_floating(kind)
            text = types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)
            found[name] = "number" if number else "flag" if types.is_boolean(kind) else "text" if text else "other"
        return found

    @cached_property
    def codes(self) -> dict[str, tuple[NDArray[np.int64], list[Any]]]:
        """Column -> which value each row has, and the different values in order; filled as columns are asked for."""
        return {}

    def column(self, name: str) -> None:
        """Raise an InputError where there is no such column."""
        if name not in self.names:
            raise InputError(
                "column", value=name, allowed=", ".join(self.names[:40]), fix=did_you_mean(name, self.names)
            )

    def coded(self, name: str) -> tuple[NDArray[np.int64], list[Any]]:
        """Which value each row has (-1 for none), and the different values, sorted."""
        self.column(name)
        if name not in self.codes:
            column = self.data[name].combine_chunks()
            encoded = column if hasattr(column, "dictionary") else column.dictionary_encode()
            values = encoded.dictionary.to_pylist()
            order = sorted(range(len(values)), key=lambda i: _order(values[i]))
            rank = np.empty(len(values) + 1, np.int64)
            rank[order] = np.arange(len(values))
            rank[-1] = -1
            codes = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
            self.codes[name] = (rank[codes], [values[i] for i in order])
        return self.codes[name]

    def axes(self) -> list[str]:
        """Columns that can be an axis: text, flags and numbers with 2 to `_MOST_VALUES` different values."""
        usable = [n for n, k in self.kinds.items() if k != "other" and n not in _HIDDEN]
        if len(self) > 20_000:
            usable = [n for n in usable if self.kinds[n] != "number" or self._few(n)]
        return [name for name in usable if 2 <= len(self.coded(name)[1]) <= _MOST_VALUES]

    def filters(self, without: Sequence[str], most: int = 12) -> list[tuple[str, list[str]]]:
        """Columns to choose a value of, with their values: axes but for these, and for numbers that hardly repeat."""
        found = []
        for name in self.axes():
            values = self.coded(name)[1]
            measured = self.kinds[name] == "number" and len(values) > 12 and any(v != round(v) for v in values if v)
            if name not in without and len(values) <= 200 and not measured:
                found.append((name, [text_of(value) for value in values]))
        return found[:most]

    def _few(self, name: str) -> bool:
        """Whether a column of numbers has few different values, judged by its first rows."""
        head = self.data[name].slice(0, 20_000)
        return len(head.unique()) <= _MOST_VALUES

    def measures(self) -> list[str]:
        """Columns to draw: numbers and flags that are not ends of intervals."""
        ends = {end for name in self.names for end in self.interval(name) if end}
        usable = [n for n, k in self.kinds.items() if k in ("number", "flag") and n not in _HIDDEN | ends]
        return usable

    def interval(self, name: str) -> tuple[str, str]:
        """The columns of the ends of the interval of a measure, ("", "") where there are none."""
        stem, last = name.rpartition("_")[0], name.rpartition("_")[2]
        for one in (name, stem, last):
            if one and f"{one}_low" in self.names and f"{one}_high" in self.names:
                return f"{one}_low", f"{one}_high"
        return "", ""

    # -- rows

    def chosen(self, filters: Mapping[str, str], words: str = "") -> NDArray[np.int64]:
        """Rows that pass: `column -> value`, or `low..high` for numbers; `words` is looked for in all texts.

        Raises:
            InputError: an unknown column or a range that is none.
        """
        keep = np.ones(len(self), bool)
        for name, wanted in filters.items():
            self.column(name)
            if self.kinds[name] == "number" and ".." in wanted:
                low, high = _range(name, wanted)
                values = self.numbers(name)
                keep &= (values >= low) & (values <= high)
            else:
                codes, values_ = self.coded(name)
                hit = [i for i, value in enumerate(values_) if text_of(value) == wanted]
                keep &= np.isin(codes, hit)
        if words:
            found = np.zeros(len(self), bool)
            for name in (n for n, k in self.kinds.items() if k == "text"):
                codes, values_ = self.coded(name)
                hit = [i for i, value in enumerate(values_) if words.lower() in str(value).lower()]
                found |= np.isin(codes, hit)
            keep &= found
        return np.flatnonzero(keep)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as float64, NaN where it has no value."""
        self.column(name)
        import pyarrow as pa

        if self.kinds[name] not in ("number", "flag"):
            raise InputError("column of numbers", value=name, allowed=", ".join(self.measures()[:20]))
        column = self.data[name].cast(pa.int8()) if self.kinds[name] == "flag" else self.data[name]
        return np.asarray(column.cast(pa.float64()).fill_null(math.nan).to_numpy())

    def sort(self, rows: NDArray[np.int64], name: str, falling: bool) -> NDArray[np.int64]:
        """The rows by a column; without a value last."""
        codes = self.coded(name)[0][rows]
        key = np.where(codes < 0, np.iinfo(np.int64).max, -codes if falling else codes)
        return rows[np.argsort(key, kind="stable")]

    def take(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Rows as plain values, with `picture`: the path of their image inside the run, or ""."""
        found: list[dict[str, Any]] = self.data.take(rows).to_pylist()
        for row in found:
            row["picture"] = self.picture(row.get("image"))
        return found

    def picture(self, image: Any) -> str:
        """Path of an image inside the run, from what the column `image` holds."""
        if not isinstance(image, str) or not image:
            return ""
        return f"{self.folder}/{image[:2]}/{image}.png" if self.folder else image

    # -- measures

    def cells(self, x: str, y: str, rows: NDArray[np.int64]) -> dict[tuple[int, int], tuple[int, int]]:
        """(code of y, code of x) -> (the first row there, number of rows)."""
        across, down = self.coded(x)[0][rows], self.coded(y)[0][rows]
        width = len(self.coded(x)[1]) + 1
        both, first, counts = np.unique((down + 1) * width + across + 1, return_index=True, return_counts=True)
        return {
            (int(code) // width - 1, int(code) % width - 1): (int(rows[one]), int(count))
            for code, one, count in zip(both, first, counts, strict=True)
        }

    def curves(self, x: str, measure: str, by: str, rows: NDArray[np.int64]) -> dict[str, list[Point]]:
        """Curve by value of `by` ("" for one curve): the mean of the measure at every value of `x`.

        Intervals are those of the table where it has them and a place holds one row; of flags Wilson's (95 %), else
        1.96 standard errors of the mean.
        """
        xs, values = self.numbers(x)[rows], self.numbers(measure)[rows]
        low, high = self.interval(measure)
        ends = (self.numbers(low)[rows], self.numbers(high)[rows]) if low else None
        groups, labels = self.coded(by) if by else (np.zeros(len(self), np.int64), [""])
        groups = groups[rows]
        good = np.isfinite(xs) & np.isfinite(values) & (groups >= 0)
        flags = self.kinds[measure] == "flag"
        found: dict[str, list[Point]] = {}
        for group in np.unique(groups[good])[:24]:
            inside = good & (groups == group)
            points = []
            for place in np.unique(xs[inside])[:500]:
                here = np.flatnonzero(inside & (xs == place))
                given = (float(ends[0][here[0]]), float(ends[1][here[0]])) if ends and len(here) == 1 else None
                points.append(_point(float(place), values[here], flags, given))
            found[text_of(labels[group])] = points
        return found


def _point(x: float, values: NDArray[np.float64], flags: bool, given: tuple[float, float] | None) -> Point:
    mean, count = float(values.mean()), len(values)
    if given is not None and all(math.isfinite(end) for end in given):
        return Point(x, mean, *given, count)
    if flags:
        from pysteer.metrics.rates import rate  # brings torch, which takes a while

        share = rate([bool(value) for value in values])
        return Point(x, share.value, share.low, share.high, count)
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Point(x, mean, mean - half, mean + half, count)


def _order(value: Any) -> tuple[int, Any]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return (2, "")
    return (0, value) if isinstance(value, (int, float)) else (1, str(value))


def _range(name: str, text: str) -> tuple[float, float]:
    first, _, last = text.partition("..")
    try:
        return float(first or "-inf"), float(last or "inf")
    except ValueError:
        raise InputError(f"range of {name}", value=text, allowed="LOW..HIGH, one end may be left out") from None


def text_of(value: Any) -> str:
    """A value as it stands on pages and in addresses."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
