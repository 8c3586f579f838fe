"""What steering needs to know about a kind of model.

A family is a module of this package that ends in `register(MyFamily())`. The modules are imported when a family is
first looked for, and must not import the library of their models: `matches` can go by class and module names.
"""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.steering.site import Site


class OnRows(Protocol):
    """Who is told about the rows of a run: of every part, or only of those in `parts` if it has that."""

    def __call__(self, part: str, cond: int, uncond: int, lengths: Tensor | None, uncond_first: bool = False) -> None:
        """See `Family.connect`."""


class Family(ABC):
    """A kind of model: its sites, its row order and its clock. Parts ("visual", "text") have a clock and rows each."""

    name: str
    capacity: int = 1  # rows that a table has room for from the start
    announced: bool = True  # False: tables are filled before any run, since a compiled run cannot announce its rows

    @abstractmethod
    def matches(self, obj: Any) -> bool:
        """Whether `obj`, a model or a pipeline, is of this kind; must be quick and must not raise."""

    @abstractmethod
    def sites(self, obj: Any) -> dict[str, Site]:
        """All sites of `obj` by name."""

    @abstractmethod
    def root(self, obj: Any, part: str) -> nn.Module:
        """The module that the paths of the sites of `part` start from."""

    @abstractmethod
    def steps(self, obj: Any, part: str) -> int:
        """How many steps the clock of `part` counts: scales, diffusion steps or 1."""

    def room(self, obj: Any, part: str) -> int:
        """How many steps a plan may name; more than `steps` where every run has a number of its own."""
        return self.steps(obj, part)

    @abstractmethod
    def clock(self, obj: Any, part: str) -> Tensor:
        """The clock of `part`: int64, 0-dim, on the device of the part, filled with the step before each step."""

    @abstractmethod
    def connect(self, obj: Any, on_rows: OnRows) -> Callable[[], None]:
        """Have `on_rows(part, cond, uncond, lengths, uncond_first)` called when a run of a part starts.

        The rows of the batch are `[cond rows | uncond rows]`, or `[uncond rows | cond rows]` with `uncond_first`, which
        is False where it is left out; one of the counts is zero or both are equal. `lengths`,
        int `[cond + uncond]`, says how many tokens of each row count, or `[cond + uncond, 2]` the first one and the one
        behind the last; None for all tokens. Returns a function that disconnects.
        """

    def lasting(self, obj: Any, part: str) -> bool:
        """Whether what is fitted at step 0 of `part` serves all its steps."""
        return False

    def once(self, obj: Any, site: Site) -> bool:
        """Whether what counts at a site is its first step: texts, and vectors that are computed once per run."""
        return site.part == "text" or site.layout == "rows"


_FAMILIES: list[Family] = []


def register(family: Family) -> Family:
    """Make a family known; one of the same name is replaced."""
    _FAMILIES[:] = [known for known in _FAMILIES if known.name != family.name]
    _FAMILIES.insert(0, family)
    return family


def find_family(obj: Any) -> Family:
    """The family that `obj`, a model or a pipeline, belongs to; the one registered last is asked first.

    Raises:
        InputError: no family knows it.
    """
    package = import_module("pysteer.families")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"pysteer.families.{module.name}")
    for family in _FAMILIES:
        if family.matches(obj):
            return family
    raise InputError(
        "no family knows this model",
        value=type(obj).__name__,
        allowed=", ".join(sorted(family.name for family in _FAMILIES)),
        fix="pass the model or pipeline object, or register a Family for it",
    )
