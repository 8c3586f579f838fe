"""Files are written whole or not at all, and read with errors a person can act on.

Every writer fills a temporary file in the target folder, syncs it to disk and renames it over the target. A crash at
any moment leaves either the old file or the new one; a failed write leaves no temporary file behind.
"""

import dataclasses
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysteer.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HEADER = 100 * 1024 * 1024  # bytes; the limit of the safetensors format itself


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync a folder; the rename is still atomic there
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    Folders on the way are created. The temporary name keeps the suffix, because image and table writers choose their
    format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends without an error.

    Raises:
        InputError: there is something at `path` already.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("output folder is taken", value=str(target), allowed="a new folder", fix="choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` atomically; a figure of `pysteer.report` (`Drawn`) as PNG, SVG and CSV."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    target = Path(path)
    for form in ("svg", "csv"):
        make = getattr(data, form, None)
        if target.suffix == ".png" and make is not None and (further := make()):
            with atomic_path(target.with_suffix(f".{form}")) as temporary:
                temporary.write_bytes(further)
    return target


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` as UTF-8, atomically."""
    return write_bytes(path, text.encode("utf-8"))


def plain(value: Any) -> Any:
    """`value` as plain JSON types: tensors and arrays become lists, dataclasses dicts, NaN and infinities null."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, slice):
        return [plain(value.start), plain(value.stop), plain(value.step)]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and numpy scalars
        return plain(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` to `path` as indented JSON, atomically; see `plain` for the types it takes."""
    return write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_image(path: str | os.PathLike[str], image: Any) -> Path:
    """Write an image atomically; the suffix chooses the format.

    Args:
        path: target, for example `sheet.png`.
        image: a PIL image, or uint8 `[H, W, 3]` (RGB) or `[H, W]` as a tensor or an array.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        import numpy as np

        pixels = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
            raise InputError(
                "image to write", value=f"{pixels.dtype} {list(pixels.shape)}", allowed="uint8 [H, W, 3] or [H, W]"
            )
        image = Image.fromarray(pixels)
    with atomic_path(path) as temporary:
        image.save(temporary)
    return Path(path)


def write_parquet(path: str | os.PathLike[str], rows: Any) -> Path:
    """Write a table atomically.

    Args:
        path: target, ending in `.parquet`.
        rows: a `pyarrow.Table`, a list of dicts (one per row) or a dict of columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(rows, pa.Table):
        rows = pa.Table.from_pydict(dict(rows)) if isinstance(rows, Mapping) else pa.Table.from_pylist(list(rows))
    with atomic_path(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd")
    return Path(path)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors atomically in safetensors format; they are copied to contiguous CPU memory first."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata) if metadata else None)
    return Path(path)


def _existing(path: str | os.PathLike[str], what: str) -> Path:
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{what} not found", value=str(path), fix="check the path")
    return source


def read_json(path: str | os.PathLike[str], what: str = "JSON file") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what the file is to the user ("prompts file"), for the error.

    Raises:
        InputError: the file is missing, not UTF-8 or not JSON.
    """
    source = _existing(path, what)
    try:
        return parse_json(source.read_text(encoding="utf-8"), what, str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text", value=str(path), allowed="JSON in UTF-8") from error


def parse_json(text: str, what: str, path: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        InputError: it is not JSON, nested too deeply, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}: {error.msg}"
    except RecursionError:
        where = "nested too deeply"
    except ValueError:
        where = "a number of too many digits"
    raise InputError(f"{what} is not JSON ({where})", value=path, allowed="JSON", fix="correct it")


def _check_header(source: Path, what: str) -> None:
    size = source.stat().st_size
    with source.open("rb") as stream:
        start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
    if length > min(size - 8, _LARGEST_HEADER):
        raise InputError(
            f"{what} is truncated or not safetensors",
            value=f"{source} ({size} bytes)",
            allowed="a complete .safetensors file",
            fix="fetch or convert it again",
        )


def read_safetensors(
    path: str | os.PathLike[str],
    what: str = "weights file",
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    finite: bool = True,
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read a safetensors file into CPU memory and check it.

    Args:
        path: the file.
        what: what the file is to the user, for the errors.
        shapes: the names and shapes it must hold, exactly; None takes any.
        finite: refuse NaN and infinite values.

    Returns:
        The tensors by name, and the string metadata of the file.

    Raises:
        InputError: missing file, truncated or foreign format, wrong names or shapes, NaN or infinite values.
    """
    from safetensors import SafetensorError, safe_open

    source = _existing(path, what)
    _check_header(source, what)
    try:
        with safe_open(source, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
            metadata = dict(stream.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{what} cannot be read ({error})", value=str(path), allowed="a complete .safetensors file"
        ) from error
    if shapes is not None:
        _check_shapes(tensors, shapes, f"{what} {source.name}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:  # there is no arithmetic on them
            raise InputError(
                f"{what} {source.name}, type of {name}", value=str(tensor.dtype), allowed="16 bits or more"
            )
        if finite and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{what} {source.name}, tensor {name}", value="NaN or infinity", allowed="finite values")
    return tensors, metadata


def _check_shapes(tensors: Mapping[str, "Tensor"], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    missing = sorted(set(shapes) - set(tensors))
    unknown = sorted(set(tensors) - set(shapes))
    if missing:
        raise InputError(f"{what} lacks {len(missing)} tensors", value=", ".join(missing[:3]), fix="convert it again")
    if unknown:
        raise InputError(f"{what} holds {len(unknown)} unexpected tensors", value=", ".join(unknown[:3]))
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise InputError(f"{what}, shape of {name}", value=str(list(tensors[name].shape)), allowed=str(list(shape)))
