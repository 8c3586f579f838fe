"""Concepts that ship: words that tell whether a text is about one, and sentences with and without it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.methods.base import did_you_mean

FOLDER = Path(__file__).parent / "concepts"


@dataclass(frozen=True)
class Concept:
    """A concept by its words.

    Attributes:
        name: its name.
        topics: what sentences about it are asked for ("Write one sentence about ...").
        words: a text that holds one of them, in any case and with a plural s, counts as being about the concept.
    """

    name: str
    topics: tuple[str, ...]
    words: tuple[str, ...]


@functools.cache
def _known() -> dict[str, Any]:
    known: dict[str, Any] = files.read_json(FOLDER / "words.json", "words of the concepts")
    return known


def concept_names() -> tuple[str, ...]:
    """The concepts that ship."""
    return tuple(_known())


def concept(name: str) -> Concept:
    """A concept that ships.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _known():
        allowed = ", ".join(concept_names())
        fix = did_you_mean(name, concept_names()) or "give a file of sentences"
        raise InputError("concept", value=name, allowed=allowed, fix=fix)
    entry = _known()[name]
    return Concept(name, tuple(entry["topics"]), tuple(entry["words"]))


def openings(use: str) -> list[str]:
    """Neutral beginnings of texts: those for "search" and those for "report" have none in common."""
    found: dict[str, list[str]] = files.read_json(FOLDER / "openings.json", "openings")
    if use not in found:
        raise InputError("openings", value=use, allowed=", ".join(found))
    return list(found[use])


def concept_sentences(name: str) -> tuple[list[str], list[str]]:
    """Neutral sentences and sentences about the concept, 64 of each, written for this package.

    Raises:
        InputError: there is no such concept.
    """
    concept(name)
    neutral = files.read_json(FOLDER / "neutral.json", "neutral sentences")["sentences"]
    about = files.read_json(FOLDER / f"{name}.json", "sentences of a concept")["sentences"]
    return list(neutral), list(about)
