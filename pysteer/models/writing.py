"""A text being written by a language model, which can fork after the prompts are read."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.models.infinity.sampling import row_uniform

if TYPE_CHECKING:
    from pysteer.models.language import LanguageModel


class Writing:
    """Texts that continue prompts: `read()` runs the prompts, `fork(rows, seeds)` makes rows that go on from one
    prompt's cache, `write()` adds tokens. Made by `LanguageModel.begin`.

    A token is drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the largest of `logit / temperature -
    log(-log u)`, with `u` from a counter-based stream of (row seed, position, token), so that a text does not depend on
    what else is in the batch. Temperature 0 takes the likeliest token.

    Args:
        lm: the model with its tokenizer.
        prompts: B texts.
        seeds: one per prompt.
        max_new_tokens: at most so many tokens are added; a row ends earlier with an end token.
        temperature: 0 for greedy.
        top_p: the smallest set of tokens that holds this much probability is drawn from.

    Attributes:
        tokens: int64 `[B, n]`, what was written so far.
        finite: bool `[B]`, false for a row whose logits were NaN or infinite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            given = f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}"
            raise InputError(
                "how to write", value=given, allowed="at least 1 token, temperature from 0, 0 < top_p <= 1"
            )
        if len(seeds) != len(prompts):
            raise InputError("seeds", value=len(seeds), allowed=f"{len(prompts)} numbers (one per prompt)")
        self.lm, self.most, self.temperature, self.top_p = lm, max_new_tokens, temperature, top_p
        batch = lm.tokenize(prompts)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=lm.device)
        self.finite = torch.ones(len(self.ids), dtype=torch.bool, device=lm.device)
        self.tokens = self.ids.new_empty(len(self.ids), 0)
        self.ended = torch.zeros_like(self.finite)
        self.cache: Any = None
        self.logits: Tensor | None = None
        known = inspect.signature(type(lm.model).forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in known else "cache"
        self._places = "position_ids" in known
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        ends = getattr(lm.model.generation_config, "eos_token_id", None)
        self._ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=lm.device)

    def __len__(self) -> int:
        return len(self.ids)

    @torch.no_grad()
    def _run(self, ids: Tensor) -> None:
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "use_cache": True, **self._only_last}
        if self._places:
            places = (self.mask.cumsum(-1) - 1).clamp_min(0)
            given["position_ids"] = places[:, -ids.shape[1] :]
        if self.cache is not None:
            given[self._cache_name] = self.cache
        out = self.lm.model(**given)
        self.cache = getattr(out, self._cache_name)
        self.logits = out.logits[:, -1].float()
        self.finite &= torch.isfinite(self.logits.sum(1)) | self.ended

    def read(self) -> Writing:
        """Run the prompts, once."""
        if self.logits is None:
            self._run(self.ids)
        return self

    @torch.no_grad()
    def write(self) -> Writing:
        """Add tokens until every row has ended or has `max_new_tokens`."""
        self.read()
        while self.tokens.shape[1] < self.most:
            chosen = torch.where(self.ended, self.lm.tokenizer.pad_token_id, self._choose())
            self.tokens = torch.cat((self.tokens, chosen[:, None]), 1)
            self.ended = self.ended | torch.isin(chosen, self._ends)
            if bool(self.ended.all()) or self.tokens.shape[1] == self.most:
                break
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), 1)
            self._run(chosen[:, None])
        return self

    def _choose(self) -> Tensor:
        assert self.logits is not None
        if self.temperature == 0:
            return self.logits.argmax(-1)
        logits = self.logits / self.temperature
        if self.top_p < 1:
            order = logits.sort(-1, descending=True)
            before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
            logits = logits.masked_fill(
                torch.zeros_like(before, dtype=torch.bool).scatter(1, order.indices, before >= self.top_p), -torch.inf
            )
        uniform = row_uniform(self.seeds, self.tokens.shape[1], logits.shape[1])
        # The middle of each of the 2^24 values: neither end would have a finite Gumbel number.
        return (logits - (-(uniform + 2.0**-25).log()).log()).argmax(-1)

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None) -> Writing:
        """Texts of `len(rows)` rows, number i going on from row `rows[i]` (int64 `[N]`), with seeds of their own."""
        forked: Writing = object.__new__(Writing)
        forked.__dict__.update(self.__dict__)
        rows = rows.to(self.ids.device)
        for name in ("ids", "mask", "finite", "tokens", "ended", "seeds"):
            setattr(forked, name, getattr(self, name)[rows])
        if seeds is not None:
            forked.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=self.ids.device)
        if self.logits is not None:
            import copy

            forked.logits = self.logits[rows]
            forked.cache = copy.deepcopy(self.cache)
            forked.cache.reorder_cache(rows)
        return forked

    def texts(self) -> list[str]:
        """The new text of every row, without special tokens."""
        found: list[str] = self.lm.tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        return found
