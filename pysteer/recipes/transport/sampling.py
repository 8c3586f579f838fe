"""Drawing the next token of every row from random numbers of its own: temperature, nucleus, repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError

_KEPT = (64, 1024)  # tokens that are tried as a nucleus before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: the smallest set of tokens with this probability is drawn from, in (0, 1].
        repetition_penalty: logits of tokens that the row holds already are divided by it where positive and multiplied
            where negative (Keskar et al. 2019); 1 for none.
    """

    temperature: float = 1.0
    top_p: float = 0.3
    repetition_penalty: float = 1.2

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise InputError("temperature", value=self.temperature, allowed="0 to 100")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", value=self.top_p, allowed="above 0, at most 1")
        if not 0 < self.repetition_penalty <= 100:
            raise InputError("repetition_penalty", value=self.repetition_penalty, allowed="above 0, at most 100")


def penalise_(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Make the tokens `held` `[R, n]` less likely, in place in `logits` `[R, V]` fp32; repeats in `held` count once."""
    if penalty == 1:
        return logits
    found = logits.gather(1, held)
    return logits.scatter_(1, held, torch.where(found > 0, found / penalty, found * penalty))


def nucleus(chances: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens `[R, k]` of every row by falling probability, and their probabilities, 0 outside the nucleus.

    The nucleus is the smallest set of likeliest tokens with probability `top_p` or more (Holtzman et al. 2020); its
    probabilities are not scaled up to 1. k is as large as the largest nucleus needs.

    Args:
        chances: probabilities of all tokens, fp32 `[R, V]`.
        top_p: in (0, 1].
    """
    rows, size = chances.shape
    tokens, kept = chances.new_zeros(rows, 0, dtype=torch.int64), chances.new_zeros(rows, 0)
    open_rows = torch.arange(rows, device=chances.device)
    for count in (*_KEPT, size):
        if count > size or len(open_rows) == 0:
            continue
        inside = chances if len(open_rows) == rows else chances[open_rows]
        found, some = _likeliest(inside, count)
        tokens, kept = (torch.nn.functional.pad(x, (0, count - x.shape[1])) for x in (tokens, kept))
        tokens[open_rows], kept[open_rows] = found, some
        open_rows = open_rows[some.sum(1) < top_p]
    before = kept.cumsum(1) - kept
    return tokens, torch.where(before < top_p, kept, 0.0)


def _likeliest(chances: Tensor, count: int, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens `[R, count]` and their probabilities, likeliest first.

    They lie in the `count` chunks with the largest maxima: finding those costs one pass, where a selection among all
    tokens costs many.
    """
    rows, size = chances.shape
    chunk = min(chunk, max(1, size // (4 * count)))
    if chunk < 4:
        values, tokens = chances.topk(count, dim=1) if count < size else chances.sort(dim=1, descending=True)
        return tokens, values
    padded = torch.nn.functional.pad(chances, (0, -size % chunk)) if size % chunk else chances
    padded = padded.view(rows, -1, chunk)
    chunks = padded.amax(2).topk(count, dim=1).indices
    inside = padded.gather(1, chunks[..., None].expand(-1, -1, chunk)).flatten(1)
    values, place = inside.topk(count, dim=1)
    tokens = chunks.gather(1, place // chunk) * chunk + place % chunk
    return tokens.clamp_max(size - 1), values


def draw(logits: Tensor, held: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """The next token of every row, int64 `[R]`.

    Args:
        logits: `[R, V]`, any floating dtype; computed in fp32.
        held: tokens each row holds already, int64 `[R, n]`.
        numbers: uniform in [0, 1), fp32 `[R]`: the same logits and number give the same token, whatever the other rows.
        sampling: how.
    """
    logits = penalise_(logits.to(torch.float32, copy=True), held, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(1)
    if sampling.temperature != 1:
        logits /= sampling.temperature
    tokens, chances = nucleus(logits.softmax(1), sampling.top_p)
    upto = chances.cumsum(1)
    wanted = numbers[:, None] * upto[:, -1:]
    place = torch.searchsorted(upto, wanted, right=True)
    # Rounding may point behind the last token of the nucleus; that token is meant then.
    last = (chances > 0).sum(1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last))[:, 0]
