"""Work that is divided into items: done in parts by any number of processes, each part written whole or not at all.

A folder of parts holds `items.json`, which says what the items are, and per part

    part-000012-9f3a.json         the items of the part, and the SHA-256 of its files; written last, makes it count
    part-000012-9f3a.parquet ...  its files

Rank r of w takes the items r, r + w, r + 2 w and so on that no part has yet. So ranks never share an item, whatever
the number of ranks was before an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError, PysteerError

ITEMS = "items.json"
Write = Callable[[Path], object]


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does: rank of world."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError("rank and world", value=f"{self.rank} of {self.world}", allowed="0 <= rank < world")

    def of(self, items: Sequence[int]) -> list[int]:
        """The items of this process."""
        return list(items)[self.rank :: self.world]


@dataclass(frozen=True)
class Part:
    """A part that is there: its items, and the paths of its files by suffix."""

    items: tuple[int, ...]
    files: Mapping[str, Path]
    digest: str


def sha256(path: Path) -> str:
    """Of the content of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """A hash (16 hexadecimal digits) of plain values."""
    return hashlib.sha256(json.dumps(files.plain(value), sort_keys=True).encode()).hexdigest()[:16]


class Parts:
    """The parts in a folder.

    Args:
        folder: where.
        identity: plain values that say what the items are; another folder content is refused.
        count: number of items.

    Raises:
        InputError: the folder holds parts of other work.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], count: int) -> None:
        self.folder, self.count = folder, count
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {"identity": json.loads(json.dumps(files.plain(identity))), "items": count}
        path = folder / ITEMS
        if path.is_file():
            there = files.read_json(path, "description of the parts")
            if there != wanted:
                raise InputError(
                    "folder of parts of other work",
                    value=f"{folder.name}: {_difference(there, wanted)}",
                    fix="give the run another name, or delete the folder",
                )
        else:
            files.write_json(path, wanted)

    @classmethod
    def open(cls, folder: Path) -> Parts:
        """The parts that are in a folder, for reading.

        Raises:
            InputError: there are none.
        """
        there = files.read_json(folder / ITEMS, "description of the parts")
        if not isinstance(there, dict) or not isinstance(there.get("items"), int):
            raise InputError("description of the parts", value=str(folder / ITEMS), allowed="what a stage wrote")
        return cls(folder, there.get("identity", {}), there["items"])

    @property
    def identity(self) -> dict[str, Any]:
        """What the items are."""
        found: dict[str, Any] = files.read_json(self.folder / ITEMS, "description of the parts")["identity"]
        return found

    def __iter__(self) -> Iterator[Part]:
        for marker in sorted(self.folder.glob("part-*.json")):
            entry = files.read_json(marker, "marker of a part")
            found = {suffix: marker.with_suffix(f".{suffix}") for suffix in entry["files"]}
            for path in found.values():
                if not path.is_file():
                    raise InputError("file of a part is missing", value=str(path), fix=f"delete {marker.name}")
            yield Part(tuple(entry["items"]), found, digest_of(entry))

    def done(self) -> set[int]:
        """Items that some part holds."""
        return {item for part in self for item in part.items}

    def left(self, share: Share | None = None) -> list[int]:
        """Items of a process that no part holds yet, in order."""
        done = self.done()
        return [item for item in (share or Share()).of(range(self.count)) if item not in done]

    def add(self, items: Sequence[int], writers: Mapping[str, Write]) -> None:
        """Write a part; `writers` gives for every suffix what writes that file to the path it is given."""
        stem = f"part-{items[0]:06d}-{digest_of(list(items))[:6]}"
        written = {}
        for suffix, write in writers.items():
            path = self.folder / f"{stem}.{suffix}"
            write(path)
            written[suffix] = sha256(path)
        files.write_json(self.folder / f"{stem}.json", {"items": list(items), "files": written})

    def check_whole(self) -> None:
        """Raise unless every item is there exactly once."""
        counts = [0] * self.count
        for part in self:
            for item in part.items:
                counts[item] += 1
        missing = [i for i, n in enumerate(counts) if n == 0]
        double = [i for i, n in enumerate(counts) if n > 1]
        if missing or double:
            raise PysteerError(
                f"{self.folder.name}: {len(missing)} of {self.count} items are missing, {len(double)} are there twice; "
                "fix: run the stage again, with the same world for all ranks"
            )

    def content(self) -> str:
        """A hash of what the items are and of the content of all their files."""
        return digest_of([self.identity, sorted(part.digest for part in self)])


def _difference(there: Any, wanted: Mapping[str, Any]) -> str:
    before, now = there.get("identity", {}) if isinstance(there, dict) else {}, wanted["identity"]
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    shown = [f"{name} {str(before.get(name))[:40]} there, {str(now.get(name))[:40]} now" for name in names]
    return "; ".join(shown[:2]) or "another number of items"
