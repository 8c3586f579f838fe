"""The cells of a sweep: every combination of values, kept as columns of small numbers so that millions fit.

The key of a cell is a hash of its resolved configuration, the task and the version of the package, so it does not
depend on which of its fields were axes, or on what else is in the sweep.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import pysteer
from pysteer.errors import InputError
from pysteer.files import plain
from pysteer.sweep.axes import Axis

KEY_DIGITS = 32  # hexadecimal, of 128 bits
Sampling = Literal["random", "sobol"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: its key and the plain values of all fields of its setting."""

    key: str
    config: dict[str, Any]


class Cells:
    """N cells.

    Args:
        task: name of the task, part of every key.
        base: plain values of all fields.
        values: the different values of every axis by name.
        codes: int32 `[N, axes]`, which value each cell has.
    """

    def __init__(
        self, task: str, base: Mapping[str, Any], values: Mapping[str, Sequence[Any]], codes: NDArray[np.int32]
    ) -> None:
        self.task, self.base = task, dict(base)
        self.values = {name: [plain(value) for value in known] for name, known in values.items()}
        self.codes = codes
        self._keys: NDArray[np.bytes_] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def names(self) -> list[str]:
        """The axes, in order."""
        return list(self.values)

    def config(self, row: int) -> dict[str, Any]:
        """Plain values of all fields of a cell."""
        codes = self.codes[row]
        own = {name: known[codes[i]] for i, (name, known) in enumerate(self.values.items())}
        return {**self.base, **own}

    def cell(self, row: int) -> Cell:
        """A cell with its key."""
        return Cell(self.keys[row].decode(), self.config(row))

    def column(self, name: str) -> NDArray[np.int32]:
        """Which value of field `name` each cell has; zeros where it is no axis."""
        if name not in self.values:
            return np.zeros(len(self), np.int32)
        return self.codes[:, self.names.index(name)]

    @property
    def keys(self) -> NDArray[np.bytes_]:
        """Keys of all cells, 32 hexadecimal digits each."""
        if self._keys is None:
            self._keys = _hash_all(self)
        return self._keys

    def without_doubles(self) -> Cells:
        """The same without cells that occurred before; sampled ones may."""
        _, first = np.unique(self.keys, return_index=True)
        if len(first) == len(self):
            return self
        kept = np.sort(first)
        cells = Cells(self.task, self.base, self.values, self.codes[kept])
        cells._keys = self.keys[kept]
        return cells


