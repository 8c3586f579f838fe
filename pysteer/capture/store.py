"""Activations on disk: shards in safetensors with a Parquet index, written in order and read piece by piece.

    capture.json            what was captured, from which model; written first
    prompts.parquet         prompt (number), text, seed, label
    shard-00000.safetensors by `site/step`, [n, D]: the tokens, or the pooled vectors, of its prompts in order
    shard-00000.parquet     prompt, site, step, first, tokens: where the activations of a prompt stand in the shard

A shard counts once its index is there, and is then never written again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError

FORMAT = "pysteer-activations-1"
CONFIG, PROMPTS = "capture.json", "prompts.parquet"
INDEX = {"prompt": int, "site": str, "step": int, "first": int, "tokens": int}  # columns of the index of a shard
_ABOUT = {"text": str, "seed": int, "label": str}
_SHARD = re.compile(r"shard-(\d{5})\.parquet")


def key_of(site: str, step: int) -> str:
    """Name of the tensor of a site and step in a shard."""
    return f"{site}/{step}"


def read_parquet(path: Path, what: str, columns: Mapping[str, type]) -> dict[str, list[Any]]:
    """Columns of a Parquet file.

    Args:
        path: the file.
        what: what it is to the user, for the errors.
        columns: those that it must have, with the type of their values; others are left out.

    Raises:
        InputError: it is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{what} not found", value=str(path), fix="capture again")
    try:
        found = pq.read_table(path).to_pydict()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{what} cannot be read ({error})", value=str(path), fix="capture again") from error
    for name, kind in columns.items():
        if name not in found or not all(type(value) is kind for value in found[name]):
            raise InputError(f"{what}, column {name} of {kind.__name__}", value=f"none in {path}", fix="capture again")
    return {name: found[name] for name in columns}


@dataclass(frozen=True)
class Piece:
    """Where the activations of one prompt at one site and step stand: rows `[first, first + tokens)` of a shard."""

    shard: int
    prompt: int
    first: int
    tokens: int


