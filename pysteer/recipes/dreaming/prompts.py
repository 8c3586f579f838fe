"""Prompts of the dream recipes: a file of the user's, or captions of the bundled generators with what they state."""

from __future__ import annotations

from dataclasses import dataclass

from pysteer.capture.prompts import read_prompts
from pysteer.errors import InputError
from pysteer.zoo.shapes.captions import Scene, parse_caption, sample_scenes

# Of captions that are drawn: with place, size and background given, what differs is shape and colour.
FIXED = {"size": "large", "position": "center", "background": "gray"}
LABELS = ("shape", "colour")  # of a caption


@dataclass(frozen=True)
class Captions:
    """Texts, a label per text ("" for none), and attribute -> word of every text ("" where it is not stated)."""

    texts: list[str]
    labels: list[str]
    attributes: dict[str, list[str]]


def find_captions(path: str, count: int, seed: int, skip: int = 0, fixed: dict[str, str] | None = None) -> Captions:
    """The prompts of a run.

    Args:
        path: file of prompts, see `pysteer.capture.prompts.read_prompts`; "" draws captions of the shapes task.
        count: how many; 0 for all of the file.
        seed: of captions that are drawn.
        skip: prompts of the file to leave out, where there are more.
        fixed: attributes that all captions that are drawn state, such as `{"background": "gray"}`.

    Raises:
        InputError: a file that cannot be used, or no count for captions that are drawn.
    """
    if not path:
        if count < 1:
            raise InputError("number of captions", value=count, allowed="a whole number above 0")
        scenes = sample_scenes(count, seed, fixed)
        known = {"shape": [scene.shape for scene in scenes], "colour": [scene.colour for scene in scenes]}
        return Captions([scene.caption for scene in scenes], [""] * count, _stated(known, scenes))
    found = read_prompts(path)
    first = skip if skip < len(found.texts) else 0
    chosen = slice(first, first + count if count else None)
    texts, labels = found.texts[chosen], found.labels[chosen]
    return Captions(texts, labels, _attributes(texts, labels))


def _stated(known: dict[str, list[str]], scenes: list[Scene]) -> dict[str, list[str]]:
    """Words that the captions state; what is left open is the generator's choice, so it is no label."""
    return {
        name: [word if name in scene.stated else "" for word, scene in zip(words, scenes, strict=True)]
        for name, words in known.items()
    }


def _attributes(texts: list[str], labels: list[str]) -> dict[str, list[str]]:
    if any(labels):
        return {"label": labels}
    try:
        stated = [parse_caption(text) for text in texts]
    except InputError:
        return {}
    return {name: [each.get(name, "") for each in stated] for name in LABELS}
