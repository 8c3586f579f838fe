"""Names of sites as the published configurations write them: regular expressions with an element of the output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pysteer.errors import InputError
from pysteer.steering.site import Site, brief

# Names of the parts of a pipeline in front of a module path, as `named_modules` of a whole pipeline would show them.
_ROOTS = {
    "unet": "visual",
    "transformer": "visual",
    "text_encoder": "text",
    "text_encoder_2": "text_2",
    "text_encoder_3": "text_3",
    "vae": "vae",
}


def expand_sites(known: Mapping[str, Site], patterns: Sequence[str]) -> list[str]:
    """The names of all sites that patterns mean, each once and in the order of the model.

    A pattern is a short name (`block.18`), a kind (`mlp`) or a regular expression for whole names or module paths. It
    may begin with the name of a part of a pipeline (`unet.`, `transformer.`, `text_encoder.`, `vae.`) and end in
    `:element`, which is a regular expression too: `transformer.transformer_blocks.[0-9]+:[0-1]` means both outputs of
    every double block.

    Raises:
        InputError: a pattern that matches nothing or is no regular expression.
    """
    chosen: set[str] = set()
    places: set[tuple[str, str, object]] = set()
    for pattern in patterns:
        found = _matching(known, pattern.strip())
        if not found:
            raise InputError("sites", value=pattern, allowed=brief(known), fix="list them with pysteer locate --sites")
        for name in found:
            site = known[name]
            place = (site.part, site.path, site.element or 0)
            if place not in places:  # a place may have several names
                places.add(place)
                chosen.add(name)
    return [name for name in known if name in chosen]


def _matching(known: Mapping[str, Site], pattern: str) -> list[str]:
    if pattern in known:
        return [pattern]
    kind = [name for name in known if name.rpartition(".")[0] == pattern]
    if kind:
        return kind
    path, _, element = pattern.rpartition(":") if re.search(r":[\[\]0-9|()-]+$", pattern) else (pattern, "", "")
    try:
        wanted, which = re.compile(path), re.compile(element or ".*")
    except re.error as error:
        raise InputError("pattern of sites", value=pattern, allowed=f"a regular expression ({error})") from error
    found = []
    for name, site in known.items():
        names = [name, site.path, *(f"{root}.{site.path}" for root, part in _ROOTS.items() if part == site.part)]
        if any(wanted.fullmatch(each) for each in names) and which.fullmatch(str(site.element or 0)):
            found.append(name)
    return found
