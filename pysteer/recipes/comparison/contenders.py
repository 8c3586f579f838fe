"""Who takes part in the comparison: methods with their options, the place each is fitted at, and its strengths."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pysteer.errors import InputError
from pysteer.methods import REGISTRY, Method, create
from pysteer.methods.base import did_you_mean
from pysteer.recipes.comparison.places import Place, find_place
from pysteer.recipes.config import Word, convert

NOT_FITTED = ("vector_steering", "channel_steering", "sae_steering")  # to prompts of two classes
_STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
# How each method takes part in `all`: with options under which it does best. Those without an entry have their default
# options, and the visual place. Maps of tokens are fitted on tokens; along one direction of the text only `replace`
# turns the class, since what is added reaches every word, but prototypes of words move the word of the class alone.
_VARIANTS = {
    "affine_transport": ("affine_transport:rank=8", "affine_transport:rank=none"),
    "aura": ("aura:pooled=false",),
    "contrastive_direction": ("contrastive_direction:apply=replace@text",),
    "gated": ("gated:per_token=true",),
    "gaussian_transport": ("gaussian_transport:pooled=false",),
    "linear_act": ("linear_act:pooled=false",),
    "linear_transport": ("linear_transport:pooled=false",),
    "norm_preserving": ("norm_preserving", "norm_preserving:method=prototype@text"),
    "prototype": ("prototype:clusters=256", "prototype:clusters=64@text"),
}
_WORDS = {"rank=none": "full", "pooled=false": "per token", "per_token=true": "per token"}
# A constant shift needs more of it, a direction in the text is replaced beyond the mean of the target.
_OWN_STRENGTHS = {
    "contrastive_direction": (1.0, 1.5, 2.0, 3.0, 4.0),
    "gated": (0.5, 1.0, 1.5, 2.0, 3.0),
    "linear_transport": (0.5, 1.0, 1.5, 2.0, 3.0),
    "mean_difference": (0.5, 1.0, 2.0, 3.0, 4.0),
    "norm_preserving": (0.5, 1.0, 2.0, 3.0, 4.0),
}


def defaults() -> list[str]:
    """Every registered method that prompts are enough for."""
    return [text for name in sorted(REGISTRY) if name not in NOT_FITTED for text in _VARIANTS.get(name, (name,))]


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        text: as it was asked for, `NAME:option=value+option=value@PLACE`.
        method: the method with its options.
        place: where it is fitted.
        strengths: that are searched.
    """

    text: str
    method: Method
    place: Place
    strengths: tuple[float, ...]

    @property
    def key(self) -> str:
        """Its name in files and tables."""
        return re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")

    @property
    def label(self) -> str:
        """Its name for people."""
        given = self.text.partition("@")[0].partition(":")[2]
        options = ", ".join(_WORDS.get(part, part.replace("=", " ").replace("_", " ")) for part in given.split("+"))
        name = self.method.name.replace("_", " ")
        return f"{name} ({options})" if options else name


def find_contenders(
    words: Sequence[str], pipe: Any, attribute: str, strengths: Sequence[float] = ()
) -> list[Contender]:
    """What takes part for classes that differ in `attribute`; `all` stands for `defaults`.

    Args:
        words: `NAME[:option=value+option=value][@PLACE]`; see `find_place` for places.
        pipe: the generator.
        attribute: "shape" or "colour".
        strengths: searched instead of each method's own.

    Raises:
        InputError: an unknown method, option or place, or one asked for twice.
    """
    every = [each for word in words for each in (defaults() if word == "all" else [word])]
    found = [_contender(text, pipe, attribute, tuple(strengths)) for text in every]
    keys = [each.key for each in found]
    for each in found:
        if keys.count(each.key) > 1:
            raise InputError("methods", value=each.text, allowed="each once", fix="drop the double one")
    return found


def _contender(text: str, pipe: Any, attribute: str, strengths: tuple[float, ...]) -> Contender:
    head, at, where = text.partition("@")
    method = method_of(head)
    own = _OWN_STRENGTHS.get(method.name, _STRENGTHS)
    return Contender(text, method, find_place(where if at else "visual", pipe, attribute), strengths or own)


def method_of(text: str) -> Method:
    """The method of `NAME[:option=value+option=value]`.

    Raises:
        InputError: an unknown method or option.
    """
    name, _, given = text.partition(":")
    if name not in REGISTRY:
        allowed = ", ".join(["all", *sorted(REGISTRY)])
        raise InputError("method", value=name, allowed=allowed, fix=did_you_mean(name, REGISTRY))
    hints = typing.get_type_hints(REGISTRY[name])
    options = {}
    for part in filter(None, given.split("+")):
        option, _, value = part.partition("=")
        options[option] = convert(Word(value), hints[option], f"{name}:{option}") if option in hints else value
    return create(name, **options)
