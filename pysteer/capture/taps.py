"""Seeing every activation at a list of sites while a model runs, with its step and its rows; eager only."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.errors import InputError, PysteerError
from pysteer.families.base import Family, find_family
from pysteer.steering.attach import attach
from pysteer.steering.positions import Positions, check_positions, narrowed
from pysteer.steering.site import Site, brief, did_you_mean


@dataclass
class PartRows:
    """Rows of the running batch of one part; `spans` `[R, 2]` holds the valid tokens of each row."""

    cond: int = 0
    uncond: int = 0
    spans: Tensor | None = None
    uncond_first: bool = False

    @property
    def rows(self) -> int:
        return self.cond + self.uncond

    @property
    def cond_rows(self) -> slice:
        """Where the conditional rows are in the batch."""
        first = self.uncond if self.uncond_first else 0
        return slice(first, first + self.cond)

    @property
    def uncond_rows(self) -> slice:
        """Where the unconditional rows are in the batch."""
        first = 0 if self.uncond_first else self.cond
        return slice(first, first + self.uncond)

    @property
    def lengths(self) -> Tensor | None:
        """How many tokens of each row are valid, None for all."""
        return None if self.spans is None else self.spans[:, 1] - self.spans[:, 0]

    def valid_first(self, x: Tensor) -> Tensor:
        """Tokens `[R, L, D]` with the valid ones of each row in front, in order: padding on the left goes last."""
        if self.spans is None or not bool(self.spans[:, 0].any()):
            return x
        places = torch.arange(x.shape[1], device=x.device) + self.spans[:, :1].to(x.device)
        return x.take_along_dim((places % x.shape[1]).unsqueeze(-1), dim=1)


See = Callable[[Site, int, Tensor, PartRows], Tensor]


class _Tap:
    """Attached to one site; passes what it gets to `see` and puts the answer in its place."""

    def __init__(self, site: Site, clock: Callable[[], Tensor], rows: PartRows, see: See) -> None:
        self._site, self._clock, self._rows, self._see = site, clock, rows, see

    def apply(self, x: Tensor) -> Tensor:
        if len(x) != self._rows.rows:
            raise PysteerError(
                f"site {self._site.name} ran with {len(x)} rows, but the run announced {self._rows.rows}; "
                "fix: run the model through its pipeline or its generation function"
            )
        return self._see(self._site, int(self._clock()), x, self._rows)

    def to(self, device: torch.device) -> "_Tap":
        return self


def choose_sites(family: Family, obj: Any, names: str | Iterable[str]) -> list[Site]:
    """Sites by name; a name without its number ("ca_block") stands for all of them, in the model's order.

    Any other name is taken as a regular expression for whole names (`.*layernorm.*`); a place in the model that has
    several names is then taken once.

    Raises:
        InputError: no such site, or one given twice.
    """
    known = family.sites(obj)
    chosen: dict[str, Site] = {}
    for name in [names] if isinstance(names, str) else list(names):
        matches = [name] if name in known else [site for site in known if site.rpartition(".")[0] == name]
        matches = matches or _matching(known, name)
        if not matches:
            raise InputError("unknown site", value=name, allowed=brief(known), fix=did_you_mean(name, known))
        for match in matches:
            if match in chosen:
                raise InputError("site given twice", value=match, fix="name it once")
            chosen[match] = known[match]
    if not chosen:
        raise InputError("sites", value="none", allowed=brief(known))
    return list(chosen.values())


def _matching(known: Mapping[str, Site], pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError("pattern of sites", value=pattern, allowed=f"a regular expression ({error})") from error
    found: dict[tuple[Any, ...], str] = {}
    for name, site in known.items():
        if expression.fullmatch(name):
            found.setdefault((site.part, site.path, site.element), name)
    return list(found.values())


@contextmanager
def tapped(obj: Any, sites: Iterable[Site], see: See, positions: Positions = "all") -> Iterator[None]:
    """While the block runs, every activation at `sites` is replaced by `see(site, step, x, rows)`.

    Args:
        obj: a model or pipeline of a known family.
        sites: where to look.
        see: gets the site, the step of its clock, the activation as the module returned it, and the rows of the batch.
        positions: tokens of each row that count as valid, see `pysteer.steer`.
    """
    check_positions(positions)
    if isinstance(positions, Tensor):
        raise InputError("positions to read", value="a mask", allowed='"all", "last" or a slice')
    family = find_family(obj)
    sites = list(sites)
    states = {site.part: PartRows() for site in sites}

    def on_rows(part: str, cond: int, uncond: int, lengths: Tensor | None, uncond_first: bool = False) -> None:
        if part in states:
            if lengths is not None:
                lengths = narrowed(lengths, positions)
            elif positions != "all":
                raise InputError(
                    f"positions of part {part}", value=positions, allowed="all: its rows have no lengths of their own"
                )
            state = states[part]
            state.cond, state.uncond, state.spans, state.uncond_first = cond, uncond, lengths, uncond_first

    def clock_of(part: str) -> Callable[[], Tensor]:
        return lambda: family.clock(obj, part)  # asked every time: a model moved to another device has another one

    with ExitStack() as stack:
        stack.callback(family.connect(obj, on_rows))
        for part, rows in states.items():
            taps = [(site, _Tap(site, clock_of(part), rows, see)) for site in sites if site.part == part]
            stack.enter_context(attach(family.root(obj, part), taps))
        yield


def refuse_steered(root: nn.Module) -> None:
    """Raise an InputError if something else is attached inside `root`."""
    for name, module in root.named_modules():
        if any(module.__dict__.get(key) for key in ("_steer_fwd", "_steer_call")):
            raise InputError(
                "fit in batches, site after site, of a model that is being steered",
                value=f"something is attached at {name}",
                fix="leave the steering context, or give batch_size room for all prompts",
            )


def as_tokens(x: Tensor, layout: str) -> Tensor:
    """An activation of any layout as `[R, L, D]`."""
    if layout == "rows":
        return x.unsqueeze(1)
    return x.flatten(2).transpose(1, 2) if layout == "channels" else x
