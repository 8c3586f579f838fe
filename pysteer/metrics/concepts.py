"""Whether texts are about a concept, by its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pysteer.errors import InputError
from pysteer.metrics.rates import Rate, rate


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of `words` as a whole word, in any case, with or without a plural `s` or `es`.

    Raises:
        InputError: no words, or an empty one.
    """
    if isinstance(words, str) or not words or any(not word.strip() for word in words):
        raise InputError("words of a concept", value=words, allowed="a list of at least one word")
    return re.compile(rf"\b(?:{'|'.join(re.escape(word.strip()) for word in words)})(?:e?s)?\b", re.IGNORECASE)


def mentions(texts: Sequence[str], words: Sequence[str]) -> list[bool]:
    """For each text whether it holds one of `words`, see `word_pattern`."""
    pattern = word_pattern(words)
    return [pattern.search(text) is not None for text in texts]


def concept_rate(texts: Sequence[str], words: Sequence[str], confidence: float = 0.95) -> Rate:
    """Share of `texts` that hold one of `words`, with its Wilson interval."""
    return rate(mentions(texts, words), confidence)