class ShardWriter:
    """Writes activations of prompts in order, a shard whenever `shard_bytes` are full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.number, self.done = _written(folder)
        self._parts: dict[str, list[Tensor]] = {}
        self._index: list[dict[str, Any]] = []
        self._sizes: dict[str, int] = {}
        self._held = 0

    def add(self, prompt: int, site: str, step: int, activations: Tensor) -> None:
        """Hold the activations `[n, D]` of a prompt."""
        key = key_of(site, step)
        first = self._sizes.get(key, 0)
        self._index.append(
            {"prompt": prompt, "site": site, "step": step, "first": first, "tokens": len(activations)}
        )  # fmt: skip
        self._parts.setdefault(key, []).append(activations)
        self._sizes[key] = first + len(activations)
        self._held += activations.numel() * activations.element_size()

    def finish_batch(self, done: int) -> None:
        """All prompts below `done` are held or written; write a shard if there is enough for one."""
        self.done = done
        if self._held >= self.shard_bytes:
            self.flush()

    def keep_finished(self, done: int) -> None:
        """Drop what is held of prompts from `done` on: an interrupted batch has not been through all sites."""
        kept: dict[str, int] = {}
        for piece in self._index:
            kept[key_of(piece["site"], piece["step"])] = kept.get(key_of(piece["site"], piece["step"]), 0) + (
                piece["prompt"] < done
            )
        self._parts = {key: self._parts[key][:count] for key, count in kept.items() if count}
        self._index = [piece for piece in self._index if piece["prompt"] < done]

    def flush(self) -> None:
        """Write what is held; the index comes last and makes it count."""
        if not self._index:
            return
        stem = self.folder / f"shard-{self.number:05d}"
        files.write_safetensors(f"{stem}.safetensors", {key: torch.cat(p) for key, p in self._parts.items()})
        files.write_parquet(f"{stem}.parquet", self._index)
        self.number += 1
        self._parts, self._index, self._sizes, self._held = {}, [], {}, 0


def _indexes(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    for number, path in enumerate(found):
        if path.name != f"shard-{number:05d}.parquet":
            raise InputError("shards of activations have a gap before", value=path.name, fix="capture again")
    return found


def _written(folder: Path) -> tuple[int, int]:
    """Shards that count, and the number of prompts in them."""
    done = 0
    found = _indexes(folder)
    for path in found:
        done = max([done, *(prompt + 1 for prompt in read_parquet(path, "index of activations", INDEX)["prompt"])])
    return len(found), done


@dataclass(frozen=True)
class ActivationStore:
    """Captured activations, read from their folder when asked for.

    Attributes:
        folder: where they are.
        config: `capture.json`.
        texts, seeds, labels: of all prompts; a label is "" where none was given.
        chosen: numbers of the prompts that this view shows.
    """

    folder: Path
    config: Mapping[str, Any]
    texts: Sequence[str]
    seeds: Sequence[int]
    labels: Sequence[str]
    pieces: Mapping[tuple[str, int], Sequence[Piece]]
    chosen: frozenset[int]

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open a folder that `capture` wrote, complete or not.

        Raises:
            InputError: a file is missing or damaged.
        """
        folder = Path(folder)
        config = files.read_json(folder / CONFIG, "description of captured activations")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise InputError("format of captured activations", value=found, allowed=FORMAT)
        table = read_parquet(folder / PROMPTS, "prompts of captured activations", _ABOUT)
        pieces: dict[tuple[str, int], list[Piece]] = {}
        for number, path in enumerate(_indexes(folder)):
            index = read_parquet(path, "index of activations", INDEX)
            for prompt, site, step, first, tokens in zip(*index.values(), strict=True):
                pieces.setdefault((site, step), []).append(Piece(number, prompt, first, tokens))
        texts, seeds, labels = table["text"], table["seed"], table["label"]
        return cls(folder, config, texts, seeds, labels, pieces, frozenset(range(len(texts))))

    @property
    def complete(self) -> bool:
        """Whether all prompts have been captured."""
        held = {piece.prompt for pieces in self.pieces.values() for piece in pieces}
        return len(held) == len(self.texts)

    def where(self, label: str) -> ActivationStore:
        """The same with the prompts of one label only."""
        known = sorted(set(self.labels))
        if label not in known:
            raise InputError("label of captured prompts", value=label, allowed=", ".join(map(repr, known)))
        kept = frozenset(i for i, own in enumerate(self.labels) if own == label)
        return replace(self, chosen=self.chosen & kept)

    def steps(self, site: str) -> tuple[int, ...]:
        """The steps at which a site was captured."""
        return tuple(sorted(step for name, step in self.pieces if name == site))

    def rows(self, site: str, step: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(prompt number, activations `[n, D]`) one after the other, in the dtype they were stored in."""
        from safetensors import SafetensorError, safe_open

        by_shard: dict[int, list[Piece]] = {}
        for piece in self._pieces(site, step):
            by_shard.setdefault(piece.shard, []).append(piece)
        for number, pieces in by_shard.items():
            path = self.folder / f"shard-{number:05d}.safetensors"
            try:
                with safe_open(path, framework="pt") as stream:
                    held = stream.get_slice(key_of(site, step))
                    for piece in pieces:
                        yield piece.prompt, held[piece.first : piece.first + piece.tokens]
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError("shard of activations cannot be read", value=str(path), fix=str(error)) from error

    def tokens(self, site: str, step: int = 0) -> Tensor:
        """All activations of a site and step, `[n, D]`."""
        found = [activations for _, activations in self.rows(site, step)]
        if not found:
            raise InputError("captured activations", value="no prompt of this choice", fix="capture more prompts")
        return torch.cat(found)

    def _pieces(self, site: str, step: int) -> Iterable[Piece]:
        if (site, step) not in self.pieces:
            known = ", ".join(f"{name} step {number}" for name, number in list(self.pieces)[:12]) or "nothing yet"
            raise InputError("not captured", value=f"{site} step {step}", allowed=known)
        return [piece for piece in self.pieces[site, step] if piece.prompt in self.chosen]


def begin(folder: Path, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Any]]) -> None:
    """Make the folder of a store, or check that the one there is of the same capture.

    Raises:
        InputError: another capture is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG
    if not path.is_file():
        if any(_SHARD.fullmatch(each.name) for each in folder.iterdir()):
            raise InputError("folder for activations", value=str(folder), fix=f"it holds shards without {CONFIG}")
        files.write_parquet(folder / PROMPTS, dict(prompts))
        files.write_json(path, config)
        return
    present = files.read_json(path, "description of captured activations")
    for name, value in files.plain(config).items():
        found = present.get(name) if isinstance(present, dict) else None
        if found != value:
            raise InputError(
                f"another capture is in {folder}: {name}",
                value=_brief(found),
                allowed=_brief(value),
                fix="choose another folder, or delete this one",
            )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
