"""A place in a model where an activation is changed or read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pysteer.errors import InputError, did_you_mean

__all__ = ["LAYOUTS", "Site", "brief", "did_you_mean"]

LAYOUTS = ("tokens", "rows", "channels")
_SHOWN = 30  # names in an error message


@dataclass(frozen=True)
class Site:
    """A place in a model where an activation is changed or read.

    Attributes:
        name: the name users write, for example "ffn.3".
        path: module path from the root that the family gives for `part`; "" is the root itself.
        part: the part of the model that shares a clock and a row order, for example "visual" or "text".
        element: which element of the module's output it is: None for a plain tensor, an index into a tuple or a list,
            a key or an index of a dict-like output. 0 also takes a plain tensor, for modules that return either.
        layout: "tokens" `[R, L, D]`, "rows" `[R, D]` or "channels" `[R, D, *spatial]`.
        width: D; 0 when it is not known before the model runs.
    """

    name: str
    path: str
    part: str = "visual"
    element: int | str | None = None
    layout: str = "tokens"
    width: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"layout of site {self.name}", value=self.layout, allowed=", ".join(LAYOUTS))


def brief(names: Iterable[str]) -> str:
    """Site names in one short line: numbered ones as a range, `ffn.0..5, ca.0..5, pooled`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = re.fullmatch(r"(.*\.)(\d+)", name)
        numbers.setdefault(match[1] if match else name, []).extend([int(match[2])] if match else [])
    pieces = []
    for stem, found in numbers.items():
        found.sort()
        whole = bool(found) and found == list(range(found[0], found[-1] + 1)) and len(found) > 1
        pieces += [f"{stem}{found[0]}..{found[-1]}"] if whole else [f"{stem}{n}" for n in found] or [stem]
    shown = pieces[:_SHOWN] + ([f"and {len(pieces) - _SHOWN} more"] if len(pieces) > _SHOWN else [])
    return ", ".join(shown)
