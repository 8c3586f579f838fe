"""Drawing the next token of every row from random numbers of its own: temperature, nucleus, repetition penalty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysteer.errors import InputError

_FEW = 64  # tokens that are tried as a nucleus before all are sorted
_LEAST = (2.0**-12, 2.0**-15, 0.0)  # probabilities above which a nucleus is looked for, one after the other


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


def nucleus(chances: Tensor, top_p: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The nuclei of all rows: rows whose nuclei are about as large, their tokens and the probabilities of these.

    The nucleus is the smallest set of likeliest tokens with probability `top_p` or more (Holtzman et al. 2020); its
    probabilities are not scaled up to 1.

    Args:
        chances: probabilities of all tokens, fp32 `[R, V]`.
        top_p: in (0, 1].

    Yields:
        Rows int64 `[r]`, their tokens int64 `[r, k]` by falling probability, and the probabilities fp32 `[r, k]`, 0
        outside the nucleus. Every row comes once.
    """
    rows = torch.arange(len(chances), device=chances.device)
    if chances.shape[1] > _FEW:
        tokens, some = _likeliest(chances, _FEW)
        upto = some.cumsum(1)
        full = upto[:, -1] >= top_p
        inside = torch.where(upto - some < top_p, some, 0.0)
        if bool(full.all()):
            yield rows, tokens, inside
            return
        yield rows[full], tokens[full], inside[full]
        rows, chances = rows[~full], chances[~full]
    if chances.device.type == "cpu":
        for row, own in zip(rows, chances, strict=True):
            yield row[None], *_sorted(own, top_p)
        return
    some, tokens = chances.sort(dim=1, descending=True)
    yield rows, tokens, torch.where(some.cumsum(1) - some < top_p, some, 0.0)


def _sorted(chances: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The nucleus of one row `[V]` on a CPU: tokens and probabilities `[1, k]`, likeliest first.

    Of equal probabilities that of the first token comes first.
    """
    # One number holds a probability, whose bits are ordered as it is, and the token. NumPy sorts such numbers with
    # vector instructions where there are some, ten times as fast as a sort that has to carry the tokens along. A
    # nucleus is mostly among the tokens above a small probability, of which there are few.
    every, size = chances.numpy(), len(chances)
    for least in _LEAST:
        tokens = np.flatnonzero(every >= least) if least else np.arange(size)  # all: there may be NaN
        keys = np.sort((every[tokens].view(np.int32).astype(np.int64) << 32) | (size - 1 - tokens))[::-1]
        falling = (keys >> 32).astype(np.int32).view(np.float32)
        upto = falling.cumsum()
        if least == 0 or (len(upto) and upto[-1] >= top_p):
            break
    count = min(size, int(np.searchsorted(upto, top_p)) + 1)
    found = size - 1 - (keys[:count] & 0xFFFFFFFF)
    return torch.from_numpy(found)[None], torch.from_numpy(falling[:count].copy())[None]


def _likeliest(chances: Tensor, count: int, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens `[R, count]` and their probabilities, likeliest first.

    They lie in the `count` chunks with the largest maxima: finding those costs one pass, where a selection among all
    tokens costs many.
    """
    rows, size = chances.shape
    chunk = min(chunk, max(1, size // (4 * count)))
    if chunk < 4:
        values, tokens = chances.topk(count, dim=1)
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
    drawn = logits.new_empty(len(logits), dtype=torch.int64)
    for rows, tokens, chances in nucleus(logits.softmax(1), sampling.top_p):
        upto = chances.cumsum(1)
        wanted = numbers[rows, None] * upto[:, -1:]
        place = torch.searchsorted(upto, wanted, right=True)
        # Rounding may point behind the last token of the nucleus; that token is meant then.
        last = ((chances > 0).sum(1, keepdim=True) - 1).clamp_min(0)  # a row of NaN has no token of any probability
        drawn[rows] = tokens.gather(1, torch.minimum(place, last))[:, 0]
    return drawn
