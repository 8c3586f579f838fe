"""The steering table: what one entry of a plan does at its site, as tensors that the op reads on the device.

Changing strength, schedule, parameters or the step is a write into these tensors, so a compiled graph or a captured
CUDA graph sees it without being made again. Only more rows or more steps than ever before allocate.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError, PysteerError
from pysteer.ops import registry
from pysteer.steering.plan import PlanEntry
from pysteer.steering.site import Site

ALL_TOKENS = torch.iinfo(torch.int32).max  # end of the span of a row that is touched as a whole
_DIMS = {"tokens": "[R, L, D]", "rows": "[R, D]", "channels": "[R, D, *spatial]"}

# One word per step counts calls and tokens, so that counting costs one scalar op per call and no sync: the low bits sum
# up the tokens per row of all calls, the high bits count the calls. It is emptied at every write.
_CALL_BIT = 36
_CALL = 1 << _CALL_BIT


class Table:
    """Applies one entry of a plan at one site. A plain object: casting or saving the model does not touch it.

    Args:
        entry: parameters and schedule, already checked.
        site: where it is applied.
        steps: S, how many steps the clock counts.
        clock: int64, 0-dim, shared by all tables of the part; read on the device.
        capacity: R to start with; grows when a batch has more rows.
        device: of the table; that of the clock by default.

    Attributes:
        bank: the op's parameters by name, fp32 `[1 + sets, ...]`; set 0 is not used.
        slot: int32 `[S, R]`, the parameter set of each row; 0 leaves the row alone.
        strength: fp32 `[S, R]`.
        span: int32 `[R, 2]` or None, tokens `[start, end)` of each row that are touched; shared by the part.
        rows: number of rows in the batch; None until the layout of the batch is known.
    """

    def __init__(
        self,
        entry: PlanEntry,
        site: Site,
        *,
        steps: int,
        clock: Tensor,
        capacity: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.site = site
        self.clock = clock
        self.device = device or clock.device
        self.span: Tensor | None = None
        self.rows: int | None = None
        self.function = registry.get(entry.parameters.op).function
        self.options: dict[str, Any] = dict(entry.parameters.options)
        if site.layout == "channels":
            self.options["channel_dim"] = 1
        with torch.inference_mode(False), torch.no_grad():
            self.one = torch.ones(1, dtype=torch.int64, device=self.device)
            self.bank = {
                name: torch.zeros(1 + entry.parameters.sets, *tensor.shape[1:], device=self.device)
                for name, tensor in entry.parameters.tensors.items()
            }
            self._allocate(steps, capacity)
        self.load(entry)

    def _allocate(self, steps: int, capacity: int) -> None:
        self.slot = torch.zeros(steps, capacity, dtype=torch.int32, device=self.device)
        self.strength = torch.zeros(steps, capacity, device=self.device)
        self.choice = torch.zeros(steps, 1, dtype=torch.int32, device=self.device)
        self.schedule = torch.zeros(steps, 2, device=self.device)
        self.visits = torch.zeros(steps, dtype=torch.int64, device=self.device)
        self.index = torch.arange(steps, device=self.device)
        self.calls = torch.zeros_like(self.visits)
        self.tokens = torch.zeros_like(self.visits)

    @property
    def steps(self) -> int:
        """S, the number of steps there is room for."""
        return self.slot.shape[0]

    @property
    def capacity(self) -> int:
        """R, the number of rows there is room for."""
        return self.slot.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """Steer `x`, in the layout of the site, fp32, bf16 or fp16; the result is a new tensor of the same kind.

        Raises:
            PysteerError: the number of rows is not the one announced (checked in eager code only).
        """
        visit = math.prod(x.shape[1:-1] if self.site.layout != "channels" else x.shape[2:]) + _CALL
        if torch.compiler.is_compiling():
            # Element-wise over S numbers, because Inductor would leave its fused code for a scatter.
            self.visits.add_(torch.where(self.index == self.clock, visit, 0))
        else:
            self._check_input(x)
            self.visits.index_add_(0, self.clock, self.one, alpha=visit)
        return self.function(
            x, **self.bank, slot=self.slot, strength=self.strength, clock=self.clock, span=self.span, **self.options
        )

    def _check_input(self, x: Tensor) -> None:
        dims = x.dim()
        fits = dims == 2 if self.site.layout == "rows" else dims >= 3
        if not fits:
            raise PysteerError(
                f"site {self.site.name} returned {list(x.shape)}, but its layout is {_DIMS[self.site.layout]}"
            )
        if self.rows is None:
            raise PysteerError(f"site {self.site.name} ran before the rows of the batch were announced")
        if x.shape[0] != self.rows:
            raise PysteerError(f"site {self.site.name} ran with {x.shape[0]} rows; announced were {self.rows}")

    def try_out(self) -> None:
        """Run the op once on zeros, so that parameters that do not fit the site are found before anything is attached.

        Raises:
            InputError: names the site and the parameter.
        """
        width = self.site.width or max(self.bank.values(), key=Tensor.dim).shape[-1]
        shape = {"tokens": (1, 1, width), "rows": (1, width), "channels": (1, width, 1)}[self.site.layout]
        x = torch.zeros(shape, device=self.device)
        clock = torch.zeros((), dtype=torch.int64, device=self.device)
        try:
            self.function(x, **self.bank, slot=self.slot, strength=self.strength, clock=clock, **self.options)
        except InputError as error:
            where = f"parameters of site {self.site.name} (width {width})"
            raise InputError(f"{where} do not fit: {error}", fix="fit them for this model") from error

    @torch.no_grad()
    def load(self, entry: PlanEntry) -> None:
        """Take over parameters and schedule of an entry of the same shapes, in place; `write` makes them effective."""
        parameters = entry.parameters
        for name, tensor in parameters.tensors.items():
            self.bank[name][1 : 1 + parameters.sets].copy_(tensor)
        steps = parameters.steps
        choice = [1 if steps is None else steps.index(s) + 1 if s in steps else 0 for s in range(self.steps)]
        self.choice.copy_(torch.tensor(choice, dtype=torch.int32)[:, None])
        self.schedule.copy_(torch.tensor([entry.at(s) for s in range(self.steps)], dtype=torch.float32))

    def reserve(self, entry: PlanEntry, steps: int, rows: int) -> None:
        """Make room for more steps or rows; allocates only then. Settled counts are kept."""
        if steps <= self.steps and rows <= self.capacity:
            return
        calls, tokens, known = self.calls, self.tokens, self.steps
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(max(steps, known), max(rows, self.capacity))
            self.span = None  # of the old capacity; the part gives a new one
            self.calls[:known] = calls
            self.tokens[:known] = tokens
        self.load(entry)

    @torch.no_grad()
    def write(self, cond: int, uncond: int, factor: float | Tensor = 1.0) -> None:
        """Write slot and strength for a batch of `[cond rows | uncond rows]`, in place, after `settle`.

        Args:
            factor: multiplies the schedule: a number, or fp32 `[B]` or `[S, B]` for B prompts.
        """
        rows = cond + uncond
        pieces = [self.schedule[:, :1].expand(-1, cond), self.schedule[:, 1:].expand(-1, uncond)]
        base = torch.cat(pieces, dim=1)
        if isinstance(factor, Tensor) and cond and uncond:
            factor = torch.cat([factor, factor], dim=-1)
        self.strength.zero_()
        self.strength[:, :rows].copy_(base * factor)
        self.slot.zero_()
        self.slot[:, :rows].copy_(self.choice * (base != 0))
        self.rows = rows

    @torch.no_grad()
    def settle(self, runs: Tensor | None = None, covered: Tensor | None = None) -> None:
        """Add up what was counted since the last write; it belongs to the rows as they are now. No sync.

        Args:
            runs: int64 `[S]`, runs of the part since then that said which tokens of their rows count.
            covered: int64 `[S, R]`, how many tokens those were.
        """
        calls, lengths = self.visits >> _CALL_BIT, self.visits & (_CALL - 1)
        active = (self.slot != 0) & (self.strength != 0)
        self.calls += calls
        tokens = active.sum(1) * lengths
        if runs is not None and covered is not None and self.span is not None:
            inside = (active[: len(runs), : covered.shape[1]] * covered).sum(1) * calls[: len(runs)]
            tokens[: len(runs)] = torch.where(runs > 0, inside // runs.clamp_min(1), tokens[: len(runs)])
        self.tokens += tokens
        self.visits.zero_()

    def to(self, device: torch.device) -> "Table":
        """Move the table; tensors are replaced, so graphs that were captured with it are void."""
        device = torch.device(device)
        with torch.inference_mode(False), torch.no_grad():
            self.bank = {name: tensor.to(device) for name, tensor in self.bank.items()}
            for name in ("one", "slot", "strength", "choice", "schedule", "index", "visits", "calls", "tokens"):
                setattr(self, name, getattr(self, name).to(device))
        self.span = None if self.span is None else self.span.to(device)
        self.device = self.slot.device
        return self
