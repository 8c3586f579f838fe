"""What to change: parameters of an op at sites and steps, and how strongly, for which rows."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import registry
from pysteer.steering.call import AROUND, GATE, GATE_TENSORS, split
from pysteer.steering.site import Site, brief, did_you_mean

Strengths = Mapping[int | None, tuple[float, float]]
_ROWS = {"cond": (1.0, 0.0), "uncond": (0.0, 1.0), "both": (1.0, 1.0)}
_TABLE_ARGUMENTS = ("slot", "strength", "clock", "span", "channel_dim", "out")


class _Arguments(NamedTuple):
    """Names of the banks of an op, of those that may be left out, of tensors that all sets share, and of its options.

    Banks that may be left out are all there or none, but for ops with shared tensors, which decide themselves.
    """

    banks: list[str]
    bounds: list[str]
    shared: list[str]
    options: list[str]


@cache
def _arguments_of(op: str) -> _Arguments:
    spec = registry.get(op)
    parameters = dict(list(inspect.signature(spec.function).parameters.items())[1:])
    names = list(parameters)
    banks = names[: names.index("slot")]
    rest = [name for name in names if name not in (*banks, *_TABLE_ARGUMENTS)]
    shared = list(getattr(spec, "shared", ()))
    tensors = [name for name in rest if Tensor in get_args(parameters[name].annotation)]
    options = [name for name in rest if name not in tensors]
    return _Arguments(banks, [name for name in tensors if name not in shared], shared, options)


@dataclass
class SiteParameters:
    """Parameters of one op at one site.

    Attributes:
        site: name of the site.
        op: name of the op in `pysteer.ops`.
        steps: parameter set i is for step `steps[i]`; None for one set that serves every step.
        tensors: the op's bank arguments by name, each `[len(steps) or 1, ...]`, floating point; used as fp32 (int32
            where the op wants it). Banks that the op takes as optional (`low`, `high` of `affine_shift`) are given all
            together or not at all. With a gate also the tensors of `linear_gate`, as `gate.weight` and so on.
        options: static options of the op, and those of `pysteer.steering.call`: `gate.kind`, `gate.threshold`,
            `gate.per_token`, `keep_norm`.
        shared: tensors of the op that all sets share (`full_encoder` of `sae_edit`), used as they are.
    """

    site: str
    op: str
    steps: tuple[int, ...] | None
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sets(self) -> int:
        """How many parameter sets there are."""
        return 1 if self.steps is None else len(self.steps)

    def check(self) -> None:
        """Raise an InputError unless names, options, shapes and values fit the op (the width needs the site)."""
        known = _arguments_of(self.op)
        where = f"parameters of site {self.site} for {self.op}"
        self._check_names(known, where)
        for option in self.options:
            if option not in (*known.options, *AROUND):
                fix, allowed = did_you_mean(option, known.options), ", ".join(known.options) or "none"
                raise InputError(f"{where}, option", value=option, allowed=allowed, fix=fix)
        if self.steps is not None and (len(set(self.steps)) != len(self.steps) or not self.steps):
            raise InputError(f"{where}, steps", value=self.steps, allowed="at least one step, each once")
        for name, tensor in self.shared.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{where}, {name}", value=str(tensor.dtype), allowed="finite floating point numbers")
        most = max(tensor.dim() for tensor in self.tensors.values())
        for name, tensor in self.tensors.items():
            number = tensor.is_floating_point() or tensor.dtype is torch.int32
            if not number or tensor.dim() < 2 or len(tensor) != self.sets:
                found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                raise InputError(f"{where}, {name}", value=found, allowed=f"floating point [{self.sets}, ...]")
            # Minus infinity marks an unused entry in a bank of scores; never in one that holds vectors. What is left
            # out for no bounds may be infinite.
            usable = torch.isfinite(tensor) | ((tensor == -math.inf) & (tensor.dim() < most))
            if not bool(usable.all() if name not in known.bounds else ~tensor.isnan().any()):
                raise InputError(
                    f"{where}, {name}", value="NaN or infinity", allowed="finite values", fix="fit or load them again"
                )

    def _check_names(self, known: _Arguments, where: str) -> None:
        """Raise an InputError unless the tensors are those of the op and its gate."""
        own, gate = split(self.tensors)
        together = {*known.banks, *known.bounds}
        fits = set(known.banks) <= set(own) <= together and (known.shared or set(own) in (set(known.banks), together))
        if not fits:
            allowed = ", ".join(known.banks) + (f", and if wanted {', '.join(known.bounds)}" if known.bounds else "")
            raise InputError(f"{where}, tensors", value=", ".join(sorted(own)), allowed=allowed)
        for name in self.shared:
            if name not in known.shared:
                raise InputError(f"{where}, shared", value=name, allowed=", ".join(known.shared) or "none")
        kind = self.options.get("gate.kind")
        if kind is not None and kind not in GATE_TENSORS:
            raise InputError(f"{where}, gate.kind", value=kind, allowed=", ".join(GATE_TENSORS))
        wanted = GATE_TENSORS.get(str(kind), ())
        if set(gate) != set(wanted):
            allowed = ", ".join(GATE + name for name in wanted) or "none without gate.kind"
            value = ", ".join(GATE + name for name in sorted(gate)) or "none"
            raise InputError(f"{where}, tensors of the gate", value=value, allowed=allowed)


@dataclass(frozen=True)
class PlanEntry:
    """Parameters and their schedule: step -> (strength of cond rows, of uncond rows).

    Step None stands for every step that is not listed; a step that is missing is off.
    """

    parameters: SiteParameters
    schedule: Strengths

    def at(self, step: int) -> tuple[float, float]:
        """Strengths (cond, uncond) at `step`; 0 where no parameters serve it."""
        steps = self.parameters.steps
        if steps is not None and step not in steps:
            return 0.0, 0.0
        return self.schedule.get(step, self.schedule.get(None, (0.0, 0.0)))

    @property
    def active(self) -> bool:
        """Whether anything is to happen at all."""
        return any(cond != 0 or uncond != 0 for cond, uncond in self.schedule.values())

    def check(self, sites: Mapping[str, Site], steps: Mapping[str, int]) -> None:
        """Raise an InputError unless the entry fits a model.

        Args:
            sites: the model's sites by name.
            steps: number of steps of each part.
        """
        check_entries([self], sites, steps)

    def _check_schedule(self, sites: Mapping[str, Site], steps: Mapping[str, int]) -> None:
        """Raise an InputError unless steps and strengths fit the part of the site."""
        name = self.parameters.site
        count = steps[sites[name].part]
        own = self.parameters.steps
        scheduled = [step for step in self.schedule if step is not None]
        for step in (*(own or ()), *scheduled):
            if not isinstance(step, int) or not 0 <= step < count:
                raise InputError(f"step of site {name}", value=step, allowed=f"0..{count - 1}")
        for when, values in self.schedule.items():
            if when is not None and own is not None and when not in own and any(values):
                raise InputError(
                    f"schedule of site {name}: no parameters for step",
                    value=when,
                    allowed=", ".join(map(str, own)),
                    fix="fit this step or take it out of the schedule",
                )
            if len(values) != 2 or not all(math.isfinite(value) for value in values):
                raise InputError(
                    f"strengths of site {name} at step {when}", value=values, allowed="two finite numbers: cond, uncond"
                )


def check_entries(entries: Iterable[PlanEntry], sites: Mapping[str, Site], steps: Mapping[str, int]) -> None:
    """Raise an InputError unless entries fit a model; parameters that several rows share are looked at once.

    Args:
        entries: of one plan or of the plans of many rows.
        sites: the model's sites by name.
        steps: number of steps of each part.
    """
    seen: set[int] = set()
    for entry in entries:
        parameters = entry.parameters
        if id(parameters) not in seen:
            seen.add(id(parameters))
            name = parameters.site
            if name not in sites:
                raise InputError("unknown site", value=name, allowed=brief(sites), fix=did_you_mean(name, sites))
            parameters.check()
        entry._check_schedule(sites, steps)


class Plan:
    """What to change: parameters at sites and steps, and a schedule of strengths.

    Args:
        parameters: parameters per site; several entries at one site are applied in order.
        schedule: site -> {step: (strength of cond rows, strength of uncond rows)}; a missing step is off, step None
            stands for all steps that are not listed. It holds for every entry of the site.

    Attributes:
        entries: parameters with their schedules, in the order of application.

    `plan + plan` applies the first and then the second; each keeps its own schedule.

    Raises:
        InputError: a schedule for a site without parameters.
    """

    def __init__(
        self, parameters: Iterable[SiteParameters] = (), schedule: Mapping[str, Strengths] | None = None
    ) -> None:
        schedule = schedule or {}
        parameters = list(parameters)
        names = [entry.site for entry in parameters]
        for site in schedule:
            if site not in names:
                fix = did_you_mean(site, names)
                raise InputError("schedule for a site without parameters", value=site, allowed=brief(names), fix=fix)
        self.entries = [PlanEntry(entry, dict(schedule.get(entry.site, {}))) for entry in parameters]

    @classmethod
    def build(cls, parameters: Iterable[SiteParameters], *, rows: str = "cond", strength: float = 1.0) -> "Plan":
        """The plan with the same strength wherever there are parameters.

        Args:
            parameters: parameters per site.
            rows: "cond", "uncond" or "both".
            strength: dimensionless; 1 applies the fitted change in full.
        """
        if rows not in _ROWS:
            raise InputError("rows", value=rows, allowed=", ".join(_ROWS), fix=did_you_mean(rows, _ROWS))
        cond, uncond = _ROWS[rows]
        plan = cls(parameters)
        pair = (cond * strength, uncond * strength)
        plan.entries = [
            PlanEntry(entry.parameters, dict.fromkeys(entry.parameters.steps or (None,), pair))
            for entry in plan.entries
        ]
        return plan

    @property
    def parameters(self) -> list[SiteParameters]:
        """Parameters of all entries, in order."""
        return [entry.parameters for entry in self.entries]

    @property
    def schedule(self) -> dict[str, Strengths]:
        """Schedule by site; where entries of one site differ (after `+`), that of the last; `entries` has them all."""
        return {entry.parameters.site: entry.schedule for entry in self.entries}

    @property
    def acts_on_uncond(self) -> bool:
        """Whether unconditional rows are changed at any step."""
        return any(uncond != 0 for entry in self.entries for _, uncond in entry.schedule.values())

    def __add__(self, other: "Plan") -> "Plan":
        if not isinstance(other, Plan):
            return NotImplemented
        merged = Plan()
        merged.entries = [*self.entries, *other.entries]
        return merged
