"""`steer`: apply a plan to a model or a pipeline while a context lasts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError, PysteerError
from pysteer.steering.attach import Attachment, attach
from pysteer.steering.part import Part
from pysteer.steering.plan import Plan, SiteParameters, check_entries
from pysteer.steering.positions import Positions, check_positions
from pysteer.steering.stack import Stack, kind_of, lay, stacked
from pysteer.steering.table import ALL_TOKENS, Table

Strength = float | Tensor | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class SiteReport:
    """What one entry of a plan did.

    Attributes:
        site, part, op: of the entry.
        calls: how often the site ran.
        tokens_touched: tokens that were changed, over all rows and calls.
        steps: the steps at which the site ran.
    """

    site: str
    part: str
    op: str
    calls: int
    tokens_touched: int
    steps: tuple[int, ...]


class _Listener:
    """Passes announced rows on to a handle. Copies and pickles of it do nothing: a copied model is not steered."""

    def __init__(self, handle: "Handle | None" = None) -> None:
        self._handle = handle

    @property
    def parts(self) -> frozenset[str]:
        """The parts whose rows matter to it."""
        return frozenset() if self._handle is None else self._handle.parts

    def __call__(self, part: str, cond: int, uncond: int, lengths: Tensor | None, uncond_first: bool = False) -> None:
        if self._handle is not None:
            self._handle.rows(part, cond, uncond, lengths, uncond_first)

    def follow(self, part: str, lengths: Tensor | None) -> None:
        """What a run inside a compiled graph can tell: which tokens of its rows count."""
        if self._handle is not None:
            self._handle.follow(part, lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Listener, ()


class Handle:
    """A plan on a model: a context manager, and what changes it while it is attached. Made by `steer`.

    Changes are written in place into tensors on the device: no recompile, no graph break, no wait for the device.
    """

    def __init__(
        self,
        obj: Any,
        plan: Plan | Sequence[Plan],
        *,
        strength: Strength,
        capacity: int | None,
        positions: Positions = "all",
    ) -> None:
        from pysteer.families.base import find_family  # families stand on steering, not the other way round

        self._obj = obj
        self._family = find_family(obj)
        self._sites = self._family.sites(obj)
        self._capacity = capacity or self._family.capacity
        self._positions = check_positions(positions)
        self._gate: Tensor | None = None
        self._attachments: list[Attachment] = []
        self._disconnect: Callable[[], None] | None = None
        self._parts: dict[str, Part] = {}
        steps = self._rooms()
        self._plans = _listed(plan)
        self._stacks = stacked(self._plans)
        check_entries((entry for plan in self._plans for entry in plan.entries), self._sites, steps)
        self._strength = self._checked(strength)
        self.parts = frozenset(self._sites[stack.first.site].part for stack in self._stacks)

    def _build(self) -> None:
        """Make the tables. After connecting, because a family may make its clock only then."""
        self._parts = {}
        for stack in self._stacks:
            site = self._sites[stack.first.site]
            if site.part not in self._parts:
                clock = self._family.clock(self._obj, site.part)
                steps = self._family.steps(self._obj, site.part)
                self._parts[site.part] = Part(
                    site.part, steps, clock, positions=self._positions, mixed=self._family.announced
                )
            part = self._parts[site.part]
            room = max(part.steps, self._family.room(self._obj, site.part))
            table = Table(stack, site, steps=room, clock=part.clock, capacity=self._capacity)
            table.try_out()
            part.tables.append(table)
            part.stacks.append(stack)
        for part in self._parts.values():
            self._check_fits(part, self._strength)
            if not self._family.announced:
                self._fill(part)

    def _fill(self, part: Part) -> None:
        """Fill the tables for a batch of any size: up to the capacity, or as many rows as the strength has entries."""
        given = [self._of_part(part.name, self._strength), self._gate]
        sizes = [value.shape[-1] for value in given if isinstance(value, Tensor)]
        sizes += [len(self._plans)] if len(self._plans) > 1 else []
        sizes += [len(self._positions)] if isinstance(self._positions, Tensor) else []
        rows = max([part.tables[0].capacity if not sizes else 0, *sizes])
        part.settle()
        part.reserve(rows)
        part.write_mask()
        part.set_span(torch.full((rows,), ALL_TOKENS, dtype=torch.int32, device=part.device))
        part.settle()  # that was no run
        self._write(part, rows)

    def follow(self, part: str, lengths: Tensor | None) -> None:
        """Which tokens of the rows of a compiled run count; called by the family inside the graph."""
        state = self._parts.get(part)
        if state is not None:
            state.follow(lengths)

    def __enter__(self) -> "Handle":
        if self._disconnect is not None:
            raise PysteerError("this handle is attached already; fix: call steer() again for a second one")
        self._disconnect = self._family.connect(self._obj, _Listener(self))
        try:
            self._build()
            for part in self._parts.values():
                root = self._family.root(self._obj, part.name)
                self._attachments.append(attach(root, [(table.site, table) for table in part.tables]))
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.detach()
        if kind is None:
            self._check_ran()

    def detach(self) -> None:
        """Restore the model; harmless when done twice. The report stays readable."""
        for attachment in reversed(self._attachments):
            attachment.detach()
        self._attachments = []
        disconnect, self._disconnect = self._disconnect, None
        if disconnect is not None:
            disconnect()

    def ensure(self) -> None:
        """Follow what others did to the model since attaching (hooks, replaced `forward`); done at every run too.

        Raises:
            PysteerError: a site's module is no longer in the model.
        """
        for attachment in self._attachments:
            attachment.ensure()

    @property
    def strength(self) -> Strength:
        """Factor on the schedule: a number, `[B]` (per prompt) or `[S, B]` (per step and prompt).

        A mapping gives each part of the model its own, for example `{"visual": 1.0, "text": tensor}`; parts that are
        not named keep 1. Values on the CPU are checked to be finite; those on a device are not, that would wait for it.
        """
        return self._strength

    @strength.setter
    def strength(self, value: Strength) -> None:
        value = self._checked(value)
        for part in self._parts.values():
            self._check_fits(part, value)
        self._strength = value
        self._rewrite()

    @property
    def gate(self) -> Tensor | None:
        """A further factor per prompt, `[B]`, for example a gate of zeros and ones; None for none."""
        return self._gate

    @gate.setter
    def gate(self, value: Tensor | None) -> None:
        if value is not None:
            self._checked_tensor("gate", value, dims=(1,))
            for part in self._parts.values():
                self._check_batch("gate", part, value)
        self._gate = value
        self._rewrite()

    def rows(
        self,
        part: str,
        cond: int,
        uncond: int = 0,
        lengths: Tensor | None = None,
        uncond_first: bool = False,
    ) -> None:
        """Announce the rows of the coming run, `[cond rows | uncond rows]`; called by the family.

        Args:
            part: the part of the model that is about to run.
            cond, uncond: numbers of rows; one is zero or both are equal. Several prompts may share an unconditional row
                where nothing acts on those: there are fewer of them then.
            lengths: int `[cond + uncond]`, how many tokens of each row count (layout "tokens"), or `[cond + uncond,
                2]` the first and the one behind the last; None for all.

        Raises:
            InputError: rows that are not ordered so, or a strength or gate for another number of prompts.
        """
        state = self._parts.get(part)
        if state is None:
            return
        shared = 0 < uncond < cond and not any(plan.acts_on_uncond for plan in self._plans)
        if min(cond, uncond) < 0 or (cond != uncond and 0 not in (cond, uncond) and not shared) or cond + uncond == 0:
            allowed = "(B, B), (B, 0) or (0, B), or (B, less than B) where the plan leaves unconditional rows alone"
            raise InputError(f"rows of part {part}", value=(cond, uncond), allowed=allowed)
        if lengths is not None and len(lengths) != cond + uncond:
            raise InputError(f"lengths of part {part}", value=len(lengths), allowed=f"{cond + uncond}, one per row")
        if self._family.announced or lengths is not None:  # not at every token of a generation
            self.ensure()
        state.cond, state.uncond, state.uncond_first = cond, uncond, uncond_first
        clock, state.steps = self._family.clock(self._obj, part), self._family.steps(self._obj, part)
        now = (cond, uncond, uncond_first, state.steps)
        moved = state.follow_clock(clock)
        unchanged = state.written == now and not moved
        self._check_fits(state, self._strength, running=True)
        if not unchanged:
            state.settle()
            self._check_batches(state)
            state.reserve(cond + uncond)
            state.write_mask()
        if lengths is not None or not state.untouched:
            state.set_span(lengths)
        if not unchanged:
            self._write(state, cond, uncond)
            state.written = now

    def update(self, plan: Plan | Sequence[Plan]) -> None:
        """Take over another plan in place, or one per prompt.

        Entries are matched by site, op and shapes, in order; those that the new plan lacks are switched off.

        Raises:
            InputError: an entry that was not there before, or one with other shapes; nothing is changed then.
        """
        steps = self._rooms()
        plans = _listed(plan)
        check_entries((entry for each in plans for entry in each.entries), self._sites, steps)
        tables = [(part, i) for part in self._parts.values() for i in range(len(part.tables))]
        kinds = [kind_of(part.stacks[i].first) for part, i in tables]
        try:
            columns = lay(plans, kinds)
        except LookupError as error:
            raise self._unplaced(error.args[0].parameters) from None
        stacks = [Stack(tuple(column)) if any(column) else None for column in columns]
        for (part, i), stack in zip(tables, stacks, strict=True):
            _check_plans(part, plans)
            if stack is not None:
                _check_room(part.tables[i], stack)
        for (part, i), stack in zip(tables, stacks, strict=True):
            part.stacks[i] = part.stacks[i].off() if stack is None else stack
            part.tables[i].load(part.stacks[i])
        self._plans = plans
        self._rewrite()

    def _unplaced(self, new: SiteParameters) -> InputError:
        """The error for an entry of an update that no table can take; raises a more telling one where there is."""
        for part in self._parts.values():
            for table, stack in zip(part.tables, part.stacks, strict=True):
                if (stack.first.site, stack.first.op) == (new.site, new.op):
                    _check_shapes(table, new)
        return InputError(
            "update with an entry that the attached plan does not have, or not in this order",
            value=f"{new.op} at {new.site}",
            fix="attach the superset first and switch entries off by their schedule, or steer again",
        )

    def report(self) -> list[SiteReport]:
        """What each entry did so far, in the order of the plan's parts; waits for the device."""
        found = []
        for part in self._parts.values():
            part.settle()
            for table, stack in zip(part.tables, part.stacks, strict=True):
                calls, tokens = table.calls.tolist(), table.tokens.tolist()
                steps = tuple(step for step, count in enumerate(calls) if count)
                name, op = stack.first.site, stack.first.op
                found.append(SiteReport(name, part.name, op, sum(calls), sum(tokens), steps))
        return found

    def _check_ran(self) -> None:
        report = self.report()
        ran = {entry.part for entry in report if entry.calls}
        announced = {part.name for part in self._parts.values() if part.written is not None}
        announced |= set() if self._family.announced else ran
        if ran - announced:
            raise PysteerError(
                f"the {self._family.name} model ran, but the rows of part {', '.join(sorted(ran - announced))} were "
                "never announced: nothing was steered there"
            )
        stacks = [stack for part in self._parts.values() for stack in part.stacks]
        idle = [r.site for r, stack in zip(report, stacks, strict=True) if stack.active and not r.calls]
        if announced and idle:
            raise PysteerError(
                f"planned sites never ran: {', '.join(idle)}; fix: leave them out of the plan, or run the part of the "
                "model that they are in"
            )

    def _rewrite(self) -> None:
        """Make a change effective for the rows as they are."""
        self.ensure()
        for part in self._parts.values():
            if part.written is not None:
                part.settle()
                self._write(part, part.cond, part.uncond)
            elif not self._family.announced:
                self._fill(part)

    def _rooms(self) -> dict[str, int]:
        """How many steps of each part a plan may name."""
        return {part: self._family.room(self._obj, part) for part in {site.part for site in self._sites.values()}}

    def _write(self, part: Part, cond: int, uncond: int = 0) -> None:
        factors: dict[torch.device, float | Tensor] = {}
        for table in part.tables:
            if table.device not in factors:
                factors[table.device] = self._factor(part, table)
            table.write(cond, uncond, factors[table.device], uncond_first=part.uncond_first)

    @torch.no_grad()
    def _factor(self, part: Part, table: Table) -> float | Tensor:
        """Strength times gate for B prompts: a number, `[B]` or `[S, B]`."""
        value = self._of_part(part.name, self._strength)
        if isinstance(value, Tensor):
            value = value.to(table.device, torch.float32)
            if value.dim() == 2:  # room for more steps than the model has now
                value = torch.nn.functional.pad(value, (0, 0, 0, table.steps - len(value)))
        return value if self._gate is None else value * self._gate.to(table.device, torch.float32)

    @staticmethod
    def _of_part(part: str, strength: Strength) -> float | Tensor:
        return strength.get(part, 1.0) if isinstance(strength, Mapping) else strength

    def _checked(self, strength: Strength) -> Strength:
        parts = sorted({site.part for site in self._sites.values()})
        if isinstance(strength, Mapping):
            for part in strength:
                if part not in parts:
                    raise InputError("strength for an unknown part", value=part, allowed=", ".join(parts))
            return {part: self._checked_value(value) for part, value in strength.items()}
        return self._checked_value(strength)

    def _checked_value(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor) and value.dim() > 0:
            self._checked_tensor("strength", value, dims=(1, 2))
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError("strength", value=value, allowed="a finite number, a tensor [B] or [S, B]")
        return number

    @staticmethod
    def _checked_tensor(what: str, value: Tensor, dims: tuple[int, ...]) -> None:
        allowed = " or ".join({1: "[B]", 2: "[S, B]"}[n] for n in dims)
        if not isinstance(value, Tensor) or value.dim() not in dims:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"shape of {what}", value=shape, allowed=f"a tensor {allowed}")
        if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
            raise InputError(what, value="NaN or infinity", allowed="finite values")

    def _check_fits(self, part: Part, strength: Strength, running: bool = False) -> None:
        value = self._of_part(part.name, strength)
        if not isinstance(value, Tensor):
            return
        self._check_batch("strength", part, value)
        room = self._family.room(self._obj, part.name)
        if value.dim() == 2 and len(value) != part.steps and (running or room == part.steps or len(value) > room):
            raise InputError(
                f"steps of strength for part {part.name}",
                value=len(value),
                allowed=str(part.steps) if running or room == part.steps else f"at most {room}",
                fix=f'give parts their own: {{"{part.name}": tensor}}',
            )

    def _check_batches(self, part: Part) -> None:
        """Raise an InputError where gate, plans or mask are for another number of prompts."""
        if self._gate is not None:
            self._check_batch("gate", part, self._gate)
        if isinstance(self._positions, Tensor):
            self._check_batch("positions", part, self._positions[:, 0])
        _check_plans(part, self._plans)

    @staticmethod
    def _check_batch(what: str, part: Part, value: Tensor) -> None:
        if part.prompts and value.shape[-1] != part.prompts:
            allowed = f"{part.prompts}, one per prompt of the batch"
            raise InputError(f"entries of {what}", value=value.shape[-1], allowed=allowed)