def key_of(task: str, config: Mapping[str, Any]) -> str:
    """The key of one cell with the plain values `config`."""
    text = _canonical({"task": task, "pysteer": pysteer.__version__, **config})
    return hashlib.blake2b(text.encode(), digest_size=KEY_DIGITS // 2).hexdigest()


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(plain(values), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _hash_all(cells: Cells) -> NDArray[np.bytes_]:
    """The same as `key_of` for every cell, with each value put into words once."""
    fields = {**cells.base, "task": cells.task, "pysteer": pysteer.__version__}
    names = sorted({*fields, *cells.values})
    pieces: list[bytes | list[bytes]] = [b"{"]
    columns: list[NDArray[np.int32]] = []
    for place, name in enumerate(names):
        head = (b"," if place else b"") + _canonical({name: None}).encode()[1:-5]
        if name in cells.values:
            pieces.append([head + _text(value) for value in cells.values[name]])
            columns.append(cells.column(name))
        elif isinstance(pieces[-1], bytes):
            pieces[-1] += head + _text(fields[name])
        else:
            pieces.append(head + _text(fields[name]))
    pieces.append(b"}")
    keys = np.empty(len(cells), f"S{KEY_DIGITS}")
    rows = np.stack(columns, 1) if columns else np.zeros((len(cells), 0), np.int32)
    hashed = hashlib.blake2b
    for start in range(0, len(cells), 65536):  # lists of a part at a time, so that memory stays small
        for row, codes in enumerate(rows[start : start + 65536].tolist(), start):
            own = iter(codes)
            text = b"".join(piece if isinstance(piece, bytes) else piece[next(own)] for piece in pieces)
            keys[row] = hashed(text, digest_size=KEY_DIGITS // 2).hexdigest().encode()
    return keys


def _text(value: Any) -> bytes:
    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def make_cells(
    task: str,
    base: Mapping[str, Any],
    axes: Sequence[Axis],
    *,
    zipped: Sequence[Sequence[str]] = (),
    samples: int = 0,
    sampling: Sampling = "random",
    sample_seed: int = 0,
) -> Cells:
    """The cells of a sweep.

    Args:
        task: name of the task.
        base: values of all fields of the setting.
        axes: the axes; their values replace those of `base`.
        zipped: groups of axes with equally many values that go along with each other instead of being combined.
        samples: points to draw along the axes that are drawn from.
        sampling: "random", or "sobol": a scrambled Sobol sequence, which fills the space evenly.
        sample_seed: of the points.

    Raises:
        InputError: an axis given twice, zipped axes that are none or differ in length, samples without an axis to draw
            from, or the other way round.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError("axis given twice", value=twice, fix=f"put all values into one {twice}")
    drawn = [axis for axis in axes if axis.drawn]
    if bool(drawn) != bool(samples):
        if samples:
            raise InputError(
                "samples", value=samples, allowed="with an axis to draw from, such as strength=uniform(0,2)"
            )
        raise InputError(f"axis {drawn[0].name} is drawn from", fix="say how many points: --samples 100")
    if samples < 0:
        raise InputError("samples", value=samples, allowed="a whole number above 0")
    values: dict[str, Sequence[Any]] = {axis.name: axis.values for axis in axes if not axis.drawn}
    blocks = [_block(group, values) for group in _groups(values, zipped)]
    if drawn:
        points, found = _points(drawn, samples, sampling, sample_seed)
        values |= found
        blocks.append(points)
    total = 1
    for _, codes in blocks:
        total *= len(codes)
    if total > np.iinfo(np.int32).max:
        raise InputError("cells", value=total, allowed=f"at most {np.iinfo(np.int32).max}", fix="draw samples instead")
    ordered = {name: values[name] for name in names}
    cells = Cells(task, plain(base), ordered, _product(blocks, names, total))
    return cells.without_doubles() if drawn else cells


Block = tuple[list[str], NDArray[np.int32]]


def _groups(values: Mapping[str, Sequence[Any]], zipped: Sequence[Sequence[str]]) -> list[list[str]]:
    taken: list[str] = []
    for group in zipped:
        for name in group:
            if name not in values:
                allowed = ", ".join(values) or "no axis has values"
                raise InputError("axis to zip", value=name, allowed=allowed, fix=f"give {name} several values")
            if name in taken:
                raise InputError("axis zipped twice", value=name, allowed="each axis once")
            taken.append(name)
        lengths = {name: len(values[name]) for name in group}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise InputError("values of zipped axes", value=shown, allowed="equally many of each")
    return [*[list(group) for group in zipped], *[[name] for name in values if name not in taken]]


def _block(group: list[str], values: Mapping[str, Sequence[Any]]) -> Block:
    count = len(values[group[0]])
    return group, np.repeat(np.arange(count, dtype=np.int32)[:, None], len(group), 1)


def _points(axes: Sequence[Axis], count: int, sampling: Sampling, seed: int) -> tuple[Block, dict[str, list[Any]]]:
    if sampling == "sobol":
        from torch.quasirandom import SobolEngine

        uniform = SobolEngine(len(axes), scramble=True, seed=seed).draw(count).double().numpy()
    elif sampling == "random":
        uniform = np.random.default_rng(seed).random((count, len(axes)))
    else:
        raise InputError("sampling", value=sampling, allowed="random, sobol")
    found: dict[str, list[Any]] = {}
    codes = np.empty((count, len(axes)), np.int32)
    for i, axis in enumerate(axes):
        place: dict[str, int] = {}
        known: list[Any] = []
        for row, u in enumerate(uniform[:, i].tolist()):
            value = axis.at(min(u, 1 - 1e-12))
            code = place.setdefault(repr(value), len(known))
            if code == len(known):
                known.append(value)
            codes[row, i] = code
        found[axis.name] = known
    return ([axis.name for axis in axes], codes), found


def _product(blocks: Sequence[Block], names: Sequence[str], total: int) -> NDArray[np.int32]:
    """Every row of every block with every row of the others; the last block changes fastest."""
    codes = np.empty((total, len(names)), np.int32)
    repeat = total
    for group, own in blocks:
        repeat //= len(own)
        tiled = np.tile(np.repeat(own, repeat, 0), (total // (len(own) * repeat), 1))
        for i, name in enumerate(group):
            codes[:, names.index(name)] = tiled[:, i]
    return codes
