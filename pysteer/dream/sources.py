"""Where the tokens come from that an autoencoder is trained on: a store of captured activations, or a running model.

Tokens come in chunks that fit into memory. A chunk is the same whenever it is asked for, so a training that was
interrupted goes on with the very tokens it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pysteer.capture.recorder import Recorder
from pysteer.capture.store import ActivationStore
from pysteer.errors import InputError
from pysteer.families.base import find_family


class TokenSource(Protocol):
    """Chunks of tokens `[n, D]`."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def sizes(self) -> Sequence[int]:
        """Tokens of every chunk."""

    def chunk(self, number: int) -> Tensor:
        """The tokens `[n, D]` fp32 of a chunk, on the CPU."""


@dataclass
class TensorTokens:
    """Tokens that are in memory, `[n, D]`, as one chunk."""

    tokens: Tensor

    @property
    def width(self) -> int:
        """See `TokenSource`."""
        return self.tokens.shape[1]

    @property
    def sizes(self) -> Sequence[int]:
        """See `TokenSource`."""
        return [len(self.tokens)]

    def chunk(self, number: int) -> Tensor:
        """See `TokenSource`."""
        return self.tokens.float()


class StoredTokens:
    """The tokens of one site of a store of captured activations, all steps together; a chunk is a shard of the store.

    Args:
        store: what `pysteer.capture.capture` wrote.
        site: name of the site.
        steps: steps to use, None for all that were captured.

    Raises:
        InputError: the site or a step was not captured.
    """

    def __init__(self, store: ActivationStore, site: str, steps: Sequence[int] | None = None) -> None:
        known = store.steps(site)
        for step in steps or ():
            if step not in known:
                raise InputError(f"step of site {site}", value=step, allowed=", ".join(map(str, known)) or "none")
        if not known:
            names = ", ".join(sorted({name for name, _ in store.pieces})) or "nothing yet"
            raise InputError("site that was captured", value=site, allowed=names)
        self.store, self.site, self.steps = store, site, tuple(known if steps is None else steps)
        counts: dict[int, int] = {}
        for step in self.steps:
            for piece in store.pieces[site, step]:
                if piece.prompt in store.chosen:
                    counts[piece.shard] = counts.get(piece.shard, 0) + piece.tokens
        self._shards = sorted(counts)
        self._counts = counts
        self._width = next(len(row[0]) for _, row in store.rows(site, self.steps[0]))

    @property
    def width(self) -> int:
        """See `TokenSource`."""
        return self._width

    @property
    def sizes(self) -> Sequence[int]:
        """See `TokenSource`."""
        return [self._counts[shard] for shard in self._shards]

    def chunk(self, number: int) -> Tensor:
        """See `TokenSource`."""
        from safetensors import safe_open

        shard = self._shards[number]
        parts = []
        with safe_open(self.store.folder / f"shard-{shard:05d}.safetensors", framework="pt") as stream:
            for step in self.steps:
                pieces = [p for p in self.store.pieces[self.site, step] if p.shard == shard]
                held = stream.get_slice(f"{self.site}/{step}")
                parts += [held[p.first : p.first + p.tokens] for p in pieces if p.prompt in self.store.chosen]
        return torch.cat(parts).float()


@dataclass
class StreamedTokens:
    """Tokens of a running pipeline; a chunk is what `prompts_per_chunk` prompts give, generated when it is asked for.

    Attributes:
        pipe: a pipeline with `encode_text`, such as `ImageGenerator`.
        site: where to read.
        prompts, seeds: what is run, one seed per prompt.
        prompts_per_chunk: prompts of a chunk, run as one batch.
        steps: steps to read, None for all.
        rows: "cond" or "uncond".
        settings: passed on to the pipeline.
        kept: chunks that are kept in memory, so that more than one epoch does not generate them again.
    """

    pipe: Any
    site: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    prompts_per_chunk: int = 64
    steps: Sequence[int] | None = None
    rows: str = "cond"
    settings: Mapping[str, Any] = field(default_factory=dict)
    kept: int = 1

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.seeds) or self.prompts_per_chunk < 1:
            given = f"{len(self.prompts)} prompts, {len(self.seeds)} seeds, {self.prompts_per_chunk} per chunk"
            raise InputError(
                "streamed prompts", value=given, allowed="as many seeds as prompts, at least one per chunk"
            )
        if self.site not in find_family(self.pipe).sites(self.pipe):
            raise InputError("site", value=self.site, allowed="a site of the pipeline")
        self._memory: dict[int, Tensor] = {}
        one = self._read(slice(0, 1))
        self._per_prompt, self._width = one.shape

    @property
    def width(self) -> int:
        """See `TokenSource`."""
        return int(self._width)

    @property
    def sizes(self) -> Sequence[int]:
        """See `TokenSource`."""
        starts = range(0, len(self.prompts), self.prompts_per_chunk)
        return [self._per_prompt * min(self.prompts_per_chunk, len(self.prompts) - start) for start in starts]

    def chunk(self, number: int) -> Tensor:
        """See `TokenSource`."""
        if number not in self._memory:
            first = number * self.prompts_per_chunk
            found = self._read(slice(first, first + self.prompts_per_chunk))
            while self._memory and len(self._memory) >= self.kept:
                self._memory.pop(next(iter(self._memory)))
            self._memory[number] = found
        return self._memory[number]

    @torch.no_grad()
    def _read(self, part: slice) -> Tensor:
        prompts, seeds = list(self.prompts[part]), list(self.seeds[part])
        with Recorder(self.pipe, [self.site], steps=self.steps, rows=self.rows) as recorder:
            self.pipe(prompts, seeds=seeds, decode=False, **self.settings)
        found = [recorder.get(*key).flatten(0, 1).float().cpu() for key in recorder.recorded()]
        if not found:
            raise InputError("steps to read", value=self.steps, allowed="steps that the run takes")
        return torch.cat(found)