def _listed(plan: Plan | Sequence[Plan]) -> list[Plan]:
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    for each in plans:
        if not isinstance(each, Plan):
            raise InputError("plan", value=type(each).__name__, allowed="a Plan, or a list of one Plan per prompt")
    return plans


def _check_plans(part: Part, plans: list[Plan]) -> None:
    if len(plans) > 1 and part.prompts and len(plans) != part.prompts:
        raise InputError("plans", value=len(plans), allowed=f"1, or {part.prompts}: one per prompt of the batch")


def _check_room(table: Table, stack: Stack) -> None:
    if table.call.gate and table.one_plan and not stack.shared:  # one gate for all rows is part of the graph
        where = f"plans of a gate at {stack.first.site}"
        raise InputError(where, value="one per prompt", allowed="one, as attached", fix="steer again")
    room = len(next(iter(table.bank.values()))) - 1
    if stack.sets > room:
        first = stack.first
        where = f"update of {first.op} at {first.site}: parameter sets"
        raise InputError(where, value=stack.sets, allowed=f"at most {room}", fix="steer again")


def _check_shapes(table: Table, parameters: SiteParameters) -> None:
    where = f"update of {parameters.op} at {parameters.site}"
    options = {name: value for name, value in table.options.items() if name != "channel_dim"}
    if parameters.options != options:
        raise InputError(f"{where}: options", value=parameters.options, allowed=str(options), fix="steer again")
    if set(parameters.tensors) != set(table.bank):  # banks that an op may go without
        given, allowed = (", ".join(sorted(names)) for names in (parameters.tensors, table.bank))
        raise InputError(f"{where}: tensors", value=given, allowed=allowed, fix="steer again")
    for name, tensor in parameters.tensors.items():
        room = table.bank[name]
        if tensor.shape[1:] != room.shape[1:]:
            allowed = f"[any, {str(list(room.shape[1:]))[1:]}"
            raise InputError(f"{where}: shape of {name}", value=list(tensor.shape), allowed=allowed, fix="steer again")


