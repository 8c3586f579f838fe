"""All windows of a run: in memory, or on disk in the format of captured activations.

    capture.json            names and widths of the points
    prompts.parquet         window (number), text, seed (the step), label (the phase)
    shard-00000.safetensors moments [8, C] fp64 by `point/0`, the windows one below the other
    shard-00000.parquet     which rows belong to which window

`pysteer.capture.store.ActivationStore.open(folder)` reads the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.capture.store import CONFIG, FORMAT, INDEX, PROMPTS, ActivationStore, ShardWriter, read_parquet
from pysteer.dynamics.window import STATS, Window, stat_name
from pysteer.errors import InputError
from pysteer.ops.channel_moments import ChannelMoments

_SHARD_BYTES = 64 << 20


class History:
    """Windows in the order they closed.

    Args:
        folder: where they go; None keeps them in memory. One that holds windows already is continued.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: list[Window] = []  # all of them without a folder, else those not written yet
        self._index: list[tuple[int, str]] = []  # step and phase of every window
        self._writer: ShardWriter | None = None
        if self.folder is not None and (self.folder / PROMPTS).is_file():
            table = read_parquet(self.folder / PROMPTS, "windows of a history", {"seed": int, "label": str})
            # The list of windows is written before their shard: what a crash left out of it does not count.
            self._index = list(zip(table["seed"], table["label"], strict=True))[: _count(self.folder)]

    def __len__(self) -> int:
        return len(self._index)

    def add(self, window: Window) -> None:
        """Take a window."""
        number = len(self._index)
        self._index.append((window.step, window.phase))
        if self.folder is None:
            self._kept.append(window)
            return
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = ShardWriter(self.folder, _SHARD_BYTES)
        self._kept.append(window)
        for name, moments in zip(window.names, window.moments.split(list(window.widths), 1), strict=True):
            self._writer.add(number, name, 0, moments)
        if self._writer._held >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        if self.folder is None or self._writer is None or not self._kept:
            return
        widths = dict(zip(self._kept[-1].names, self._kept[-1].widths, strict=True))
        files.write_json(self.folder / CONFIG, {"format": FORMAT, "content": "channel_moments", "points": widths})
        columns: dict[str, list[Any]] = {"prompt": [], "text": [], "seed": [], "label": []}
        for number, (step, phase) in enumerate(self._index):
            row = {"prompt": number, "text": f"{phase}, step {step}", "seed": step, "label": phase}
            for name, value in row.items():
                columns[name].append(value)
        files.write_parquet(self.folder / PROMPTS, columns)
        self._writer.flush()
        self._kept = []

    def rewind(self, step: int) -> None:
        """Drop all windows after `step`: a resumed run makes them again."""
        keep = sum(1 for own, _ in self._index if own <= step)
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("shard-*.parquet"), reverse=True):
                if max(read_parquet(path, "index of a history", INDEX)["prompt"]) < keep:
                    break
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)
            held = _count(self.folder)
            if held < keep:
                raise InputError("history lacks windows before step", value=step, fix=f"delete {self.folder}")
        self._index = self._index[:keep]
        self._kept = self._kept[:keep] if self.folder is None else []
        self._writer = None

    def windows(self, phase: str | None = None) -> Iterator[Window]:
        """The windows in order, of one phase or of all."""
        self.flush()
        if self.folder is None:
            yield from (window for window in self._kept if phase in (None, window.phase))
            return
        if not self._index:
            return
        store = ActivationStore.open(self.folder)
        rows = {name: store.rows(name) for name in store.config["points"]}
        ahead = {name: next(each, None) for name, each in rows.items()}
        for number, (step, own) in enumerate(self._index):
            parts = {}
            for name, found in ahead.items():
                if found is not None and found[0] == number:  # a point that had not run yet is not in the window
                    parts[name] = found[1]
                    ahead[name] = next(rows[name], None)
            if phase in (None, own):
                widths = [each.shape[1] for each in parts.values()]
                yield Window(step, own, list(parts), widths, torch.cat(list(parts.values()), 1), {})

    def series(self, point: str, stat: str, phase: str = "train") -> tuple[list[int], Tensor]:
        """A statistic of every channel of a point over the run: steps, and values `[T, C]` fp64."""
        stat = stat_name(stat)
        self.flush()
        if self.folder is None:
            held = [(window.step, window.phase, window.of(point)) for window in self._kept]
        else:
            rows = ActivationStore.open(self.folder).rows(point) if self._index else ()
            held = [(*self._index[number], ChannelMoments.of(moments)) for number, moments in rows]
        found = [(step, STATS[stat](moments)) for step, own, moments in held if own == phase]
        if not found:
            raise InputError("windows of phase", value=phase, allowed="a phase that ran", fix="train longer")
        return [step for step, _ in found], torch.stack([values for _, values in found])


def _count(folder: Path) -> int:
    paths = sorted(folder.glob("shard-*.parquet"))
    return max(
        (prompt + 1 for path in paths for prompt in read_parquet(path, "index of a history", INDEX)["prompt"]),
        default=0,
    )
