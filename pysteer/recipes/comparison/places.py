"""Where a method is fitted: sites, steps and order, with a default by kind of generator and of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.recipes.grid import parse_subset

FORM = "SITE+SITE/STEPS/once or sequential"
# What patching finds (`pysteer run locate`): in an Infinity transformer colours come in through the cross-attention and
# shapes are drawn by the last two scales, where tokens differ by place and sites feed each other.
_VISUAL = {
    "infinity": {"shape": "ca_block/late/sequential", "colour": "ca/all/once"},
    "diffusers": {"shape": "ca/all/once", "colour": "ca/all/once"},
}


@dataclass(frozen=True)
class Place:
    """Where a method is fitted.

    Attributes:
        sites: kinds of sites or single ones.
        steps: visual steps, None for all.
        sequential: every site is fitted with the earlier ones steered.
    """

    sites: tuple[str, ...]
    steps: tuple[int, ...] | None
    sequential: bool

    @property
    def label(self) -> str:
        """In words, for tables."""
        when = "" if self.steps is None else f", steps {'+'.join(map(str, self.steps))}"
        return "+".join(self.sites) + when + (", sequential" if self.sequential else "")


def find_place(text: str, pipe: Any, attribute: str) -> Place:
    """The place that `text` names for classes that differ in `attribute`.

    Args:
        text: "visual" (the default of the generator), "text" (the output of the text encoder), or sites with the steps
            (all, late for the last two, `3-4`, `0+2`) and the order behind slashes: `ca_block/3-4/sequential`.
        pipe: the generator.
        attribute: "shape" or "colour".

    Raises:
        InputError: sites or steps that the generator does not have.
    """
    family = find_family(pipe)
    if text == "visual":
        known = _VISUAL.get(family.name)
        if known is None:
            raise InputError("visual place", value=family.name, allowed=", ".join(_VISUAL), fix=f"give {FORM}")
        text = known[attribute]
    named, *rest = {"text": "text.output"}.get(text, text).split("/")
    order = rest.pop() if rest and rest[-1] in ("once", "sequential") else "once"
    if len(rest) > 1 or not named:
        raise InputError("place of a method", value=text, allowed=f"visual, text, or {FORM}")
    sites = tuple(named.split("+"))
    chosen = choose_sites(family, pipe, sites)
    steps = None
    if rest and rest[0] != "all":
        count = max(family.steps(pipe, site.part) for site in chosen)
        late = f"{max(0, count - 2)}-{count - 1}"
        steps = parse_subset(late if rest[0] == "late" else rest[0], count, "steps")
        if not steps:
            raise InputError("steps of a place", value=rest[0], allowed=f"some of 0 to {count - 1}")
    return Place(sites, steps, order == "sequential")
