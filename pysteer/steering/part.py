"""The tables of one part of a model, which share clock, span and the rows of the batch."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.steering.positions import Positions, narrowed
from pysteer.steering.stack import Stack
from pysteer.steering.table import ALL_TOKENS, Table


@dataclass
class Part:
    """Tables of one part, and the rows of the batch that is about to run."""

    name: str
    steps: int
    clock: Tensor
    tables: list[Table] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    cond: int = 0
    uncond: int = 0
    uncond_first: bool = False
    span: Tensor | None = None
    runs: Tensor | None = None  # [S], runs that said which tokens of their rows count, since the tables were settled
    covered: Tensor | None = None  # [S, R], how many those were
    everything: bool = False  # whether the span was written for a run without lengths
    mixed: bool = True  # whether runs with and without lengths may have the same step
    positions: Positions = "all"
    mask: Tensor | None = None  # [R, L], where positions are a mask
    written: tuple[Any, ...] | None = None
    together: tuple[torch.device, int] | None = None  # where all tables were, and how often any table had moved by then

    @property
    def prompts(self) -> int:
        return max(self.cond, self.uncond)

    @property
    def device(self) -> torch.device:
        return self.tables[0].device

    def reserve(self, rows: int) -> None:
        """Make room for so many rows in every table; in powers of two, so that growing stays rare."""
        for table, stack in zip(self.tables, self.stacks, strict=True):
            room = rows if rows <= table.capacity else 1 << (rows - 1).bit_length()
            table.reserve(stack, self.steps, room)

    @torch.no_grad()
    def write_mask(self) -> None:
        """Write the mask of the tokens for the rows as they are: the same for cond and uncond rows of a prompt."""
        if not isinstance(self.positions, Tensor):
            return
        room = (self.tables[0].capacity, self.positions.shape[1])
        if self.mask is None or self.mask.shape != room or self.mask.device != self.device:
            with torch.inference_mode(False):
                self.mask = torch.zeros(room, dtype=torch.bool, device=self.device)
        chosen = self.positions.to(self.device)
        if self.cond and self.uncond:  # unconditional rows that prompts share are left alone whatever the mask says
            other = chosen[: self.uncond]
            chosen = torch.cat((other, chosen) if self.uncond_first else (chosen, other))
        self.mask[: len(chosen)].copy_(chosen)
        for table in self.tables:
            table.mask = self.mask if table.site.layout == "tokens" else None

    def settle(self) -> None:
        """Have every table add up what it counted, and begin anew."""
        for table in self.tables:
            table.settle(self.runs, self.covered)
        if self.runs is not None and self.covered is not None:
            self.runs.zero_()
            self.covered.zero_()

    def follow_clock(self, clock: Tensor) -> bool:
        """Have all tables where the clock is, and read it; returns whether one had to move."""
        # Looking at every table at every run takes longer than one of them takes to steer.
        if clock is self.clock and self.together == (clock.device, Table.moves):
            return False
        self.clock, device = clock, clock.device
        moved = [table for table in self.tables if table.device != device]
        for table in moved:  # weights may be elsewhere until they are needed (offloading)
            table.to(device)
        for table in self.tables:
            table.clock = clock
        self.together = (device, Table.moves)
        return bool(moved)

    @property
    def untouched(self) -> bool:
        """Whether all tokens of all rows count, and always did."""
        return self.span is None and isinstance(self.positions, str) and self.positions == "all"

    @torch.no_grad()
    def set_span(self, lengths: Tensor | None) -> None:
        """Touch the first `lengths[r]` tokens of row r, or those of a span `[R, 2]`; all tokens without lengths."""
        room = self.tables[0].capacity
        fits = self.span is not None and len(self.span) >= room and self.span.device == self.device
        shared = all(table.span is self.span for table in self.tables if table.site.layout == "tokens")
        if fits and shared and lengths is None and self.everything:
            return
        if not fits:
            self.settle()
            with torch.inference_mode(False):
                self.span = torch.zeros(room, 2, dtype=torch.int32, device=self.device)
                self.covered = torch.zeros(self.tables[0].steps, room, dtype=torch.int64, device=self.device)
                self.runs = torch.zeros(self.tables[0].steps, dtype=torch.int64, device=self.device)
        elif self.mixed and (lengths is None) != self.everything:
            self.settle()  # counted apart: what a run without lengths covers is not known here
        for table in self.tables:
            table.span = self.span if table.site.layout == "tokens" else None
        self.follow(lengths)

    def follow(self, lengths: Tensor | None) -> None:
        """Write lengths or spans of the rows of a batch; tensor code alone, for compiled graphs as well."""
        assert self.span is not None
        assert self.runs is not None
        assert self.covered is not None
        closed = isinstance(self.positions, slice) and self.positions.stop is not None
        whole = lengths is None and not closed
        self.everything = whole and self.mask is None
        self.span[:, 0] = 0
        self.span[:, 1] = ALL_TOKENS if whole else 0
        if self.everything:
            return
        if lengths is not None:
            if len(lengths) > len(self.span):
                allowed = f"at most {len(self.span)} in a compiled run"
                raise InputError("rows of the batch", value=len(lengths), allowed=allowed, fix="steer(..., capacity=)")
            self.span[: len(lengths)].copy_(narrowed(lengths, self.positions))
        now = torch.arange(len(self.runs), device=self.runs.device) == self.clock
        self.runs.add_(now)
        self.covered.add_(now[:, None] * self._covered(lengths is None))

    def _covered(self, whole: bool) -> Tensor:
        """How many tokens of every row count, `[R]`."""
        assert self.span is not None
        start, end = self.span.unbind(1)
        if self.mask is None:
            return end - start
        if whole and not self.mixed:  # a further token of a generation, which no mask is about
            return torch.zeros_like(start)
        place = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (self.mask & (place >= start[:, None]) & (place < end[:, None])).sum(1)
