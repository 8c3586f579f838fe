"""Collections as data sets of the hub: a row per adapter, a column of nested lists per tensor, and columns of facts.

Columns are read through Arrow without making a Python object per number: the values of a column lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysteer import files
from pysteer.errors import InputError
from pysteer.weightspace.layout import Layout
from pysteer.weightspace.loraset import LoraSet
from pysteer.weightspace.names import parse_name
from pysteer.weightspace.store import ROWS, Entry, Skipped, read_index, shortened, write_index

_LABELS = ("category_name", "label", "class", "category")


def read_tables(folder: Path) -> Iterator[Any]:
    """The record batches of a data set: `.arrow` files (of `save_to_disk`) or `.parquet` files, by name.

    Raises:
        InputError: there is none, or one that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".arrow", ".parquet") and path.is_file())
    if not paths:
        raise InputError("data set", value=str(folder), allowed="a folder with .arrow or .parquet files")
    for path in paths:
        try:
            if path.suffix == ".parquet":
                yield from pq.ParquetFile(path).iter_batches(64)
                continue
            with pa.memory_map(str(path)) as source:
                try:
                    yield from pa.ipc.open_stream(source)
                except pa.ArrowInvalid:
                    reader = pa.ipc.open_file(source)
                    yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"file of the data set cannot be read ({error})", value=str(path)) from error


def _matrix_columns(batch: Any) -> Layout:
    import pyarrow as pa

    parts = []
    for name in batch.schema.names:
        column = batch.column(name)
        if not _nested(column.type, pa):
            continue
        found = parse_name(name)
        lengths = column.value_lengths()
        inner = column.flatten().value_lengths()
        if batch.num_rows and len(column.flatten()):
            parts.append((found.layer, found.role, (int(lengths[0].as_py()), int(inner[0].as_py()))))
    if not parts:
        raise InputError("columns of the data set", value=", ".join(batch.schema.names[:4]), allowed="nested lists")
    return Layout.of(parts)


