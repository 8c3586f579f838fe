"""A chat model as the writer of sentences."""

from __future__ import annotations

from collections.abc import Callable

from pysteer.models.language import LanguageModel
from pysteer.recipes.transport.decoder import Request, RowDecoder, in_order
from pysteer.recipes.transport.sampling import Sampling


def chat_writer(
    lm: LanguageModel, *, max_new_tokens: int = 40, rows: int = 64, top_p: float = 0.9
) -> Callable[..., list[str]]:
    """`f(questions, seed)` that has a chat model answer, sampling at temperature 1."""
    decoder = RowDecoder(lm, rows=rows, max_new_tokens=max_new_tokens, sampling=Sampling(1.0, top_p, 1.0))

    def generate(questions: list[str], seed: int) -> list[str]:
        ids = lm.token_ids([lm.chat(question) for question in questions])
        made = in_order(decoder, [Request(tuple(one), seed=seed * 100_003 + i) for i, one in enumerate(ids)])
        texts: list[str] = lm.tokenizer.batch_decode([list(one.tokens) for one in made], skip_special_tokens=True)
        return texts

    return generate