def steer(
    obj: Any,
    plan: Plan | Sequence[Plan],
    *,
    strength: Strength = 1.0,
    capacity: int | None = None,
    positions: Positions = "all",
) -> Handle:
    """Steer a model or a pipeline while a context lasts: `with steer(pipe, plan) as handle: ...`.

    Args:
        obj: the model or pipeline; a family must know it.
        plan: what to change, where and how strongly; or a list of plans, one per prompt of the batch, which may differ
            in everything. Entries of the same kind share a table, so hundreds of settings cost little more than one.
        strength: factor on the plan's schedule, see `Handle.strength`.
        capacity: rows to reserve room for; by default it grows with the largest batch, which allocates.
        positions: which tokens of a row are steered: "all", "last", a slice such as `slice(3, None)` or
            `slice(-2, None)`, counted without padding, or a mask, bool `[B, L]` for B prompts of L tokens, padding
            included. New tokens of a running generation belong to "all", "last" and slices without an end, and not to
            a mask.

    Returns:
        The handle, a context manager. Leaving it restores the model exactly.

    Raises:
        InputError: unknown site, wrong width, step out of range, NaN or infinite parameters; nothing is attached then.
        PysteerError: on leaving the context after a run in which a planned site never ran.
    """
    return Handle(obj, plan, strength=strength, capacity=capacity, positions=positions)
