"""Reading files of others: pickles that can hold nothing but tensors, and the checks that all converters share."""

import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.pickles import look_through

_MOST_TENSORS = 200_000  # LinEAS has two per unit of a layer
_LARGEST_PROGRAM = 64 * 1024 * 1024  # bytes of the pickle itself, without the tensors
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_pickle(path: str | os.PathLike[str], what: str, *, largest: int) -> Any:
    """What a `.pt`, `.pth` or `.statedict` file holds: plain values and tensors on the CPU.

    The pickle is looked through before it is loaded: anything that names more than tensors and their storages is
    refused. It is then read with `weights_only=True`.

    Args:
        path: the file, in the zip format of PyTorch 1.6 and later.
        what: what the file is to the user, for the errors.
        largest: bytes that such a file has at most.

    Raises:
        InputError: a missing, truncated, too large or foreign file, or one that would need code to load.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{what} not found", value=str(path), fix="check the path")
    size = source.stat().st_size
    if size > largest:
        raise InputError(f"size of {what} {source.name}", value=f"{size} bytes", allowed=f"at most {largest}")
    try:
        look_through(_program_of(source, what), f"{what} {source.name}")
        data = torch.load(source, map_location="cpu", weights_only=True)
    except InputError:
        raise
    # Damaged files make the readers of zip and pickle fail in every way there is.
    except Exception as error:
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise _damaged(source, what, reason) from error
    for tensor in _tensors_in(data):
        _check_storage(tensor, size, f"{what} {source.name}")
    return data


def _damaged(source: Path, what: str, reason: str) -> InputError:
    return InputError(
        f"{what} is truncated or not a PyTorch file ({reason})",
        value=f"{source} ({source.stat().st_size} bytes)",
        allowed="a complete file of torch.save (version 1.6 or later)",
        fix="fetch it again",
    )


def _program_of(source: Path, what: str) -> bytes:
    if not zipfile.is_zipfile(source):
        raise _damaged(source, what, "no zip")
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(programs) != 1:
            raise _damaged(source, what, f"{len(programs)} pickles")
        # torch.save never compresses, so that nothing in it can be larger than the file.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or programs[0].file_size > _LARGEST_PROGRAM or len(entries) > _MOST_TENSORS:
            raise InputError(
                f"{what} {source.name}", value="compressed or oversized", allowed="as torch.save writes it"
            )
        return archive.read(programs[0])


def _tensors_in(data: Any) -> list[Tensor]:
    found: list[Tensor] = []
    waiting, seen = [data], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return found


def _check_storage(tensor: Tensor, size: int, where: str) -> None:
    """Refuse a tensor that is larger than what the file holds of it: a few bytes can claim to be terabytes."""
    held = tensor.untyped_storage().nbytes()
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > held or held > size:
        raise InputError(f"tensor of {where}", value=list(tensor.shape), allowed="no larger than what the file holds")


def state_of(data: Any, where: str) -> dict[str, Any]:
    """`data` as a dictionary with names.

    Raises:
        InputError: it is something else, or empty.
    """
    if not isinstance(data, Mapping) or not data or not all(isinstance(name, str) for name in data):
        raise InputError(f"{where} holds no state dict", value=type(data).__name__, allowed="names with tensors")
    if len(data) > _MOST_TENSORS:
        raise InputError(f"tensors of {where}", value=len(data), allowed=f"at most {_MOST_TENSORS}")
    return dict(data)


def check_tensor(tensor: Any, shape: tuple[int | None, ...], where: str) -> Tensor:
    """`tensor` if it is a floating point tensor of this shape with finite values; None in the shape stands for any.

    Raises:
        InputError: it is not.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
        found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(where, value=found, allowed="a floating point tensor")
    sizes = list(tensor.shape)
    if len(sizes) != len(shape) or any(want not in (None, size) for want, size in zip(shape, sizes, strict=True)):
        allowed = ", ".join("any" if want is None else str(want) for want in shape)
        raise InputError(f"shape of {where}", value=sizes, allowed=f"[{allowed}]")
    if 0 in sizes:
        raise InputError(f"shape of {where}", value=sizes, allowed="no empty dimension")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"values of {where}", value="NaN or infinity", allowed="finite values")
    return tensor


def check_vector(tensor: Any, width: int | None, where: str) -> Tensor:
    """A tensor of D finite values in any arrangement of ones, such as `[D]`, `[1, D]`, `[1, 1, D]`, as fp32 `[D]`.

    Args:
        width: D, or None for any.
    """
    if isinstance(tensor, Tensor) and sum(size != 1 for size in tensor.shape) <= 1:
        tensor = tensor.detach().reshape(-1)
    found = check_tensor(tensor, (width,), where).detach().float()
    return check_tensor(found, (width,), where)  # an fp64 value can be too large for fp32


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which `h.2` comes before `h.10`."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if number % 2 else (1, part) for number, part in enumerate(parts)]


def pattern(text: str, what: str) -> re.Pattern[str]:
    """A regular expression of the user, compiled.

    Raises:
        InputError: it is none.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{what} is no regular expression ({error})", value=text) from error


def check_number(value: Any, what: str, low: float, high: float = math.inf, *, whole: bool = False) -> Any:
    """`value` if it is a number from `low` to `high`.

    Raises:
        InputError: it is not.
    """
    kind = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        allowed = f"a {'whole ' if whole else ''}number from {low:g}" + ("" if high == math.inf else f" to {high:g}")
        raise InputError(what, value=value, allowed=allowed)
    return value
