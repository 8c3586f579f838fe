"""Infinity, diffusers and language models as prefix sharing sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pysteer.families.base import find_family
from pysteer.models.infinity.transformer import TextCondition
from pysteer.steering import Plan
from pysteer.sweep.prefix import Row, State, during, steering


def noise_seed(prompt: str, seed: int) -> int:
    """The random stream of a prompt and a seed, in [0, 2^63): the same whatever steers, so pictures can be compared."""
    digest = hashlib.blake2b(json.dumps([prompt, seed]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def runs_of(model: Any, settings: Mapping[str, Any], *, decode: bool = True) -> Any:
    """The `Runs` of a pipeline or language model with generation settings."""
    if hasattr(model, "read"):
        return TextRuns(model, settings)
    if hasattr(model, "pipe"):
        return DiffusionRuns(model, settings, decode)
    return InfinityRuns(model, settings)


class InfinityRuns:
    """Steps are scales; texts are encoded once per prompt and text steering."""

    def __init__(self, pipe: Any, settings: Mapping[str, Any]) -> None:
        self.model, self.settings = pipe, dict(settings)
        schedule = list(settings.get("scales") or pipe.transformer.schedule)
        self.steps, self.weights = len(schedule), [float(h * w) for h, w in schedule]
        self.parts = {name: site.part for name, site in find_family(pipe).sites(pipe).items()}
        guidance = self.settings.get("cfg", pipe.defaults["cfg"])
        guided = guidance != 1 if isinstance(guidance, int | float) else any(factor != 1 for factor in guidance)
        self.twins = guided and all(item == 0 for item in self.settings.get("cfg_insertion_layer", (0,)))

    def steps_of(self, site: str, segment: range) -> Sequence[int]:
        if self.parts.get(site) == "text":
            return (0,) if segment.start == 0 else ()
        return segment

    def seeded(self, step: int) -> bool:
        return step == 0

    def attached(self, plan: Plan, segment: range) -> Plan:
        return self._of(plan, segment, text=False)

    def _of(self, plan: Plan, segment: range, *, text: bool) -> Plan:
        acting = during(plan, self, segment)
        acting.entries = [e for e in acting.entries if (self.parts[e.parameters.site] == "text") == text]
        return acting

    def begin(self, rows: Sequence[Row]) -> State:
        texts = [self._of(row.plan, range(1), text=True) for row in rows]
        keys = [
            (row.prompt, tuple((id(e.parameters), e.schedule[0]) for e in text.entries))
            for row, text in zip(rows, texts, strict=True)
        ]
        different = list(dict.fromkeys(keys))
        firsts = [keys.index(key) for key in different]
        with steering(self, [texts[i] for i in firsts]):
            encoded = self.model.encode_text([rows[i].prompt for i in firsts])
        place = torch.tensor([different.index(key) for key in keys], device=self.model.device)
        return _Scales(self, TextCondition(encoded.hidden[place], encoded.lengths[place]), [r.noise for r in rows])

    def finish(self, state: Any) -> tuple[Tensor, Tensor]:
        """Images uint8 `[U, H, W, 3]` on the CPU, and which rows are finite."""
        done = state.decoding
        return self.model.finish(done).images.cpu(), done.finite.cpu()


class _Scales:
    """An Infinity generation that begins with its first segment, since that is when its steering is attached."""

    def __init__(self, runs: InfinityRuns, text: TextCondition, seeds: Sequence[int], decoding: Any = None) -> None:
        self.runs, self.text, self.seeds, self.decoding = runs, text, list(seeds), decoding

    def advance(self, until: int) -> Any:
        if self.decoding is None:
            self.decoding = self.runs.model.begin(self.text, seeds=self.seeds, **self.runs.settings)
        return self.decoding.advance(until)

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None, *, twins: bool = False) -> _Scales:
        own = [self.seeds[i] for i in rows.tolist()] if seeds is None else list(seeds)
        forked = self.decoding.fork(rows, torch.tensor(own, dtype=torch.int64), twins=twins)
        return _Scales(self.runs, self.text, own, forked)


class DiffusionRuns:
    """Steps are those of denoising; what steers a text encoder acts in all of them, the autoencoder in the last."""

    twins = False  # a pipeline lays out its rows itself

    def __init__(self, generator: Any, settings: Mapping[str, Any], decode: bool) -> None:
        self.model, self.settings, self.decode = generator, dict(settings), decode
        self.whole = generator.why_not_forked(self.settings)  # then rows are shared from beginning to end or not at all
        self.inner = generator.steps(**self.settings)
        self.steps = 1 if self.whole else self.inner
        self.weights = [self.inner / self.steps] * self.steps
        self.parts = {name: site.part for name, site in find_family(generator).sites(generator).items()}

    def steps_of(self, site: str, segment: range) -> Sequence[int]:
        part = self.parts.get(site, "visual")
        if part.startswith("text"):
            return (0,)
        if part == "vae":
            return (0,) if segment.stop == self.steps else ()
        return range(self.inner) if self.whole else segment

    def seeded(self, step: int) -> bool:
        return step == 0

    def attached(self, plan: Plan, segment: range) -> Plan:
        return during(plan, self, segment)

    def begin(self, rows: Sequence[Row]) -> State:
        state: State = self.model.begin(
            [row.prompt for row in rows], seeds=[row.noise for row in rows], decode=self.decode, **self.settings
        )
        return _Steps(state, self)

    def finish(self, state: Any) -> tuple[Tensor, Tensor]:
        """Images uint8 `[U, H, W, 3]` on the CPU, and which rows are finite."""
        output = state.inner.output
        return output.images, torch.isfinite(output.latents.flatten(1).float().sum(1)).cpu()


class _Steps:
    """A `Denoising`, advanced to its end where it cannot be forked."""

    def __init__(self, inner: Any, runs: DiffusionRuns) -> None:
        self.inner, self.runs = inner, runs

    def advance(self, until: int) -> Any:
        return self.inner.advance(None if until == self.runs.steps else until)

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None, *, twins: bool = False) -> _Steps:
        return _Steps(self.inner.fork(rows, seeds), self.runs)


class TextRuns:
    """Two steps: reading the prompt, and writing."""

    steps = 2
    twins = False  # there are no unconditional rows

    def __init__(self, lm: Any, settings: Mapping[str, Any]) -> None:
        self.model, self.settings = lm, dict(settings)
        self.weights = [1.0, float(settings.get("max_new_tokens", 20))]

    def steps_of(self, site: str, segment: range) -> Sequence[int]:
        return segment

    def seeded(self, step: int) -> bool:
        return step == 1 and float(self.settings.get("temperature", 0)) > 0

    def attached(self, plan: Plan, segment: range) -> Plan:
        if int(self.settings.get("max_new_tokens", 20)) == 1:  # the first token comes of reading the prompt
            segment = range(segment.start, min(segment.stop, 1))
        return during(plan, self, segment)

    def begin(self, rows: Sequence[Row]) -> State:
        writing = self.model.begin([r.prompt for r in rows], seeds=[r.noise for r in rows], **self.settings)
        return _Texts(writing)

    def finish(self, state: Any) -> tuple[list[str], Tensor]:
        """Texts, and which rows are finite."""
        return state.writing.texts(), state.writing.finite.cpu()


class _Texts:
    """A `Writing` in two steps."""

    def __init__(self, writing: Any) -> None:
        self.writing = writing

    def advance(self, until: int) -> Any:
        return self.writing.read() if until == 1 else self.writing.write()

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None, *, twins: bool = False) -> _Texts:
        return _Texts(self.writing.fork(rows, seeds))
