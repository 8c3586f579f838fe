"""How likely generated texts are to a language model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError

_LOGITS = 24_000_000  # numbers held at a time: 96 MB in fp32


@dataclass(frozen=True)
class Likelihood:
    """Sum of -log p in nats and number of tokens, per text: fp64 `[N]` and int64 `[N]`."""

    nats: Tensor
    tokens: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p over all tokens of all texts; NaN without tokens."""
        count = int(self.tokens.sum())
        return math.exp(min(float(self.nats.sum()) / count, 700.0)) if count else math.nan

    def ratio_interval(self, baseline: Likelihood, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """95 % interval of `perplexity / baseline.perplexity`: texts of both sides drawn anew, `draws` times.

        Raises:
            InputError: one side has no tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        logs = []
        for side in (self, baseline):
            if not int(side.tokens.sum()):
                raise InputError("perplexity", value="no tokens", allowed="texts with at least one token")
            count = len(side.tokens)
            counts = torch.zeros(draws, count, dtype=torch.float64)
            picks = torch.randint(count, (draws, count), generator=generator)
            counts.scatter_add_(1, picks, torch.ones(draws, count, dtype=torch.float64))
            logs.append((counts @ side.nats) / (counts @ side.tokens.double()).clamp_min(1))
        ratio = (logs[0] - logs[1]).exp()
        low, high = torch.quantile(ratio, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


@torch.no_grad()
def continuation_likelihood(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    done: Callable[[int], object] | None = None,
) -> Likelihood:
    """-log p of the tokens of every continuation after its prompt, under the model as it is now.

    Args:
        lm: a `LanguageModel`; unsteered where the perplexity under the unsteered model is meant.
        prompts: token ids, at least one each.
        continuations: token ids; an empty one counts no tokens.
        batch_size: texts per run of the model; fewer where the logits would take more than 100 MB.
        done: called with the number of texts so far.

    Raises:
        InputError: numbers of prompts and continuations differ, an empty prompt.
    """
    if len(prompts) != len(continuations) or any(not len(prompt) for prompt in prompts):
        value = f"{len(prompts)} and {len(continuations)}"
        raise InputError("prompts and continuations", value=value, allowed="as many of each, no empty prompt")
    nats = torch.zeros(len(prompts), dtype=torch.float64)
    counts = torch.tensor([len(continuation) for continuation in continuations], dtype=torch.int64)
    # Texts of about the same length together: little is padded.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(continuations[i]))
    start = 0
    while start < len(order):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[i]) + len(continuations[i]) for i in chosen)
        chosen = chosen[: max(1, _LOGITS // (longest * lm.model.config.get_text_config().vocab_size))]
        nats[chosen] = _sums(lm, [prompts[i] for i in chosen], [continuations[i] for i in chosen])
        start += len(chosen)
        if done is not None:
            done(start)
    return Likelihood(nats, counts)


def _sums(lm: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> Tensor:
    """Sums of -log p over each continuation, fp64 `[B]`."""
    texts = [[*prompt, *new] for prompt, new in zip(prompts, continuations, strict=True)]
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):  # padded behind, which a causal model does not see
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    first = min(map(len, prompts)) - 1  # no logits are needed before the first continuation begins
    given: dict[str, Any] = {"attention_mask": mask.to(lm.device)}
    if "logits_to_keep" in inspect.signature(type(lm.model).forward).parameters:
        given["logits_to_keep"] = longest - first
    logits = lm.model(ids.to(lm.device), use_cache=False, **given).logits[:, -(longest - first) : -1]
    following = ids[:, first + 1 :].to(lm.device)
    place = torch.arange(first + 1, longest)
    lengths = torch.tensor([[len(prompt), len(text)] for prompt, text in zip(prompts, texts, strict=True)])
    counted = (place >= lengths[:, :1]) & (place < lengths[:, 1:])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none")
    return (loss.view(following.shape).cpu().double() * counted).sum(1)
