"""Texts of a language model under steering: generated, scored by the unsteered model, kept, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch

import pysteer
from pysteer import files
from pysteer.metrics.concepts import mentions
from pysteer.metrics.perplexity import Likelihood, continuation_likelihood
from pysteer.metrics.rates import Rate, rate
from pysteer.models.language import LanguageModel
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run
from pysteer.recipes.progress import Advance
from pysteer.recipes.transport.decoder import Request, RowDecoder, in_order
from pysteer.steering import Plan

_PART = 1024  # texts per stage: what an interruption can cost at most


@dataclass(frozen=True)
class Texts:
    """Generated texts, in the order of their requests, and how likely the unsteered model finds them."""

    strengths: list[float]
    prompts: list[str]
    texts: list[str]
    likelihood: Likelihood

    def at(self, strength: float) -> Texts:
        """Those of one strength."""
        kept = [i for i, own in enumerate(self.strengths) if own == strength]
        likelihood = Likelihood(self.likelihood.nats[kept], self.likelihood.tokens[kept])
        return Texts([strength] * len(kept), [self.prompts[i] for i in kept], [self.texts[i] for i in kept], likelihood)


@dataclass(frozen=True)
class Score:
    """What a setting did: how many texts are about the concept, and how much less likely they are.

    Attributes:
        strength: of the steering.
        concept: share of texts that hold a word of the concept, with its interval.
        ratio: perplexity of the texts under the unsteered model over that of its own texts for the same prompts.
        low, high: 95 % interval of the ratio.
        perplexity: itself.
    """

    strength: float
    concept: Rate
    ratio: float
    low: float
    high: float
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for tables."""
        return {
            "strength": self.strength,
            "concept_rate": self.concept.as_dict(),
            "perplexity": self.perplexity,
            "perplexity_ratio": self.ratio,
            "perplexity_ratio_low": self.low,
            "perplexity_ratio_high": self.high,
        }


def scores(texts: Texts, baseline: Texts, words: Sequence[str]) -> list[Score]:
    """A score per strength, ascending; without words the concept rate is not measured."""
    found = []
    for strength in sorted(set(texts.strengths)):
        own = texts.at(strength)
        hits = mentions(own.texts, words) if words else []
        ratio = own.likelihood.perplexity / baseline.likelihood.perplexity
        low, high = own.likelihood.ratio_interval(baseline.likelihood)
        found.append(Score(strength, rate(hits), ratio, low, high, own.likelihood.perplexity))
    return found


def _texts(columns: dict[str, list[Any]]) -> Texts:
    nats = torch.tensor(columns["nats"], dtype=torch.float64)
    likelihood = Likelihood(nats, torch.tensor(columns["tokens"], dtype=torch.int64))
    return Texts(columns["strength"], columns["prompt"], columns["generation"], likelihood)


class Writer:
    """Generates and keeps texts in stages of a run.

    Args:
        run: the run.
        lm: the model.
        decoder: generates.
        model: what tells the weights and their type apart.
        task: what tells the task apart.
    """

    def __init__(self, run: Run, lm: LanguageModel, decoder: RowDecoder, model: Any, task: Any) -> None:
        self.run, self.lm, self.decoder, self.model = run, lm, decoder, model
        self.identity = [model, task]

    def requests(self, prompts: Sequence[str], strengths: Sequence[float], count: int) -> list[tuple[str, Request]]:
        """`count` texts per strength over the prompts in turn, all strengths of a text beside each other.

        Text i has the same random numbers at every strength and for every method.
        """
        ids = [tuple(one) for one in self.lm.token_ids(prompts)]
        found = []
        for i in range(count):
            place, seed = i % len(prompts), self.run.derive_seed("text", i)
            found += [(prompts[place], Request(ids[place], strength, seed)) for strength in strengths]
        return found

    def write(self, key: str, asked: Sequence[tuple[str, Request]], plan: Plan | None, advance: Advance) -> Texts:
        """The texts that were asked for; parts that were finished before are read.

        Args:
            key: names the stage and its files.
            asked: prompts and requests.
            plan: the steering, None for none.
            advance: told every text.
        """
        rows: dict[str, list[Any]] = {name: [] for name in ("strength", "prompt", "generation", "nats", "tokens")}
        for number, start in enumerate(range(0, len(asked), _PART)):
            part, name = asked[start : start + _PART], f"{key}-{number}"
            file = f"generations/{name}.parquet"
            with self.run.stage(name, self.identity, quiet=True) as stage:
                if not stage.done or not self.run.path(file).is_file():
                    self.run.write_parquet(file, self._made(part, plan, advance))
                else:
                    advance(len(part))
            table = pq.read_table(self.run.path(file)).to_pydict()
            for column, values in rows.items():
                values += table[column]
        return _texts(rows)

    def unsteered(self, key: str, asked: Sequence[tuple[str, Request]], advance: Advance) -> Texts:
        """The model's own texts, taken from an earlier run in the same folder of runs where it made the very same."""
        decoder = self.decoder
        how = [decoder.sampling, decoder.max_new_tokens, decoder.rows, sorted(decoder.ends), pysteer.__version__]
        requests = [[request.prompt, request.seed] for _, request in asked]
        mark = config_hash(self.model, how, requests)
        store = self.run.folder.parent / ".unsteered" / f"{mark}.parquet"
        if store.is_file():
            advance(len(asked))
            return _texts(pq.read_table(store).to_pydict())
        made = self.write(key, asked, None, advance)
        columns = {"strength": made.strengths, "prompt": made.prompts, "generation": made.texts}
        counted = {"nats": made.likelihood.nats.tolist(), "tokens": made.likelihood.tokens.tolist()}
        files.write_parquet(store, {**columns, **counted})
        return made

    def _made(self, part: Sequence[tuple[str, Request]], plan: Plan | None, advance: Advance) -> dict[str, list[Any]]:
        made = in_order(self.decoder, [request for _, request in part], plan, done=lambda count: advance())
        tokens = [list(one.tokens) for one in made]
        likelihood = continuation_likelihood(self.lm, [one.request.prompt for one in made], tokens)
        return {
            "strength": [request.strength for _, request in part],
            "prompt": [prompt for prompt, _ in part],
            "generation": self.lm.tokenizer.batch_decode(tokens, skip_special_tokens=True),
            "nats": likelihood.nats.tolist(),
            "tokens": likelihood.tokens.tolist(),
        }
