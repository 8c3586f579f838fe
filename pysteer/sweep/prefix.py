"""Prefix sharing: rows that go the same way up to a step are computed once up to there, and fork.

Two rows go the same way up to step s when prompt, noise and everything that steers them at the steps before s are the
same. The rows of a batch thus form a tree; every level of it is one segment of the generation, run over one row per
branch. Steering is attached for each segment with what acts in it alone, a plan per branch. At the step where branches
part, their unconditional rows still see the same inputs: where nothing steers those, they are run once as well.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from pysteer.steering import Plan, steer
from pysteer.steering.plan import PlanEntry


@dataclass(frozen=True)
class Row:
    """What a row of a batch is made of.

    Attributes:
        prompt: its text.
        noise: seed of its random stream.
        plan: what steers it, with its strength; without entries for nothing.
    """

    prompt: str
    noise: int
    plan: Plan


class State(Protocol):
    """A generation that is under way."""

    def advance(self, until: int) -> Any: ...

    def fork(self, rows: Tensor, seeds: Sequence[int] | None = None, *, twins: bool = False) -> Any: ...


class Runs(Protocol):
    """A kind of model, as prefix sharing sees it.

    Attributes:
        model: what `steer` takes.
        steps: S, how many steps its rows can differ from.
        weights: what each step costs per row, in any unit.
        twins: whether a fork may let branches share their unconditional rows at the step where they part.
    """

    model: Any
    steps: int
    weights: list[float]
    twins: bool

    def begin(self, rows: Sequence[Row]) -> State:
        """The generation of rows before the first step; whatever steers the text is up to this."""

    def steps_of(self, site: str, segment: range) -> Sequence[int]:
        """The steps of its own clock at which `site` acts within a segment."""

    def seeded(self, step: int) -> bool:
        """Whether what happens at `step` depends on the noise."""

    def attached(self, plan: Plan, segment: range) -> Plan:
        """What of a plan has to be attached while a segment runs."""


def scaled(plan: Plan, strength: float) -> Plan:
    """The plan with its schedule times `strength`."""
    made = Plan()
    made.entries = [
        PlanEntry(e.parameters, {step: (c * strength, u * strength) for step, (c, u) in e.schedule.items()})
        for e in plan.entries
    ]
    return made


def during(plan: Plan, runs: Runs, segment: range) -> Plan:
    """What of a plan acts within a segment; entries that do nothing there are left out."""
    made = Plan()
    for entry in plan.entries:
        steps = runs.steps_of(entry.parameters.site, segment)
        schedule: dict[int | None, tuple[float, float]] = {step: entry.at(step) for step in steps}
        if any(cond != 0 or uncond != 0 for cond, uncond in schedule.values()):
            made.entries.append(PlanEntry(entry.parameters, schedule))
    return made


def signature(row: Row, runs: Runs, step: int) -> Hashable:
    """Equal for rows that are treated alike at a step."""
    acting = during(row.plan, runs, range(step, step + 1))
    entries = tuple((id(e.parameters), tuple(sorted(e.schedule.items()))) for e in acting.entries)
    start: Hashable = row.prompt if step == 0 else None
    return start, row.noise if runs.seeded(step) else None, entries


def branches(rows: Sequence[Row], runs: Runs, *, share: bool = True) -> list[list[int]]:
    """For every step, the branch of every row: a list `[S][B]` of numbers that count up by first appearance.

    Without `share` every row is a branch of its own from the start.
    """
    if not share:
        return [list(range(len(rows)))] * runs.steps
    found: list[list[int]] = []
    before: list[int] = [0] * len(rows)
    for step in range(runs.steps):
        known: dict[Hashable, int] = {}
        before = [
            known.setdefault((place, signature(row, runs, step)), len(known))
            for place, row in zip(before, rows, strict=True)
        ]
        found.append(before)
    return found


def steering(runs: Runs, plans: Sequence[Plan]) -> AbstractContextManager[Any]:
    """Steer the rows of a run, a plan each; nothing where none of them has an entry."""
    if not any(plan.entries for plan in plans):
        return nullcontext()
    same = all(plan is plans[0] for plan in plans)
    return steer(runs.model, plans[0] if same and len(plans) > 1 else list(plans))


@dataclass
class Shared:
    """A finished generation: row i of the batch is row `index[i]` of `state`; `work` as in `Outputs`."""

    state: Any
    index: Tensor
    work: tuple[float, float]


def generate(runs: Runs, rows: Sequence[Row], *, share: bool = True) -> Shared:
    """Generate rows, their common prefixes once."""
    tree = branches(rows, runs, share=share)
    counts = [max(level) + 1 for level in tree]
    cuts = [0, *(s for s in range(1, runs.steps) if counts[s] > counts[s - 1]), runs.steps]
    state: Any = None
    saved = 0.0  # by unconditional rows that branches still share at the step where they part
    for start, end in pairwise(cuts):
        firsts = _firsts(tree[start])
        chosen = [rows[i] for i in firsts]
        if state is None:
            state = runs.begin(chosen)
        else:
            parents = torch.tensor([tree[start - 1][i] for i in firsts])
            twins = runs.twins and not any(
                during(row.plan, runs, range(start, start + 1)).acts_on_uncond for row in chosen
            )
            state = state.fork(parents, [row.noise for row in chosen], twins=twins)
            saved += (len(firsts) - counts[start - 1]) / 2 * runs.weights[start] if twins else 0
        with steering(runs, [runs.attached(row.plan, range(start, end)) for row in chosen]):
            state.advance(end)
    work = sum(count * weight for count, weight in zip(counts, runs.weights, strict=True)) - saved
    return Shared(state, torch.tensor(tree[-1]), (work, len(rows) * sum(runs.weights)))


def _firsts(numbers: Iterable[int]) -> list[int]:
    """The first row of every branch, in the order of their numbers."""
    first: dict[int, int] = {}
    for row, number in enumerate(numbers):
        first.setdefault(number, row)
    return [first[number] for number in range(len(first))]
