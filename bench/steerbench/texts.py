"""SteerBench with a language model: texts that come to a concept, counted by its words, and how readable they stay."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from bench.steerbench.cells import Cell, Sizes
from bench.steerbench.images import rising
from pysteer.capture import Examples
from pysteer.data.tasks import Task, TaskSettings, load_task
from pysteer.errors import InputError
from pysteer.metrics.concepts import mentions
from pysteer.metrics.perplexity import Likelihood, continuation_likelihood
from pysteer.models.language import LanguageModel
from pysteer.recipes.act_text import fast_bfloat16
from pysteer.recipes.comparison.contenders import find_contenders
from pysteer.recipes.comparison.places import Place
from pysteer.recipes.transport.decoder import Request, RowDecoder, in_order
from pysteer.recipes.transport.sampling import Sampling
from pysteer.steering import Plan

READABLE = 1.6  # perplexity, under the unsteered model, of a strength's texts over that of unsteered ones
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
NEW_TOKENS = 32


def distinct(texts: list[str]) -> float:
    """Share of pairs of neighbouring words that occur once: how little the texts repeat each other."""
    pairs = [pair for text in texts for words in [text.lower().split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / max(1, len(pairs))


class TextBench:
    """Measures cells with one language model; the first token is neither fitted nor steered.

    Args:
        lm: the model; in bf16 where that is faster, as in `pysteer run act-text`.
        sizes: how much is measured.
    """

    def __init__(self, lm: LanguageModel, sizes: Sizes) -> None:
        self.lm, self.sizes = lm.to(lm.device, torch.bfloat16) if fast_bfloat16(lm.device.type) else lm, sizes
        sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.0)
        # All rows of a search at once: a matrix product of 120 rows takes a third less time per row than one of 48.
        self.decoder = RowDecoder(self.lm, rows=128, max_new_tokens=NEW_TOKENS, sampling=sampling, skip=1)
        self.known: dict[tuple[str, int, bool], tuple[list[str], Likelihood]] = {}
        self.examples: dict[tuple[str, int, Place], Examples] = {}

    def _write(self, prompts: list[str], levels: tuple[float, ...], plan: Plan | None, count: int, seed: int) -> Any:
        """Texts and their likelihood under the unsteered model, level by level."""
        ids = [tuple(one) for one in self.lm.token_ids(prompts)]
        asked = [
            Request(ids[i % len(ids)], level, 10_000 * seed + i) for level in levels for i in range(count)
        ]  # fmt: skip
        made = in_order(self.decoder, asked, plan, done=lambda n: None)
        tokens = [list(one.tokens) for one in made]
        likelihood = continuation_likelihood(self.lm, [request.prompt for request in asked], tokens)
        return self.lm.tokenizer.batch_decode(tokens, skip_special_tokens=True), likelihood

    def _base(self, cell: Cell, task: Task, search: bool) -> tuple[list[str], Likelihood]:
        key = (cell.concept, cell.seed, search)
        if key not in self.known:
            prompts, count = self._asked(task, search)
            self.known[key] = self._write(prompts, (0.0,), None, count, cell.seed)
        return self.known[key]

    def _asked(self, task: Task, search: bool) -> tuple[list[str], int]:
        return (task.search_prompts, self.sizes.search) if search else (task.prompts, self.sizes.prompts)

    def _examples(self, cell: Cell, place: Place, task: Task) -> Examples:
        """The texts of a concept in an order of the seed, run once for all the cells that are fitted on them."""
        key = (cell.concept, cell.seed, place)
        if key not in self.examples:
            sides = [
                random.Random(f"{cell.seed} {side}").sample(side, len(side)) for side in (task.source, task.target)
            ]
            self.examples = {key: Examples(
                self.lm, *sides, sites=place.sites, paired=False, positions=slice(1, None), batch_size=32,
            )}  # fmt: skip
        return self.examples[key]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything about a cell; lists have an entry per text."""
        task = load_task(TaskSettings(name=cell.concept), cell.seed)
        contender = find_contenders([cell.method], self.lm, "", STRENGTHS)[0]
        try:
            fitted = self._examples(cell, contender.place, task).fit(
                contender.method, first=cell.pairs, fit_seed=cell.seed,
                control="shuffled" if cell.control == "shuffled" else None,
            )  # fmt: skip
            plan = (fitted.random_direction(cell.seed) if cell.control == "random" else fitted).plan()
        except InputError as error:  # some methods have no such control
            return {"left_out": str(error)}
        doses = self._doses(cell, task, plan)
        readable = [dose for dose in doses if dose["perplexity"] <= READABLE]
        chosen = (
            max(readable, key=lambda dose: dose["target"]) if readable else min(doses, key=lambda d: d["perplexity"])
        )
        prompts, number = self._asked(task, False)
        texts, likelihood = self._write(prompts, (chosen["strength"],), plan, number, cell.seed)
        before, base = self._base(cell, task, False)
        return {
            "strength": chosen["strength"],
            "dtype": str(next(self.lm.model.parameters()).dtype).removeprefix("torch."),
            "place": contender.place.label,
            "doses": doses,
            "monotone": rising([dose["target"] for dose in doses]),
            "target": mentions(texts, task.words),
            "target_unsteered": mentions(before, task.words),
            "perplexity": likelihood.perplexity / base.perplexity,
            "diversity": distinct(texts) / distinct(before),
        }

    def _doses(self, cell: Cell, task: Task, plan: Plan) -> list[dict[str, float]]:
        prompts, count = self._asked(task, True)
        texts, likelihood = self._write(prompts, STRENGTHS, plan, count, cell.seed)
        _, base = self._base(cell, task, True)
        found = []
        for i, strength in enumerate(STRENGTHS):
            part = slice(i * count, (i + 1) * count)
            own = Likelihood(likelihood.nats[part], likelihood.tokens[part])
            reached = mentions(texts[part], task.words)
            found.append({
                "strength": strength, "target": sum(reached) / count, "perplexity": own.perplexity / base.perplexity,
            })  # fmt: skip
        return found