def _nested(kind: Any, pa: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and bool(
        pa.types.is_list(kind.value_type) or pa.types.is_large_list(kind.value_type)
    )


def _values(column: Any, rows: int, width: int) -> NDArray[np.float32] | None:
    """The numbers of a column as [rows, width]; None if a row has another number of them."""
    flat = column.flatten().flatten()
    if column.null_count or len(flat) != rows * width:
        return None
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(rows, width)


def import_dataset(
    folder: str | Path, cache: str | Path, progress: Callable[[float, float | None], None] = lambda done, total: None
) -> LoraSet:
    """Read a data set with one adapter per row into a row file, and open it.

    Args:
        folder: of the data set.
        cache: folder that receives the row file; one that is there is opened.

    Raises:
        InputError: no data set, or columns that are not factors of a LoRA.
    """
    source, place = Path(folder), Path(cache)
    if not source.is_dir():
        raise InputError("data set", value=str(folder), allowed="a folder")
    if not (place / "complete").is_file():
        _convert(source, place, progress)
    layout, entries, skipped, _ = read_index(place)
    rows = np.memmap(place / ROWS, np.float32, "r", shape=(len(entries), layout.width))
    return LoraSet(rows, layout, entries, skipped)


def _convert(source: Path, place: Path, progress: Callable[[float, float | None], None]) -> None:
    layout: Layout | None = None
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    place.mkdir(parents=True, exist_ok=True)
    done = 0
    with (place / ROWS).open("wb") as stream:
        for batch in read_tables(source):
            layout = layout or _matrix_columns(batch)
            block, bad = _block(batch, layout, done)
            facts = _facts(batch, done)
            skipped += [Skipped(facts[i].path, reason) for i, reason in bad.items()]
            keep = [i for i in range(batch.num_rows) if i not in bad]
            stream.write(np.ascontiguousarray(block[keep]).data)
            entries += [replace(facts[i], ranks=_ranks(layout), scales=(1.0,)) for i in keep]
            done += batch.num_rows
            progress(done, None)
    if layout is None or not entries:
        raise InputError("data set", value=str(source), allowed="at least one adapter that can be read")
    write_index(place, layout, entries, skipped, {"source": "dataset"})
    files.write_text(place / "complete", "")


def _ranks(layout: Layout) -> tuple[int, ...]:
    return shortened(tuple(layout.rank(layer) for layer in layout.layers))


def _block(batch: Any, layout: Layout, first: int) -> tuple[NDArray[np.float32], dict[int, str]]:
    """The rows of a batch, and those that cannot be used with the reason."""
    names = {parse_name(n)[:2]: n for n in batch.schema.names if _is_factor(n)}
    block = np.zeros((batch.num_rows, layout.width), np.float32)
    bad: dict[int, str] = {}
    for segment in layout.segments:
        column = batch.column(names[segment.layer, segment.role])
        width = segment.stop - segment.start
        values = _values(column, batch.num_rows, width)
        if values is not None:
            block[:, segment.start : segment.stop] = values
            continue
        for index, item in enumerate(column):
            row = np.asarray(item.values.flatten() if item.is_valid else [], np.float32)
            if row.size == width:
                block[index, segment.start : segment.stop] = row
            else:
                bad.setdefault(index, f"{segment.layer} has {row.size} values instead of {width}")
    for place in np.flatnonzero(~np.isfinite(block).all(1)).tolist():
        bad.setdefault(place, "NaN or infinity")
    return block, bad


def _is_factor(name: str) -> bool:
    try:
        return parse_name(name).role in ("down", "up")
    except InputError:
        return False


def _facts(batch: Any, first: int) -> list[Entry]:
    named = next((name for name in _LABELS if name in batch.schema.names), None)
    labels = batch.column(named).to_pylist() if named else [None] * batch.num_rows
    leaves = batch.column("leaf_id").to_pylist() if "leaf_id" in batch.schema.names else None
    return [
        Entry(f"row-{first + i:06d}", 0, 0, "" if label is None else str(label),
              (f"leaf:{leaves[i]}",) if leaves else (), (1,), (1.0,), "dataset")
        for i, label in enumerate(labels)
    ]  # fmt: skip


def export_dataset(adapters: LoraSet, folder: str | Path, *, shard_rows: int = 500) -> Path:
    """Write a set as Parquet in the layout of the weight-space data sets: a row per adapter, a column per tensor.

    Columns are named as diffusers names tensors (`unet.PATH.lora_A.weight`) and hold lists of lists of fp32, beside
    `name`, `category_name` and `image_ids`; `datasets.load_dataset(folder)` and `import_dataset` read them.

    Raises:
        InputError: the folder is taken.
    """
    import pyarrow as pa

    with files.new_folder(folder) as place:
        shards = range(0, len(adapters), shard_rows)
        for number, first in enumerate(shards):
            part = slice(first, min(first + shard_rows, len(adapters)))
            some = adapters.entries[part]
            columns: dict[str, Any] = {
                "name": pa.array([entry.path for entry in some]),
                "category_name": pa.array([entry.label for entry in some]),
                "image_ids": pa.array([list(entry.images) for entry in some], pa.list_(pa.string())),
            }
            for segment in adapters.layout.segments:
                name = f"{segment.layer}.lora_{'A' if segment.role == 'down' else 'B'}.weight"
                values = np.array(adapters.rows[part, segment.start : segment.stop])
                columns[name] = _lists(values, segment.shape, pa)
            path = place / "data" / f"train-{number:05d}-of-{len(shards):05d}.parquet"
            files.write_parquet(path, pa.table(columns))
        files.write_text(place / "README.md", _card(adapters))
    return Path(folder)


def _lists(values: NDArray[np.float32], shape: tuple[int, int], pa: Any) -> Any:
    """Rows `[n, a * b]` as an Arrow column of lists of a lists of b numbers, without a Python object per number."""
    rows, (outer, inner) = len(values), shape
    flat = pa.array(values.reshape(-1))
    lists = pa.ListArray.from_arrays(np.arange(rows * outer + 1, dtype=np.int32) * inner, flat)
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * outer, lists)


def _card(adapters: LoraSet) -> str:
    counts: dict[str, int] = {}
    for label in adapters.labels:
        counts[label or "unlabelled"] = counts.get(label or "unlabelled", 0) + 1
    lines = [f"| {label} | {count} |" for label, count in sorted(counts.items())]
    return (
        "---\npretty_name: LoRA adapters as rows\nconfigs:\n- config_name: default\n"
        "  data_files: data/*.parquet\n---\n\n"
        f"# LoRA adapters as rows\n\n{len(adapters)} adapters of {len(adapters.layers)} layers, "
        f"{adapters.layout.width} numbers each. A row is an adapter, a column a factor.\n\n"
        "| class | adapters |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
