"""Keeping the activations of whole runs."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.pooling import POOLS, padded_rows, pooled_rows
from pysteer.capture.taps import PartRows, as_tokens, choose_sites, tapped
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.methods.base import check_choice
from pysteer.steering.positions import Positions, check_positions
from pysteer.steering.site import Site


class Recorder:
    """Records activations while the `with` block runs the model; several runs are put behind each other, row by row.

    It reads after whatever was attached earlier: inside a `steer` block it sees the steered activations. It needs eager
    execution (it copies, and asks for the step on the host).

        with Recorder(pipe, ["ca_block", "text.output"], steps=[3, 4]) as recorder:
            pipe(prompts, seeds=seeds)
        recorder.get("ca_block.2", 3)  # [N, L, D]

    Memory: 4 bytes x rows x the sum of L x D over sites and steps, in the model's dtype.

    Args:
        obj: a model or pipeline.
        sites: names; "ffn" stands for all layers.
        steps: visual steps to keep, None for all; text sites and `pooled` have step 0 only and are always kept.
        rows: "cond", "uncond" or "all".
        positions: tokens of each row to keep, see `pysteer.steer`.
        pool: "tokens" keeps all of them; "mean" (or another of `pysteer.capture.pooling.POOLS`) one vector per row.
    """

    def __init__(
        self,
        obj: Any,
        sites: str | Iterable[str],
        *,
        steps: Iterable[int] | None = None,
        rows: str = "cond",
        positions: Positions = "all",
        pool: str = "tokens",
    ) -> None:
        check_choice("rows to record", rows, ("cond", "uncond", "all"))
        check_choice("pool", pool, tuple(POOLS))
        self._obj, self._rows, self._positions, self._pool = obj, rows, check_positions(positions), pool
        family = find_family(obj)
        self.sites = {site.name: site for site in choose_sites(family, obj, sites)}
        self._once = {name for name, site in self.sites.items() if family.once(obj, site)}
        self.steps = None if steps is None else frozenset(steps)
        self._kept: dict[tuple[str, int], list[Tensor]] = {}
        self._lengths: dict[tuple[str, int], list[Tensor]] = {}
        self._context: AbstractContextManager[None] | None = None

    def __enter__(self) -> "Recorder":
        self._context = tapped(self._obj, self.sites.values(), self._see, self._positions)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        assert self._context is not None
        self._context.__exit__(*exception)
        self._context = None

    def _see(self, site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
        wanted = {"cond": rows.cond_rows, "uncond": rows.uncond_rows, "all": slice(None)}[self._rows]
        if (site.name in self._once or self.steps is None or step in self.steps) and len(x[wanted]):
            known = rows.lengths if site.layout == "tokens" else None
            tokens = as_tokens(x.detach() if known is None else rows.valid_first(x.detach()), site.layout)[
                wanted
            ].clone()
            lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int64)
            if known is not None:
                lengths = known[wanted].to("cpu", torch.int64)
            if self._pool != "tokens":
                rows_kept = pooled_rows(tokens, None if known is None else lengths, self._pool)
                lengths = torch.tensor([len(row) for row in rows_kept])
                tokens = torch.stack([row if len(row) else tokens.new_zeros(1, tokens.shape[2]) for row in rows_kept])
            self._kept.setdefault((site.name, step), []).append(tokens)
            self._lengths.setdefault((site.name, step), []).append(lengths)
        return x

    def recorded(self) -> list[tuple[str, int]]:
        """(site, step) pairs that were seen, in the order of the model's execution."""
        return list(self._kept)

    def get(self, site: str, step: int = 0) -> Tensor:
        """Activations `[N, L, D]` in the model's dtype; rows of fewer tokens are padded with zeros."""
        return padded_rows(self._kept[self._key(site, step)])

    def lengths(self, site: str, step: int = 0) -> Tensor:
        """Valid tokens of each row, `[N]` int64."""
        return torch.cat(self._lengths[self._key(site, step)])

    def _key(self, site: str, step: int) -> tuple[str, int]:
        if (site, step) not in self._kept:
            seen = ", ".join(f"{name} step {number}" for name, number in self._kept) or "nothing"
            raise InputError(
                "not recorded", value=f"{site} step {step}", allowed=seen, fix="run the model in the block"
            )
        return site, step
