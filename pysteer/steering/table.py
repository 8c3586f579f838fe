"""The steering table: what entries of one kind do at their site, as tensors that the op reads on the device.

Changing strength, schedule, parameters or the step is a write into these tensors, so a compiled graph or a captured
CUDA graph sees it without being made again. Only more rows or more steps than ever before allocate.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pysteer.errors import InputError, PysteerError
from pysteer.ops.prepared import count_at
from pysteer.steering.call import Call
from pysteer.steering.packed import KINDS, Kind, Pack, known_as
from pysteer.steering.plan import PlanEntry
from pysteer.steering.site import Site
from pysteer.steering.stack import Stack

ALL_TOKENS = torch.iinfo(torch.int32).max  # end of the span of a row that is touched as a whole
_DIMS = {"tokens": "[R, L, D]", "rows": "[R, D]", "channels": "[R, D, *spatial]"}

# One word per step counts calls and tokens, so that counting costs one scalar op per call and no sync: the low bits sum
# up the tokens per row of all calls, the high bits count the calls. It is emptied at every write.
_CALL_BIT = 36
_CALL = 1 << _CALL_BIT


class Table:
    """Applies a stack of entries at their site. A plain object: casting or saving the model does not touch it.

    Args:
        stack: parameters and schedules, already checked; one entry for all prompts or one per prompt.
        site: where it is applied.
        steps: S, how many steps the clock counts.
        clock: int64, 0-dim, shared by all tables of the part; read on the device.
        capacity: R to start with; grows when a batch has more rows.
        device: of the table; that of the clock by default.

    Attributes:
        bank: parameters of the op and its gate by name, fp32 (or int32) `[1 + sets, ...]`; set 0 is not used.
        whole: fp32, bank, slot and strength behind each other; they are views of it.
        common: tensors of the op that all sets share.
        slot: int32 `[S, R]`, the parameter set of each row; 0 leaves the row alone.
        strength: fp32 `[S, R]`.
        span: int32 `[R, 2]` or None, tokens `[start, end)` of each row that are touched; shared by the part.
        mask: bool `[R, L]` or None, further says which tokens of a run over L tokens are touched; shared by the part.
        rows: number of rows in the batch; None until the layout of the batch is known.
        moves: how often any table was moved to a device.
    """

    moves: ClassVar[int] = 0

    def __init__(
        self,
        stack: Stack,
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
        self.mask: Tensor | None = None
        self.rows: int | None = None
        self.op, self.one_plan = stack.first.op, stack.shared
        self.options: dict[str, Any] = dict(stack.first.options)
        with torch.inference_mode(False), torch.no_grad():
            self.one = torch.ones(1, dtype=torch.int64, device=self.device)
            self.common = {name: tensor.to(self.device) for name, tensor in stack.first.shared.items()}
            banks = {
                name: ((1 + stack.sets, *tensor.shape[1:]), _kept_as(tensor))
                for name, tensor in stack.first.tensors.items()
            }
            self.pack = Pack.of(banks)
            self._allocate(steps, capacity)
        self.load(stack)

    def _allocate(self, steps: int, capacity: int) -> None:
        self.visits = torch.zeros(steps, dtype=torch.int64, device=self.device)
        self.calls = torch.zeros_like(self.visits)
        self.tokens = torch.zeros_like(self.visits)
        self._take(self.pack.empty(steps, capacity, self.device))

    def _take(self, whole: Tensor) -> None:
        """Have everything in `whole`, and be ready for calls."""
        self.whole, layout = whole, self.site.layout
        for stays in (whole, self.visits):
            # What torch._dynamo.mark_static_address does, which takes seconds to import: captured CUDA graphs then read
            # and count where these are, and none is given up because it writes to an input.
            stays._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self.bank = self.pack.banks(whole)
        self.slot, self.strength = self.pack.table(whole, len(self.visits))
        self.call = Call.make(self.op, self.bank, self.options, layout, common=self.common, shared=self.one_plan)
        op = self.call.op
        options = {name: value for name, value in op.given.items() if not isinstance(value, Tensor)}
        self.kind = known_as(Kind(op.function, self.pack, options, layout, self.call.alone, bool(self.common)))

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
        if is_compiling():
            return self._traced(x)
        if self.mask is None and self.rows is not None:
            y = self.call.again(x, self.slot, self.strength, self.clock, self.span, self.visits, self.rows, _CALL)
            if y is not None:
                return y
        self._check_input(x)
        layout = self.site.layout
        count_at(self.visits, self.clock, self.one, _tokens(x, layout) + _CALL)
        if self.mask is None or layout != "tokens":
            return self.call(x, self.slot, self.strength, self.clock, self.span)
        return self._masked(x, self.mask)

    def _traced(self, x: Tensor) -> Tensor:
        """`apply` in a compiled graph, which checks before every run each object and tensor that is looked at here."""
        kind, mask = KINDS[self.kind], self.mask
        # Element-wise over S numbers, because Inductor would leave its fused code for a scatter.
        step = torch.arange(self.visits.shape[0], device=self.visits.device)
        self.visits.add_(torch.where(step == self.clock, _tokens(x, kind.layout) + _CALL, 0))
        if mask is not None and kind.layout == "tokens":
            return self._masked(x, mask)
        if kind.alone:
            common = self.common if kind.common else {}
            return kind.run(x, self.whole, self.clock, self.span, self.visits.shape[0], common)
        return self.call(x, self.slot, self.strength, self.clock, self.span)

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` with the tokens steered that the mask `[R, L]` says."""
        if _tokens(x, "tokens") != mask.shape[1]:  # a run over other tokens than the mask is about
            return x.clone()
        mask = mask[: len(x)]
        y = self.call(x, self.slot, self.strength, self.clock, self.span, mask)
        return torch.where(mask.view(*x.shape[:-1], 1), y, x)

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
            self.call(x, self.slot, self.strength, clock, None)
        except InputError as error:
            where = f"parameters of site {self.site.name} (width {width})"
            raise InputError(f"{where} do not fit: {error}", fix="fit them for this model") from error

    @torch.no_grad()
    def load(self, stack: Stack) -> None:
        """Take over parameters and schedules of the same shapes, in place; `write` makes them effective."""
        first, begin = 1, {}
        for parameters in stack.parameters:
            begin[id(parameters)] = first
            for name, tensor in parameters.tensors.items():
                self.bank[name][first : first + parameters.sets].copy_(tensor)
            first += parameters.sets
        choice, schedule = [], []  # by column: which set at which step, and how strongly for cond and uncond rows
        for entry in stack.entries:
            own = None if entry is None else begin[id(entry.parameters)]
            choice.append([_set_of(entry, own, step) for step in range(self.steps)])
            schedule.append([(0.0, 0.0) if entry is None else entry.at(step) for step in range(self.steps)])
        self.choice = torch.tensor(choice, dtype=torch.int32, device=self.device).T.contiguous()
        self.schedule = torch.tensor(schedule, dtype=torch.float32, device=self.device).permute(2, 1, 0).contiguous()

    def reserve(self, stack: Stack, steps: int, rows: int) -> None:
        """Make room for more steps or rows; allocates only then. Settled counts are kept."""
        if steps <= self.steps and rows <= self.capacity:
            return
        calls, tokens, known = self.calls, self.tokens, self.steps
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(max(steps, known), max(rows, self.capacity))
            self.span = None  # of the old capacity; the part gives a new one
            self.calls[:known] = calls
            self.tokens[:known] = tokens
        self.load(stack)

    @torch.no_grad()
    def write(self, cond: int, uncond: int, factor: float | Tensor = 1.0, *, uncond_first: bool = False) -> None:
        """Write slot and strength for a batch of `[cond rows | uncond rows]`, in place, after `settle`.

        Args:
            factor: multiplies the schedule: a number, or fp32 `[B]` or `[S, B]` for B prompts.
            uncond_first: the batch is `[uncond rows | cond rows]`.
        """
        rows = cond + uncond
        pieces = [self.schedule[0].expand(-1, cond)] if cond else []
        choice = [self.choice.expand(-1, cond)] if cond else []
        if uncond:
            place = 0 if uncond_first else len(pieces)
            shared = cond > 0 and uncond != cond  # by several prompts; nothing acts on them
            own, sets = self.schedule[1], self.choice
            if shared:
                own, sets = torch.zeros_like(own[:, :1]), sets[:, :1]
            pieces.insert(place, own.expand(-1, uncond))
            choice.insert(place, sets.expand(-1, uncond))
        base = torch.cat(pieces, dim=1)
        if isinstance(factor, Tensor) and cond and uncond:
            other = factor if cond == uncond else factor.new_ones(*factor.shape[:-1], uncond)
            factor = torch.cat([other, factor] if uncond_first else [factor, other], dim=-1)
        self.strength.zero_()
        self.strength[:, :rows].copy_(base * factor)
        self.slot.zero_()
        self.slot[:, :rows].copy_(torch.cat(choice, dim=1) * (base != 0))
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
        Table.moves += 1
        with torch.inference_mode(False), torch.no_grad():
            self.common = {name: tensor.to(device) for name, tensor in self.common.items()}
            for name in ("one", "choice", "schedule", "visits", "calls", "tokens"):
                setattr(self, name, getattr(self, name).to(device))
            self._take(self.whole.to(device))
        self.span = None if self.span is None else self.span.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)
        self.device = self.slot.device
        return self


def _tokens(x: Tensor, layout: str) -> int:
    """Tokens per row of an activation."""
    return math.prod(x.shape[2:] if layout == "channels" else x.shape[1:-1])


def _kept_as(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _set_of(entry: PlanEntry | None, begin: int | None, step: int) -> int:
    """Which set of the bank an entry uses at a step, its own ones beginning at `begin`; 0 for none."""
    if entry is None or begin is None:
        return 0
    steps = entry.parameters.steps
    if steps is None:
        return begin
    return begin + steps.index(step) if step in steps else 0
