"""Work for a language model: reading a prompt, generating token by token, and sweeping strengths.

Nothing here needs pysteer, so that packages in environments of their own do the very same. Tokens are given, not drawn:
rounding could otherwise lead two contenders to different texts, and their outputs could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from bench.serving import Prepared

Strength = Callable[[float], None]


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        batch: rows.
        prompt: tokens that are read before; with `new` 0 reading them is what is timed.
        new: tokens that each row gets, one after another.
        strengths: how many strengths are swept, one after another or as rows of one batch; 0 for one strength.
        layers: how many layers are taken, without the head; 0 for the whole model.
    """

    batch: int = 1
    prompt: int = 8
    new: int = 0
    strengths: int = 0
    layers: int = 0


# Turns are short: what happens on the machine between two turns is noise in a ratio, many rounds make up for it.
WORKS = {
    "read 128 tokens": Work(prompt=128),
    "decode, batch 1": Work(1, new=4),
    "decode, batch 8": Work(8, new=4),
    "decode, batch 64": Work(64, new=2),
    "5 layers, read 128 tokens": Work(prompt=128, layers=5),
    "5 layers, decode, batch 8": Work(8, new=4, layers=5),
    "sweep of 11 strengths": Work(new=4, strengths=11),
    "sweep of 64 strengths": Work(prompt=4, new=2, strengths=64),
}
# One size for all, so that works differ in what they do alone.
CACHE = 1 + max(work.prompt + work.new for work in WORKS.values() if work.new)


def find(name: str) -> Work:
    """A work by name, with dashes for blanks."""
    return {key.replace(" ", "-"): value for key, value in WORKS.items()}[name]


def token_ids(work: Work) -> Tensor:
    """The tokens of all rows, prompt first: int64 `[batch, prompt + new]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1000, 2000, (work.batch, work.prompt + work.new), generator=generator)


def levels(count: int) -> list[float]:
    """Strengths from 1/count to 1."""
    return [(i + 1) / count for i in range(count)]


class Decoder:
    """Reads and generates with a model, or with a compiled call of it that decodes into a static cache.

    Args:
        model: of transformers, or what wraps one.
        work: what is done.
        call: the compiled model; None for eager calls with the usual growing cache.
        rows: copies of every row, one per strength of a sweep in one batch.
    """

    def __init__(self, model: Any, work: Work, call: Callable[..., Any] | None = None, rows: int = 1) -> None:
        self.model, self.work, self.call = model, work, call
        self.ids = token_ids(work).repeat(rows, 1)
        self.cache: Any = None

    def _cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.call is None:
            return DynamicCache()
        return StaticCache(config=self.model.config, max_cache_len=CACHE)

    def _placed(self, start: int, end: int) -> dict[str, Tensor]:
        places = torch.arange(start, end).expand(len(self.ids), -1)
        return {"input_ids": self.ids[:, start:end], "position_ids": places.contiguous()}

    def setup(self) -> None:
        """Read the prompt of a generation, untimed."""
        if self.work.new:
            self.cache = self._cache()
            self.model(**self._placed(0, self.work.prompt), past_key_values=self.cache, use_cache=True)

    def run(self) -> Tensor:
        """Logits `[rows, V]` of the last tokens, of a model without a head what its last layer makes of them."""
        call = self.model if self.call is None else self.call  # a compiled module has no truth value
        prompt = self.work.prompt
        if not self.work.new:
            return call(**self._placed(0, prompt), use_cache=False)[0][:, -1]
        for place in range(prompt, prompt + self.work.new):
            out = call(**self._placed(place, place + 1), past_key_values=self.cache, use_cache=True)
        return out[0][:, -1]


def one_by_one(decoder: Decoder, set_strength: Strength, strengths: Sequence[float]) -> Tensor:
    """A sweep as it is usually done: a whole generation per strength. Logits `[strengths, V]`."""
    made = []
    for strength in strengths:
        set_strength(strength)
        decoder.setup()
        made.append(decoder.run())
    return torch.cat(made)


def prepare_peer(model: Any, name: str, set_strength: Strength, package: str) -> Prepared:
    """A work by its name for a package that steers `model` and has one strength at a time."""
    work = find(name)
    set_strength(1.0)
    decoder = Decoder(model, work)
    facts = {"version": version(package)}
    swept = levels(work.strengths)
    if swept:
        sweep = lambda: one_by_one(decoder, set_strength, swept)  # noqa: E731
        return Prepared(sweep, sweep, len(swept) * work.new, facts=facts)
    units = work.batch * (work.new or work.prompt)
    return Prepared(decoder.run, decoder.run, units, setup=decoder.setup, facts=facts)
