"""Sentences about a topic written by a chat model itself, where there is no data set of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pysteer.errors import InputError

# What a neutral sentence is about: many everyday subjects, so that their mean stands for none of them.
NEUTRAL_TOPICS = (
    "a house", "a train", "a neighbour", "a book", "a school", "a street", "an old friend", "a letter", "a window",
    "a meeting", "a key", "a journey", "the office", "a bridge", "a phone call", "a garden", "a teacher", "a map",
    "a photograph", "a secret", "an idea", "a computer", "a doctor", "a museum", "a chair", "a river", "money",
    "a village", "a dream", "a mistake", "a question", "a coat", "the past", "a clock", "a family", "a shop",
    "history", "a painting", "a lamp", "a newspaper",
)  # fmt: skip
REQUESTS = (
    "Write one sentence about {}.",
    "Write the first sentence of a story about {}.",
    "Tell me in one sentence something that happened with {}.",
    "Write a short sentence from a diary about {}.",
    "Write a sentence that someone might say about {}.",
)


def first_sentence(answer: str) -> str:
    """The first sentence of an answer, without quotation marks around it; empty when it is not a plain sentence."""
    text = answer.strip().split("\n")[0].strip().strip("\"'*`").strip()
    found = re.match(r"(.+?[.!?])(?=\s|\"|'|$)", text)
    sentence = found[1].strip("\"' ") if found else ""
    words = sentence.split()
    plain = 5 <= len(words) <= 40 and re.match(r"[A-Z]", sentence) and not re.search(r"[:*#\[\]{}<>]", sentence)
    return sentence if plain else ""


def write_sentences(
    generate: Callable[[list[str], int], list[str]],
    topics: Sequence[str],
    count: int,
    *,
    accept: Callable[[str], bool] = bool,
    seed: int = 0,
    batch: int = 128,
    rounds: int = 20,
) -> list[str]:
    """`count` different sentences.

    Args:
        generate: `f(questions, seed)` gives an answer per question.
        topics: what the sentences are about, in turn.
        count: how many.
        accept: keeps a sentence, for example only one that holds a word of the concept.
        seed: of the first round.
        batch: questions per round.
        rounds: the most rounds.

    Raises:
        InputError: too few answers were sentences that could be accepted.
    """
    questions = [request.format(topic) for request in REQUESTS for topic in topics]
    found: dict[str, None] = {}
    for turn in range(rounds):
        asked = [questions[(turn * batch + i) % len(questions)] for i in range(batch)]
        for sentence in map(first_sentence, generate(asked, seed + turn)):
            if sentence and accept(sentence):
                found.setdefault(sentence)
        if len(found) >= count:
            return list(found)[:count]
    fix = "other topics, or a model that follows instructions"
    raise InputError("sentences", value=f"{len(found)} in {rounds * batch} answers", allowed=f"{count}", fix=fix)
