"""The row file of a collection: every adapter as a row of fp32, memory mapped, beside an index that says what it is.

    rows.f32     [N, d], appended to block by block
    index.json   layout, entries in the order of their rows, files that were left out and why

The index is written after every block, so that an interrupted reading goes on where it stopped, and adapters that are
added to the folder later are read alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pysteer import files
from pysteer.errors import InputError
from pysteer.weightspace.adapter import Adapter, config_alpha, read_adapter
from pysteer.weightspace.layout import Header, Layout, plain_parts, read_header, read_plain, signature

ROWS, INDEX = "rows.f32", "index.json"
ROLES = ("down", "up")
VERSION = 1
_BLOCK = 16  # adapters read before they are written: few enough for the cache of the processor
_SAVE = 256  # adapters between two writings of the index
Show = Callable[[float, float | None], None]


@dataclass(frozen=True)
class Entry:
    """One adapter of a collection.

    Attributes:
        path: of its file, relative to the folder.
        size, changed: bytes and time of change of the file, to notice another one under the same name.
        label: its class, "" where none is known.
        images: ids of the images it was trained on, where known.
        ranks: rank per layer, in the order of the layout; one number where all are equal.
        scales: alpha / r per layer; one number where all are equal.
        format: diffusers, peft or kohya.
        notes: what was left out of it.
    """

    path: str
    size: int
    changed: int
    label: str
    images: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    format: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str
    size: int = 0
    changed: int = 0


class _Shape(NamedTuple):
    """What a file is, for the choice of a layout: sizes of its layers, their order and ranks."""

    kind: frozenset[tuple[str, tuple[int, int]]]
    order: tuple[tuple[str, str], ...]
    ranks: dict[str, int]


def _shape(parts: Any, path: Path) -> _Shape:
    if parts is None:
        adapter = read_adapter(path)
        sizes = signature(adapter)
        ranks = {layer: it.rank for layer, it in adapter.layers.items()}
        return _Shape(frozenset(sizes.items()), tuple((layer, role) for layer in sizes for role in ROLES), ranks)
    shapes = {(layer, role): shape for layer, role, shape in parts}
    sizes = {layer: (shapes[layer, "down"][1], shapes[layer, "up"][0]) for layer, _, _ in parts}
    ranks = {layer: shapes[layer, "down"][0] for layer in sizes}
    return _Shape(frozenset(sizes.items()), tuple((layer, role) for layer, role, _ in parts), ranks)


class Reader:
    """Reads the files of a folder into a row file.

    Args:
        folder: of the collection.
        cache: folder of the row file.
        duplicates: `drop` leaves out adapters equal to an earlier one, `keep` keeps them.
    """

    def __init__(self, folder: Path, cache: Path, duplicates: str = "drop") -> None:
        self.folder, self.cache, self.duplicates = folder, cache, duplicates
        self.layout: Layout | None = None
        self.entries: list[Entry] = []
        self.skipped: list[Skipped] = []
        self._heads: dict[bytes, Header] = {}
        self._plain: dict[bytes, Any] = {}
        self._read: dict[Path, Header] = {}
        self._fitting: dict[bytes, bool] = {}
        self._samples: dict[bytes, list[int]] = {}
        self._ranks: tuple[int, ...] | None = None

    def read(self, paths: Sequence[Path], show: Show = lambda done, total: None) -> None:
        """Bring the row file up to date with `paths`; `show(done, total)` counts files.

        Raises:
            InputError: no file can be read as an adapter.
        """
        self._names = {path: below(str(path), self.folder) for path in paths}
        stats = {name: os.stat(path) for path, name in self._names.items()}
        self._resume(stats)
        known = {entry.path for entry in self.entries} | {skip.path for skip in self.skipped}
        new = [path for path, name in self._names.items() if name not in known]
        if self.layout is None and new:
            self._choose_layout(new)
        done = len(paths) - len(new)
        show(done, len(paths))
        self.cache.mkdir(parents=True, exist_ok=True)
        if new and self.layout is not None:
            with (self.cache / ROWS).open("r+b" if (self.cache / ROWS).is_file() else "w+b") as stream:
                stream.truncate(4 * self.layout.width * len(self.entries))
                stream.seek(0, 2)
                room = np.empty((min(_BLOCK, len(new)), self.layout.width), np.float32)
                saved = 0
                for start in range(0, len(new), _BLOCK):
                    part = new[start : start + _BLOCK]
                    stream.write(self._block(part, stats, room).data)
                    stream.flush()
                    if start + len(part) - saved >= _SAVE:
                        saved = start + len(part)
                        self._write_index()
                    show(done + start + len(part), len(paths))
        if not self.entries:
            reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in self.skipped[:2])
            raise InputError("folder of adapters", value=str(self.folder), allowed="LoRA files", fix=reasons)
        self._write_index()

    def _resume(self, stats: dict[str, Any]) -> None:
        """Take over what an index says of files that have not changed since; all rows in front of the first change."""
        if not (self.cache / INDEX).is_file() or not (self.cache / ROWS).is_file():
            return
        try:
            layout, entries, skipped, more = read_index(self.cache)
        except InputError:
            return  # written by another version, or damaged: it is only a copy
        if more.get("duplicates") != self.duplicates:
            return
        if (self.cache / ROWS).stat().st_size < 4 * layout.width * len(entries):
            return

        def same(item: Entry | Skipped) -> bool:
            stat = stats.get(item.path)
            return stat is not None and (stat.st_size, stat.st_mtime_ns) == (item.size, item.changed)

        if not all(same(entry) for entry in entries) or not entries:
            return
        self.layout, self.entries = layout, entries
        self.skipped = [skip for skip in skipped if same(skip)]
        rows = np.memmap(self.cache / ROWS, np.float32, "r", shape=(len(entries), layout.width))
        for index, row in enumerate(rows):
            self._samples.setdefault(_sample(row), []).append(index)

    def _choose_layout(self, paths: Sequence[Path]) -> None:
        """The layers that most adapters have, with the highest rank of each; the order of the most common file."""
        kinds: Counter[Any] = Counter()
        ranks: dict[Any, dict[str, int]] = {}
        orders: dict[Any, Counter[Any]] = {}
        for shape, many in self._shapes(paths):
            kinds[shape.kind] += many
            orders.setdefault(shape.kind, Counter())[shape.order] += many
            most = ranks.setdefault(shape.kind, {})
            for layer, rank in shape.ranks.items():
                most[layer] = max(most.get(layer, 0), rank)
        if not kinds:
            self._skip_all(paths)
            return
        kind = kinds.most_common(1)[0][0]
        sizes, most = dict(kind), ranks[kind]
        self.layout = Layout.of([
            (layer, role, (most[layer], sizes[layer][0]) if role == "down" else (sizes[layer][1], most[layer]))
            for layer, role in orders[kind].most_common(1)[0][0]
        ])  # fmt: skip

    def _shapes(self, paths: Sequence[Path]) -> list[tuple[_Shape, int]]:
        """What the files are, and how many are that; files with one head are looked at once."""
        heads: Counter[bytes] = Counter()
        found: list[tuple[_Shape, int]] = []
        shapes: dict[bytes, _Shape] = {}
        for path in paths:
            try:
                header = self._header(path)
                if header.text not in shapes:
                    plain = self._parts(header)
                    shape = _shape(plain, path)
                    if plain is None:  # the rest of such a file has a say too
                        found.append((shape, 1))
                        continue
                    shapes[header.text] = shape
                heads[header.text] += 1
            except (InputError, OSError):
                continue  # reported when the file is read
        return [*((shapes[text], many) for text, many in heads.items()), *found]

    def _skip_all(self, paths: Sequence[Path]) -> None:
        for path in paths:
            try:
                self._adapter(path)
            except (InputError, OSError) as error:
                self.skipped.append(Skipped(self._names[path], str(error)))

    def _header(self, path: Path) -> Header:
        if path not in self._read:
            header = read_header(path, self._heads)
            self._read[path] = self._heads.setdefault(header.text, header)
        return self._read[path]

    def _parts(self, header: Header) -> Any:
        if header.text not in self._plain:
            self._plain[header.text] = plain_parts(header)
        return self._plain[header.text]

    def _adapter(self, path: Path) -> Adapter:
        return read_adapter(path)

    def _block(self, paths: Sequence[Path], stats: dict[str, Any], block: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows of the files that can be read, in `block`; entries and skipped files are noted on the way."""
        assert self.layout is not None
        count = 0
        for path in paths:
            name = self._names[path]
            row, stat = block[count], stats[name]
            try:
                entry = self._one(path, row)
                self._check(row, name)
            except (InputError, OSError) as error:
                self.skipped.append(Skipped(name, str(error), stat.st_size, stat.st_mtime_ns))
                continue
            twin = self._twin(row, block)
            if twin is not None and self.duplicates == "drop":
                reason = f"duplicate of {self.entries[twin].path}"
                self.skipped.append(Skipped(name, reason, stat.st_size, stat.st_mtime_ns))
                continue
            self._samples.setdefault(_sample(row), []).append(len(self.entries))
            self.entries.append(replace(entry, path=name, size=stat.st_size, changed=stat.st_mtime_ns))
            count += 1
        return block[:count]

    def _one(self, path: Path, row: NDArray[np.float32]) -> Entry:
        assert self.layout is not None
        label, images = read_label(path, self.folder)
        header = self._header(path)
        if self._is_row(header) and config_alpha(path) is None:
            read_plain(path, header, row)
            return Entry("", 0, 0, label, images, self._full, (1.0,), "diffusers")
        adapter = self._adapter(path)
        self._fits(adapter)
        self.layout.fill(row, adapter)
        its = [adapter.layers[layer] for layer in self.layout.layers]
        ranks, scales = tuple(it.rank for it in its), tuple(it.scale for it in its)
        return Entry("", 0, 0, label, images, shortened(ranks), shortened(scales), adapter.format, adapter.notes)

    def _is_row(self, header: Header) -> bool:
        """Whether the data of a file with this head is a row as it is."""
        if header.text not in self._fitting:
            parts = self._parts(header)
            self._fitting[header.text] = parts is not None and Layout.of(parts) == self.layout
        return self._fitting[header.text]

    @property
    def _full(self) -> tuple[int, ...]:
        """The ranks of an adapter that fills its row."""
        if self._ranks is None:
            assert self.layout is not None
            self._ranks = shortened(tuple(map(self.layout.rank, self.layout.layers)))
        return self._ranks

    def _fits(self, adapter: Adapter) -> None:
        assert self.layout is not None
        own = signature(adapter)
        if set(own) != set(self.layout.layers):
            more, fewer = set(own) - set(self.layout.layers), set(self.layout.layers) - set(own)
            some = sorted(fewer or more)[0]
            raise InputError(f"layers: {len(fewer)} missing, {len(more)} unknown", value=some,
                             allowed="those of the rest of the folder")  # fmt: skip
        for layer in self.layout.layers:
            down, up = self.layout.place(layer, "down").shape, self.layout.place(layer, "up").shape
            if own[layer] != (down[1], up[0]):
                raise InputError(f"size of {layer}", value=list(own[layer]), allowed=str([down[1], up[0]]))
            if adapter.layers[layer].rank > down[0]:
                raise InputError(f"rank of {layer}", value=adapter.layers[layer].rank, allowed=f"up to {down[0]}",
                                 fix="open the folder with refresh=True")  # fmt: skip

    @staticmethod
    def _check(row: NDArray[np.float32], name: str) -> None:
        # A dot product is many times faster than isfinite; only a row that fails it is looked at closely.
        if not np.isfinite(np.dot(row, row)) and not np.isfinite(row).all():
            raise InputError("weights", value="NaN or infinity", allowed="finite values")

    def _twin(self, row: NDArray[np.float32], block: NDArray[np.float32]) -> int | None:
        """An earlier adapter with the same values."""
        assert self.layout is not None
        written = None
        for index in self._samples.get(_sample(row), ()):
            first = len(self.entries) - self._within(row, block)
            if index >= first:
                other = block[index - first]
            else:
                if written is None:
                    written = np.memmap(self.cache / ROWS, np.float32, "r").reshape(-1, self.layout.width)
                other = written[index]
            if np.array_equal(other, row):
                return index
        return None

    @staticmethod
    def _within(row: NDArray[np.float32], block: NDArray[np.float32]) -> int:
        """How many rows of the block are taken before `row`."""
        return int((row.ctypes.data - block.ctypes.data) // block.strides[0])

    def _write_index(self) -> None:
        assert self.layout is not None
        write_index(self.cache, self.layout, self.entries, self.skipped, {"duplicates": self.duplicates})


def _sample(row: NDArray[np.float32]) -> bytes:
    """Some values of a row, spread over it: equal rows share them, others hardly ever do."""
    return row[:: max(1, row.size // 512)].tobytes()


def read_label(path: Path, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Class and image ids of an adapter: of the JSON record beside it, else the class is the folder it lies in.

    Raises:
        InputError: a record that is not one.
    """
    label = ""
    images: tuple[str, ...] = ()
    text = str(path)  # paths as text: taking a Path apart takes longer than reading an adapter
    own = f"{os.path.dirname(text)}{os.sep}metadata.json"
    record = next((each for each in (f"{text[:-12]}.json", own) if isfile(each)), None)
    if record is not None:
        found = files.read_json(record, "record of the adapter")
        if not isinstance(found, dict):
            raise InputError("record of the adapter", value=record, allowed="an object with label")
        label = next((str(found[key]) for key in ("label", "category_name", "class") if found.get(key)), "")
        ids = found.get("image_ids") or ()
        if not isinstance(ids, (list, tuple)) or not all(isinstance(each, (str, int)) for each in ids):
            raise InputError("image_ids of the record", value=record, allowed="a list of texts")
        images = tuple(map(str, ids))
    return label or below(text, folder).rpartition("/")[0].partition("/")[0], images


def below(path: str, folder: Path) -> str:
    """The path of a file relative to a folder that it was found in, with slashes."""
    root = str(folder)
    start = 0 if root == "." else len(root.rstrip(os.sep)) + 1
    return path[start:].replace(os.sep, "/")


def shortened(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One value where all are equal."""
    return values[:1] if len(set(values)) == 1 else values


def write_index(
    cache: Path, layout: Layout, entries: Sequence[Entry], skipped: Sequence[Skipped], more: dict[str, Any]
) -> None:
    """Write the index of a row file."""
    import json

    value = {"version": VERSION, **more, "layout": layout.as_list(), "entries": [vars(e) for e in entries],
             "skipped": [vars(s) for s in skipped]}  # fmt: skip
    files.write_text(cache / INDEX, json.dumps(value, ensure_ascii=False))


def read_index(cache: Path) -> tuple[Layout, list[Entry], list[Skipped], dict[str, Any]]:
    """Read an index.

    Raises:
        InputError: not an index of this version.
    """
    found = files.read_json(cache / INDEX, "index of the collection")
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise InputError("index of the collection", value=str(cache / INDEX), allowed=f"version {VERSION}")
    try:
        entries = [_entry(each) for each in found["entries"]]
        skipped = [Skipped(**each) for each in found["skipped"]]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError("index of the collection", value=str(cache / INDEX), allowed="entries and skipped") from error
    more = {key: value for key, value in found.items() if key not in ("layout", "entries", "skipped", "version")}
    return Layout.from_list(found.get("layout")), entries, skipped, more


def _entry(values: Any) -> Entry:
    lists = {name: tuple(values[name]) for name in ("images", "ranks", "scales", "notes")}
    return Entry(**{**values, **lists})


def find_files(folder: Path, cache: Path) -> Iterator[Path]:
    """The safetensors files under a folder, by name; hidden folders and links that lead out of it are left out."""
    root, apart = folder.resolve(), str(cache)
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and os.path.join(place, name) != apart]
        found += [os.path.join(place, name) for name in names if name[0] != "." and name.endswith(".safetensors")]
    for name in sorted(found):
        # Links to folders are not followed, so a file that is no link lies where its path says.
        if os.path.islink(name) and not Path(name).resolve().is_relative_to(root):
            continue
        if isfile(name):
            yield Path(name)
