"""How an adapter lies in a row of the row file, and how its file gets there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pysteer.errors import InputError
from pysteer.weightspace.adapter import Adapter
from pysteer.weightspace.names import parse_name

_LARGEST_HEADER = 100 * 1024 * 1024


@dataclass(frozen=True)
class Segment:
    """A factor in a row: layer, `down` or `up`, its shape (`[r, in]` or `[out, r]`) and where it begins, in floats."""

    layer: str
    role: str
    shape: tuple[int, int]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """The segments of a row, in their order. Adapters of a lower rank than their segment are filled up with zeros."""

    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        """d, floats per row."""
        return self.segments[-1].stop if self.segments else 0

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the order of their first segment."""
        return tuple(dict.fromkeys(segment.layer for segment in self.segments))

    @cached_property
    def _places(self) -> dict[tuple[str, str], Segment]:
        return {(segment.layer, segment.role): segment for segment in self.segments}

    def place(self, layer: str, role: str) -> Segment:
        """The segment of a factor.

        Raises:
            InputError: there is no such layer.
        """
        if (layer, role) not in self._places:
            raise InputError("layer", value=layer, allowed=", ".join(self.layers[:6]) + " ...")
        return self._places[layer, role]

    def rank(self, layer: str) -> int:
        """The rank that the row has room for."""
        return self.place(layer, "down").shape[0]

    def as_list(self) -> list[dict[str, Any]]:
        """Plain values, for the index."""
        return [{"layer": s.layer, "role": s.role, "shape": list(s.shape)} for s in self.segments]

    @staticmethod
    def of(parts: Sequence[tuple[str, str, tuple[int, int]]]) -> Layout:
        """A layout of factors (layer, role, shape) in the order in which they shall lie."""
        segments, start = [], 0
        for layer, role, shape in parts:
            segments.append(Segment(layer, role, shape, start))
            start = segments[-1].stop
        return Layout(tuple(segments))

    @staticmethod
    def from_list(rows: Any) -> Layout:
        """The layout of an index.

        Raises:
            InputError: not a list of segments.
        """
        try:
            found = [(str(r["layer"]), str(r["role"]), (int(r["shape"][0]), int(r["shape"][1]))) for r in rows]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise InputError("layout of the index", value=type(rows).__name__, allowed="a list of segments") from error
        if not all(min(shape) > 0 and max(shape) < 2**31 and role in ("down", "up") for _, role, shape in found):
            raise InputError("layout of the index", value="a segment", allowed="shapes above 0, roles down and up")
        return Layout.of(found)

    def fill(self, row: NDArray[np.float32], adapter: Adapter) -> None:
        """Write the factors of an adapter into a row; what it has no values for becomes zero."""
        row[:] = 0
        for segment in self.segments:
            layer = adapter.layers[segment.layer]
            factor = (layer.down if segment.role == "down" else layer.up).numpy()
            view = row[segment.start : segment.stop].reshape(segment.shape)
            view[: factor.shape[0], : factor.shape[1]] = factor


@dataclass(frozen=True)
class Header:
    """The head of a safetensors file.

    Attributes:
        text: its bytes; equal bytes mean equal tensors in equal places.
        tensors: name -> dtype, shape, first and last byte within the data.
        data: where the data begins in the file.
        size: bytes of the file.
    """

    text: bytes
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    data: int
    size: int


def read_header(path: Path, known: Mapping[bytes, Header] | None = None) -> Header:
    """Read and check the head of a file; a head among `known` is not parsed again.

    Raises:
        InputError: truncated, foreign, or tensors that lie outside of the file.
    """
    file = os.open(path, os.O_RDONLY)  # a file object takes longer to make than a head to read
    try:
        first = os.read(file, 8)
        size = os.fstat(file).st_size
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise InputError("adapter is truncated or not safetensors", value=f"{path.name} ({size} bytes)")
        text = os.read(file, length)
    finally:
        os.close(file)
    before = (known or {}).get(text)
    header = before if before is not None else _parse(text, path.name)
    if header.size != size:
        raise InputError("adapter is truncated", value=f"{path.name} ({size} bytes)", allowed=str(header.size))
    return header


def _parse(text: bytes, name: str) -> Header:
    try:
        fields = json.loads(text)
        tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for key, it in fields.items():
            if key != "__metadata__":
                first, last = map(int, it["data_offsets"])
                tensors[str(key)] = (str(it["dtype"]), tuple(map(int, it["shape"])), first, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError("head of the adapter", value=name, allowed="a safetensors head") from error
    for _, shape, first, last in tensors.values():
        if not 0 <= first <= last or len(shape) > 8 or any(side < 0 for side in shape):
            raise InputError("head of the adapter", value=name, allowed="tensors that lie in the file")
    data = 8 + len(text)
    end = max((last for _, _, _, last in tensors.values()), default=0)
    return Header(text, tensors, data, data + end)


def plain_parts(header: Header) -> list[tuple[str, str, tuple[int, int]]] | None:
    """The factors of a file in the order of its data, if it holds fp32 matrices and nothing else; None otherwise.

    Such a file is a row as it is: one read, no copy.
    """
    parts, expected = [], 0
    for name, (dtype, shape, first, last) in sorted(header.tensors.items(), key=lambda item: item[1][2]):
        tensor = parse_name(name)
        if dtype != "F32" or len(shape) != 2 or tensor.role not in ("down", "up") or first != expected:
            return None
        if 4 * shape[0] * shape[1] != last - first:
            raise InputError("head of the adapter", value=name, allowed="sizes that fit the shapes")
        parts.append((tensor.layer, tensor.role, (shape[0], shape[1])))
        expected = last
    sizes = {(layer, role): shape for layer, role, shape in parts}
    if len(sizes) != len(parts) or not parts:
        raise InputError("head of the adapter", value=f"{len(parts)} factors", allowed="each factor once")
    for layer, _, _ in parts:
        down, up = sizes.get((layer, "down")), sizes.get((layer, "up"))
        if down is None or up is None or down[0] != up[1]:
            raise InputError(f"factors of {layer}", value=f"{down} and {up}", allowed="[r, in] and [out, r]")
    return parts


def read_plain(path: Path, header: Header, row: NDArray[np.float32]) -> None:
    """Read the data of a file into a row, without a copy between.

    Raises:
        InputError: fewer bytes than its head says.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        read = os.preadv(file, [row.data.cast("B")], header.data)
    finally:
        os.close(file)
    if read != row.nbytes:
        raise InputError("adapter is truncated", value=f"{path.name} ({read} bytes)", allowed=str(row.nbytes))


def signature(adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Layer -> (in, out) of an adapter: what has to be equal for two adapters to share a layout."""
    return {layer: (it.down.shape[1], it.up.shape[0]) for layer, it in adapter.layers.items()}
