"""A collection of adapters as rows of one memory-mapped file, with labels, factors, features and edits."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.weightspace.adapter import Adapter, LowRank
from pysteer.weightspace.layout import Layout
from pysteer.weightspace.store import INDEX, ROWS, Entry, Reader, Skipped, find_files, read_index, write_index

CACHE = ".pysteer-rows"
PACKED = "rows.safetensors"


class LoraSet:
    """Adapters that share their layers.

        adapters = LoraSet.open("collection")
        print(adapters, adapters.skipped)
        up, down, scale = adapters.factors(adapters.layers[0])

    Attributes:
        rows: fp32 `[N, d]`, mapped from the disk and read only: the factors of every adapter as they are in its file.
        layout: which part of a row is which factor.
        entries: what is known of every adapter.
        skipped: files that were left out, with the reason.
    """

    def __init__(
        self, rows: NDArray[np.float32], layout: Layout, entries: Sequence[Entry], skipped: Sequence[Skipped] = ()
    ) -> None:
        self.rows, self.layout = rows, layout
        self.entries, self.skipped = tuple(entries), tuple(skipped)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        cache: str | Path | None = None,
        duplicates: Literal["drop", "keep"] = "drop",
        refresh: bool = False,
        progress: Callable[[float, float | None], None] = lambda done, total: None,
    ) -> LoraSet:
        """Open a folder of adapters, or a collection that `save` or `import_dataset` wrote.

        Files of diffusers, PEFT and kohya are read once into a row file; opening the folder again reads what is new.
        Files that cannot be used are left out and reported in `skipped`.

        Args:
            folder: `.safetensors` files, at any depth. The class of an adapter stands in the JSON file beside it
                (`label` or `category_name`), or is the name of the folder it lies in.
            cache: folder of the row file; `.pysteer-rows` in `folder` when None.
            duplicates: whether adapters with the same values as an earlier one are left out.
            refresh: read everything again.
            progress: called with files done and their number.

        Raises:
            InputError: no folder, or nothing in it that can be read.
        """
        source = Path(folder)
        if not source.is_dir():
            raise InputError("folder of adapters", value=str(folder), allowed="a folder", fix="check the path")
        if duplicates not in ("drop", "keep"):
            raise InputError("duplicates", value=duplicates, allowed="drop, keep")
        if (source / INDEX).is_file() and (source / PACKED).is_file():
            return cls._packed(source)
        place = Path(cache) if cache is not None else source / CACHE
        if refresh and (place / INDEX).is_file():
            (place / INDEX).unlink()
        reader = Reader(source, place, duplicates)
        reader.read(list(find_files(source, place)), progress)
        assert reader.layout is not None
        shape = (len(reader.entries), reader.layout.width)
        rows = np.memmap(place / ROWS, np.float32, "r", shape=shape)
        return cls(rows, reader.layout, reader.entries, reader.skipped)

    @classmethod
    def _packed(cls, folder: Path) -> LoraSet:
        layout, entries, skipped, _ = read_index(folder)
        with (folder / PACKED).open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
        size = (folder / PACKED).stat().st_size
        if size != 8 + length + 4 * layout.width * len(entries):
            raise InputError("rows of the collection", value=f"{size} bytes",
                             allowed=f"{len(entries)} x {layout.width} values", fix="fetch them again")  # fmt: skip
        shape = (len(entries), layout.width)
        rows = np.memmap(folder / PACKED, np.float32, "r", offset=8 + length, shape=shape)
        return cls(rows, layout, entries, skipped)

    @classmethod
    def of(cls, adapters: Iterable[Adapter], labels: Sequence[str] = ()) -> LoraSet:
        """Adapters in memory as a set; they must have the same layers in the same sizes.

        Raises:
            InputError: none, or other layers than the first one has.
        """
        items = list(adapters)
        if not items:
            raise InputError("adapters", value=0, allowed="at least one")
        most = {layer: max(a.layers[layer].rank for a in items if layer in a.layers) for layer in items[0].layers}
        parts = []
        for layer, it in items[0].layers.items():
            parts += [(layer, "down", (most[layer], it.down.shape[1])), (layer, "up", (it.up.shape[0], most[layer]))]
        layout = Layout.of(parts)
        rows = np.zeros((len(items), layout.width), np.float32)
        entries = []
        for index, adapter in enumerate(items):
            if set(adapter.layers) != set(layout.layers):
                raise InputError("layers", value=adapter.name, allowed="those of the first adapter")
            layout.fill(rows[index], adapter)
            its = [adapter.layers[layer] for layer in layout.layers]
            label = labels[index] if labels else ""
            entries.append(Entry(adapter.name or str(index), 0, 0, label, (), tuple(it.rank for it in its),
                                 tuple(it.scale for it in its), adapter.format, adapter.notes))  # fmt: skip
        return cls(rows, layout, entries)

    def save(self, folder: str | Path) -> Path:
        """Write the set as `rows.safetensors` and `index.json`, which `open` maps as they are.

        Raises:
            InputError: there is something in the folder already.
        """
        with files.new_folder(folder) as place:
            files.write_safetensors(place / PACKED, {"rows": torch.from_numpy(np.array(self.rows))})
            write_index(place, self.layout, self.entries, self.skipped, {"duplicates": "keep"})
        return Path(folder)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        known = sorted({entry.label for entry in self.entries if entry.label})
        return (
            f"LoraSet({len(self)} adapters, {len(self.layers)} layers, d = {self.layout.width}, "
            f"{len(known)} classes, {len(self.skipped)} files left out)"
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, `unet.PATH` and so on."""
        return self.layout.layers

    @property
    def names(self) -> list[str]:
        """Paths of the adapters within the folder."""
        return [entry.path for entry in self.entries]

    @property
    def labels(self) -> list[str]:
        """The class of every adapter, "" where it is not known."""
        return [entry.label for entry in self.entries]

    @cached_property
    def groups(self) -> list[int]:
        """A number per adapter, equal for adapters that share an image, directly or through others (union-find)."""
        parent = list(range(len(self)))

        def root(item: int) -> int:
            while parent[item] != item:
                parent[item] = parent[parent[item]]
                item = parent[item]
            return item

        seen: dict[str, int] = {}
        for index, entry in enumerate(self.entries):
            for image in entry.images:
                parent[root(index)] = root(seen.setdefault(image, index))
        return [root(index) for index in range(len(self))]

    @cached_property
    def ranks(self) -> Tensor:
        """int64 `[N, layers]`."""
        return torch.tensor([e.ranks * len(self.layers) if len(e.ranks) == 1 else e.ranks for e in self.entries])

    @cached_property
    def scales(self) -> Tensor:
        """fp32 `[N, layers]`, alpha / r."""
        return torch.tensor([e.scales * len(self.layers) if len(e.scales) == 1 else e.scales for e in self.entries])

    def part(self, layer: str, role: str, rows: Any = slice(None)) -> Tensor:
        """The factor `down` fp32 `[N, r, in]` or `up` `[N, out, r]` of a layer; a copy.

        Raises:
            InputError: unknown layer.
        """
        place = self.layout.place(layer, role)
        return torch.from_numpy(np.array(self.rows[rows, place.start : place.stop])).view(-1, *place.shape)

    def factors(self, layer: str, rows: Any = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """up fp32 `[N, out, r]`, down `[N, r, in]` and scale `[N]` of a layer: the change is scale * up @ down."""
        index = self.layers.index(layer) if layer in self.layers else -1
        up, down = self.part(layer, "up", rows), self.part(layer, "down", rows)
        return up, down, self.scales[rows, index]

    def adapter(self, index: int) -> Adapter:
        """One adapter, with the ranks and scales it has in its file."""
        layers = {}
        for number, layer in enumerate(self.layers):
            rank = int(self.ranks[index, number])
            down = self.part(layer, "down", slice(index, index + 1))[0, :rank].clone()
            up = self.part(layer, "up", slice(index, index + 1))[0, :, :rank].clone()
            layers[layer] = LowRank(down, up, float(self.scales[index, number]))
        entry = self.entries[index]
        return Adapter(layers, Path(entry.path).stem, entry.format, entry.notes)

    def where(self, chosen: Sequence[int] | Sequence[bool] | str) -> LoraSet:
        """A part of the set: adapters by index, by a mask of N, or by class.

        Raises:
            InputError: nothing is left.
        """
        if isinstance(chosen, str):
            index = [i for i, entry in enumerate(self.entries) if entry.label == chosen]
        elif len(chosen) == len(self) and all(isinstance(each, (bool, np.bool_)) for each in chosen):
            index = [i for i, wanted in enumerate(chosen) if wanted]
        else:
            index = [int(each) for each in chosen]
        if not index:
            raise InputError("part of a collection", value=str(chosen)[:60], allowed="at least one adapter",
                             fix=f"classes: {', '.join(sorted(set(self.labels)))}")  # fmt: skip
        return LoraSet(self.rows[index], self.layout, [self.entries[i] for i in index], self.skipped)

    def relabel(self, labels: Sequence[str]) -> LoraSet:
        """The same set with other labels (N texts)."""
        if len(labels) != len(self):
            raise InputError("labels", value=len(labels), allowed=f"{len(self)}, one per adapter")
        entries = [replace(entry, label=label) for entry, label in zip(self.entries, labels, strict=True)]
        return LoraSet(self.rows, self.layout, entries, self.skipped)
