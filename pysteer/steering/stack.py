"""Plans of several prompts laid together: entries that agree in kind share a table, whatever else they differ in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pysteer.errors import InputError
from pysteer.steering.plan import Plan, PlanEntry, SiteParameters


@dataclass(frozen=True)
class Stack:
    """What one table does.

    Attributes:
        entries: one entry that all prompts share, or one per prompt, None where the plan of a prompt has nothing here.
            All of them have the site, op, options and shapes of `first`.
    """

    entries: tuple[PlanEntry | None, ...]

    @property
    def first(self) -> SiteParameters:
        """Parameters that stand for those of all entries."""
        return next(entry for entry in self.entries if entry is not None).parameters

    @property
    def shared(self) -> bool:
        """Whether one entry serves all prompts."""
        return len(self.entries) == 1

    @property
    def parameters(self) -> list[SiteParameters]:
        """The different parameters, each once: prompts with the same ones share their sets in the bank."""
        return list({id(e.parameters): e.parameters for e in self.entries if e is not None}.values())

    @property
    def sets(self) -> int:
        """How many parameter sets the bank holds."""
        return sum(parameters.sets for parameters in self.parameters)

    @property
    def active(self) -> bool:
        """Whether anything is to happen at all."""
        return any(entry is not None and entry.active for entry in self.entries)

    def off(self) -> "Stack":
        """The same with every strength 0."""
        return Stack((PlanEntry(self.first, {}),))


def kind_of(parameters: SiteParameters) -> tuple[Any, ...]:
    """What has to agree for parameters to share a table: site, op, options, shapes, and what all sets share."""
    shapes = tuple(sorted((name, tuple(tensor.shape[1:])) for name, tensor in parameters.tensors.items()))
    options = tuple(sorted((name, repr(value)) for name, value in parameters.options.items()))
    shared = tuple(sorted((name, id(tensor)) for name, tensor in parameters.shared.items()))
    return parameters.site, parameters.op, options, shapes, shared


def lay(plans: Sequence[Plan], kinds: Sequence[Any]) -> list[list[PlanEntry | None]]:
    """The entries of every plan in the columns `kinds`, each in the first one of its kind behind the one before.

    Returns:
        A list `[plans]` per column, None where a plan has nothing.

    Raises:
        LookupError: an entry has no column, or not in the order of its plan; its argument is the entry.
    """
    columns: list[list[PlanEntry | None]] = [[None] * len(plans) for _ in kinds]
    for row, plan in enumerate(plans):
        last: dict[str, int] = {}  # where the previous entry of each site went
        for entry in plan.entries:
            kind, site = kind_of(entry.parameters), entry.parameters.site
            place = next((i for i in range(last.get(site, -1) + 1, len(kinds)) if kinds[i] == kind), None)
            if place is None:
                raise LookupError(entry)
            columns[place][row] = entry
            last[site] = place
    return columns


def _columns(plans: Sequence[Plan]) -> list[Any]:
    """Kinds in an order that holds the entries of every plan in its own order at each site."""
    kinds: list[Any] = []
    for plan in plans:
        last: dict[str, int] = {}
        for entry in plan.entries:
            kind, site = kind_of(entry.parameters), entry.parameters.site
            begin = last.get(site, -1) + 1
            place = next((i for i in range(begin, len(kinds)) if kinds[i] == kind), None)
            if place is None:
                place = begin if site in last else len(kinds)
                kinds.insert(place, kind)
                last = {name: i + (i >= place) for name, i in last.items()}
            last[site] = place
    return kinds


def stacked(plans: Sequence[Plan]) -> list[Stack]:
    """The tables that serve a batch whose prompt b follows `plans[b]`, or all of whose prompts follow the only plan.

    At each site the tables are in an order that keeps the order of every plan.

    Raises:
        InputError: no plan, or plans without any entry.
    """
    if not plans or not any(plan.entries for plan in plans):
        raise InputError("plan without entries", fix="give it parameters for at least one site")
    if len(plans) == 1:
        return [Stack((entry,)) for entry in plans[0].entries]
    return [Stack(tuple(entries)) for entries in lay(plans, _columns(plans)) if any(entries)]
