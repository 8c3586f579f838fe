"""The result store of a sweep: Parquet shards with one writer each, and images by the hash of their content.

    sweep.json            what is swept, and the version of this format
    shards/W-N-HASH.parquet   rows of finished cells; W is the writer, HASH that of the bytes of the file
    images/ab/abcd….png   images, by the hash of their pixels
    pending/W-N.safetensors   what a batch gave, until it is evaluated
    workers/W.json        how far each worker is
    quarantine/           files that turned out damaged, each with a note that says why
    fits/, baselines/     what is computed once

A file is written beside its place, synced and renamed, so it is there whole or not at all. A shard names itself after
its content; one that no longer agrees with its name is moved to `quarantine/` and reported, and its cells run again.
Small shards are merged: the merged one lists those it replaces, which then no longer count, so a crash between the two
steps neither loses nor doubles a row.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError, PysteerError

SCHEMA = 1
MARK = "sweep.json"
_HALF_WRITTEN = ".*.tmp*"  # names of `pysteer.files` until a file is whole
WORKERS_LOCK = ".workers.lock"  # held in common by the workers of a process pool
_TRIES = 20
_SHARD = re.compile(r"([\w.]+)-(\d{6,})-([0-9a-f]{16})\.parquet")
_REPLACES = b"pysteer.replaces"
_BIG = 50_000  # rows of a shard that is not merged any further


class StoreFull(PysteerError):
    """The disk is full, or the folder cannot be written; what was finished before is kept."""


@dataclass(frozen=True)
class Damaged:
    """A file that was set aside: its name, and why."""

    name: str
    reason: str


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Store:
    """The store in `folder`; see the module."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, *parts: str) -> Path:
        """A path in the store."""
        return self.folder.joinpath(*parts)

    def create(self, mark: Mapping[str, Any]) -> None:
        """Make the folder, or check that the one there is a sweep of the same task, and note what is swept now.

        Raises:
            InputError: the folder holds something else, another task or a later format, or cannot be written.
        """
        if (self.folder / MARK).is_file():
            before = self.mark()
            if before.get("task") != mark["task"]:
                raise InputError(
                    f"sweep folder {self.folder} belongs to another task", value=before.get("task"),
                    allowed=str(mark["task"]), fix="give --name NEW",
                )  # fmt: skip
        elif self.folder.exists() and (not self.folder.is_dir() or self._others()):
            raise InputError("sweep folder holds other files", value=str(self.folder), fix="give --name NEW")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(self.folder / MARK, {"schema": SCHEMA, **mark})
        except OSError as error:
            raise InputError(
                "sweep folder cannot be written", value=str(self.folder), allowed="a folder with room that is yours",
                fix=error.strerror or "choose another --out",
            ) from error  # fmt: skip

    def _others(self) -> bool:
        """Whether the folder holds anything but what `create` leaves when it is killed."""
        return any(not path.match(_HALF_WRITTEN) for path in self.folder.iterdir())

    def mark(self) -> dict[str, Any]:
        """What `create` noted.

        Raises:
            InputError: no sweep is here, or one of another format.
        """
        if not (self.folder / MARK).is_file():
            raise InputError("no sweep is here", value=str(self.folder), fix="check --name and --out")
        found = files.read_json(self.folder / MARK, "description of the sweep")
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            value = found.get("schema") if isinstance(found, dict) else type(found).__name__
            raise InputError(
                "format of the sweep", value=value, allowed=str(SCHEMA), fix="use the pysteer that made it"
            )
        return found

    # -- shards

    def shards(self) -> list[Path]:
        """The shards that count, oldest first: those that no other one replaces."""
        found = [path for path in self._listed("shards") if _SHARD.fullmatch(path.name)]
        replaced = {name for path in found if "merged" in path.name for name in _replaced_by(path)}
        return [path for path in found if path.name not in replaced]

    def _listed(self, name: str) -> list[Path]:
        folder = self.folder / name
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []

    def check(self) -> list[Damaged]:
        """Set aside every shard and pending file that is not what it was when it was written; returns those."""
        damaged = []
        for path in self._listed("shards"):
            match = _SHARD.fullmatch(path.name)
            reason = ""
            if match is not None and _digest(path.read_bytes()) != match[3]:
                reason = "its content is not what was written"
            elif match is None and not path.name.startswith("."):
                reason = "its name is none that is given here"
            if reason:
                damaged.append(self.set_aside(path, reason))
        return damaged

    def set_aside(self, path: Path, reason: str) -> Damaged:
        """Move a damaged file to `quarantine/` with a note."""
        target = self.folder / "quarantine" / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        files.write_json(target.with_suffix(".json"), {"file": path.name, "reason": reason, "time": time.time()})
        return Damaged(path.name, reason)

    def quarantined(self) -> list[Damaged]:
        """What was set aside so far."""
        notes = [files.read_json(p, "note") for p in self._listed("quarantine") if p.suffix == ".json"]
        return [Damaged(note["file"], note["reason"]) for note in notes]

    def finished(self, *, failed: bool = True) -> set[str]:
        """Keys of the cells that have a row; without `failed`, only of those that went well."""
        keys: set[str] = set()
        for table in self.read(["key", "status"]):
            found = table["key"].to_pylist()
            if failed:
                keys.update(found)
            else:
                keys.update(k for k, s in zip(found, table["status"].to_pylist(), strict=True) if s == "ok")
        return keys

    def read(self, columns: Sequence[str]) -> list[Any]:
        """The tables of all shards; read again where a worker merged some of them meanwhile."""
        import pyarrow.parquet as pq

        for attempt in range(_TRIES):
            try:
                return [pq.read_table(path, columns=list(columns)) for path in self.shards()]
            except FileNotFoundError:
                if attempt + 1 == _TRIES:
                    raise
                time.sleep(0.05)
        raise AssertionError  # not reached

    def wait_for_workers(self, patience: float = 60.0) -> None:
        """Wait until the workers of an earlier driver, which was killed, have noticed and ended.

        Raises:
            InputError: they did not.
        """
        end = time.monotonic() + patience
        with (self.folder / WORKERS_LOCK).open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError as error:
                    if time.monotonic() > end:
                        where, fix = str(self.folder), "end them, or wait"
                        raise InputError("workers of an earlier run still write", value=where, fix=fix) from error
                    time.sleep(0.1)

    def write(self, writer: str, table: Any, replaces: Sequence[Path] = ()) -> Path:
        """Write a `pyarrow.Table` as a shard of `writer`.

        Raises:
            StoreFull: there is no room; nothing is left behind.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if replaces:
            names = json.dumps([path.name for path in replaces]).encode()
            table = table.replace_schema_metadata({_REPLACES: names})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        mine = [int(m[2]) for p in self._listed("shards") if (m := _SHARD.fullmatch(p.name)) and m[1] == writer]
        name = f"{writer}-{max(mine, default=-1) + 1:06d}-{_digest(data)}.parquet"
        return guarded(files.write_bytes, self.folder / "shards" / name, data)

    def merge(self, writer: str, *, least: int = 16) -> Path | None:
        """Merge the small shards of `writer` ("" for those of everybody) where there are at least `least` of them.

        Nobody else may write shards of that writer meanwhile.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        small = [path for path in self.shards() if not writer or path.name.startswith(f"{writer}-")]
        small = [path for path in small if pq.read_metadata(path).num_rows < _BIG]
        if len(small) < max(least, 2):
            return None
        table = pa.concat_tables([pq.read_table(path) for path in small], promote_options="permissive")
        merged = self.write(f"merged.{writer or 'all'}", table, replaces=small)
        alive = set(self.shards())
        dead = [path for path in self._listed("shards") if _SHARD.fullmatch(path.name) and path not in alive]
        for path in sorted(dead, key=lambda path: path in small):  # those of earlier merges first: these hide them
            path.unlink(missing_ok=True)
        return merged

    def drop(self, keys: Iterable[str]) -> int:
        """Take the rows of `keys` out, so that their cells run again; returns how many there were."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        wanted, dropped = pa.array(sorted(keys), pa.string()), 0
        for path in self.shards():
            table = pq.read_table(path)
            inside = pc.is_in(table["key"], wanted)
            count = int(pc.sum(inside).as_py() or 0)
            if count:
                self.write("merged.kept", table.filter(pc.invert(inside)), replaces=[path])
                path.unlink()
                dropped += count
        return dropped

    # -- images, pending batches, workers

    def put_images(self, images: Sequence[Any]) -> list[str]:
        """Keep images, each uint8 `[H, W, 3]` on the CPU; returns their names, the hashes of sizes and pixels.

        All are written before the first one is synced, and synced before the first one gets its name: the disk then
        has little to do beside the first.
        """
        names = [_image_name(pixels) for pixels in images]
        new = {name: pixels for name, pixels in zip(names, images, strict=True) if not self.image_path(name).is_file()}
        if new:
            guarded(_write_images, {self.image_path(name): pixels for name, pixels in new.items()})
        return names

    def image_path(self, name: str) -> Path:
        """Where the image of a name is."""
        return self.folder / "images" / name[:2] / f"{name}.png"

    def pending(self, prefix: str = "") -> list[Path]:
        """Batches that were generated and not evaluated, of writers whose name begins with `prefix`."""
        return [p for p in self._listed("pending") if p.name.startswith(prefix) and p.suffix == ".safetensors"]

    def tell(self, worker: str, state: Mapping[str, Any]) -> None:
        """Note how far a worker is."""
        guarded(files.write_json, self.folder / "workers" / f"{worker}.json", state)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the workers noted, by name."""
        return {p.stem: files.read_json(p, "state of a worker") for p in self._listed("workers") if p.suffix == ".json"}

    def clean(self) -> None:
        """Remove what processes that were killed left half-written; nobody may be writing."""
        for path in self.folder.rglob(_HALF_WRITTEN):
            path.unlink(missing_ok=True)


def _image_name(pixels: Any) -> str:
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_images(images: Mapping[Path, Any]) -> None:
    from PIL import Image

    written: dict[Path, Path] = {}
    try:
        for path, pixels in images.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            written[path] = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.tmp.png")
            Image.fromarray(pixels.numpy()).save(written[path], compress_level=3)
        for temporary in written.values():
            _sync(temporary)
        for path, temporary in written.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in written}:
            _sync(folder)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync a folder
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _replaced_by(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):  # damaged: `check` reports it
        return []
    names: list[str] = json.loads(metadata.get(_REPLACES, b"[]"))
    return names


def guarded(write: Callable[..., Any], *arguments: Any) -> Any:
    """Call a writer; what the disk refuses is a `StoreFull` with the reason and the fix."""
    try:
        return write(*arguments)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise StoreFull(
                f"results cannot be written ({error.strerror}): {error.filename or ''}; fix: make room or give write "
                "access and run the same command again, finished cells are kept"
            ) from error
        raise
