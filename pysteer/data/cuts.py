"""Texts that end where a concept is about to be named: what a model holds there says which word comes next."""

from __future__ import annotations

import dataclasses
import random

from pysteer.data.tasks import Task
from pysteer.errors import InputError
from pysteer.metrics.concepts import word_pattern

_LEAST = 2  # words that are left of a text


def cut_before_words(task: Task, seed: int = 0) -> Task:
    """The task with its texts cut: target texts right before a word of the concept, source texts anywhere.

    A target text gives as many cut ones as it names the concept; there are as many source texts, each cut at a random
    place. Fitted on the last token alone (`method.position=last`) the map is from "any word comes next" to "a word of
    the concept comes next", without the register and the length of the texts.

    Args:
        task: with words.
        seed: of the places where source texts are cut.

    Raises:
        InputError: a task without words, target texts that name none of them after two words, a source text too short.
    """
    if not task.words:
        raise InputError("task.cut", value="a task without words", fix="give task.words=word,word")
    pattern = word_pattern(task.words)
    target = [
        text[: found.start()].rstrip()
        for text in task.target
        for found in pattern.finditer(text)
        if len(text[: found.start()].split()) >= _LEAST
    ]
    if not target:
        raise InputError("target texts with task.cut", value="none with a word of the task", allowed="at least one")
    draw = random.Random(seed)
    source = []
    for i in range(len(target)):
        words = task.source[i % len(task.source)].split()
        if len(words) <= _LEAST:
            raise InputError("source text with task.cut", value=" ".join(words), allowed=f"over {_LEAST} words")
        source.append(" ".join(words[: draw.randint(_LEAST, len(words) - 1)]))
    return dataclasses.replace(task, source=source, target=target, paired=False)
