"""Fitting site after site in one generation, every site with the edits of all earlier ones active."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.generation import Generate
from pysteer.capture.groups import Groups
from pysteer.capture.lockstep import Arrival, in_lockstep
from pysteer.capture.pooling import padded_rows
from pysteer.capture.prompt_sets import PromptSets
from pysteer.capture.taps import PartRows, as_tokens, refuse_steered, tapped
from pysteer.errors import PysteerError
from pysteer.families.base import find_family
from pysteer.methods import Method, SiteFit
from pysteer.steering.call import Call
from pysteer.steering.positions import Positions
from pysteer.steering.site import Site

Progress = Callable[[int, int], object]
Activations = tuple[Tensor, Tensor | None]  # [N, L, D], and how many tokens of each row count; None for all


@dataclass
class SiteFits:
    """What is fitted, site by site and step by step.

    Attributes:
        method, groups, seed: of the fit.
        steps: site -> the steps at which it is fitted.
        progress: told `(done, total)` after every one.
        fits: site -> step -> what was fitted.
    """

    method: Method
    groups: Groups
    seed: int
    steps: dict[str, tuple[int, ...]]
    progress: Progress | None = None
    fits: dict[str, dict[int, SiteFit]] = field(default_factory=dict)

    def fit(self, site: Site, step: int, x: Tensor, lengths: Tensor | None) -> SiteFit:
        """Fit the method from the activations `[rows, L, D]` of all groups."""
        groups, method = self.groups, self.method
        if len(x) != groups.rows:
            raise PysteerError(f"site {site.name} ran with {len(x)} prompts, {groups.rows} were asked for")
        if step in self.fits.get(site.name, {}):
            raise PysteerError(f"site {site.name} ran twice at step {step}; fix: run the model once per fit")
        source, target, negatives = groups.split(x, lengths, method.pooled)
        means = {"rows": groups.split(x, lengths, True)} if method.needs_rows else {}
        fitted = method.fit_site(source, target, negatives=negatives, paired=groups.paired, seed=self.seed, **means)
        fitted.options.update(method.options_of_layout(site.layout))
        self.fits.setdefault(site.name, {})[step] = fitted
        if self.progress is not None:
            self.progress(sum(map(len, self.fits.values())), sum(map(len, self.steps.values())))
        return fitted

    def finished(self) -> dict[str, dict[int, SiteFit]]:
        """All of them.

        Raises:
            PysteerError: a site that never ran.
        """
        for name, steps in self.steps.items():
            missing = [step for step in steps if step not in self.fits.get(name, {})]
            if missing:
                raise PysteerError(f"site {name} never ran at step {missing[0]}, so it cannot be fitted")
        return self.fits


@dataclass
class SequentialFit:
    """One fit of sites one after the other.

    Attributes:
        pipe, sites, positions, generate: what runs, and what is read.
        prompts: of all groups.
        rows: rows of the source that are steered: cond, uncond or both.
        own: what is fitted.
        known: gives the unsteered activations of target and negatives at a site and step, which then do not run; None
            runs them beside the source.
    """

    pipe: Any
    sites: list[Site]
    positions: Positions
    generate: Generate
    prompts: PromptSets
    rows: str
    own: SiteFits
    known: Callable[[str, int], Activations] | None = None

    def run(self, batch_size: int) -> dict[str, dict[int, SiteFit]]:
        """Fit every site when all prompts have reached it, and steer the source rows by it from there on."""
        count = len(self.prompts.prompts) if self.known is None else self.prompts.groups.source
        prompts, seeds = self.prompts.prompts[:count], self.prompts.seeds[:count]
        if batch_size >= count or not hasattr(self.pipe, "read"):

            def see(site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
                return self._fit_and_steer([Arrival(site, step, x, rows)])[0]

            with tapped(self.pipe, self.sites, see, self.positions):
                self.generate(prompts, seeds)
            return self.own.finished()
        refuse_steered(find_family(self.pipe).root(self.pipe, self.sites[0].part))
        parts = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
        runs = [partial(self.generate, prompts[part], seeds[part]) for part in parts]
        in_lockstep(runs, self._fit_and_steer, lambda see: tapped(self.pipe, self.sites, see, self.positions))
        return self.own.finished()

    def _fit_and_steer(self, arrivals: list[Arrival]) -> list[Tensor]:
        """Fit a site from the activations of all batches, and steer the source rows of each."""
        site, step = arrivals[0].site, arrivals[0].step
        if step not in self.own.steps[site.name] or any(a.rows.cond == 0 for a in arrivals):
            return [a.x for a in arrivals]
        seen = _together(arrivals)
        fitted = self.own.fit(site, step, *(seen if self.known is None else _joined(seen, self.known(site.name, step))))
        answers, first = [], 0
        for _, _, x, rows in arrivals:
            spans = rows.spans if site.layout == "tokens" else None
            own = self._steered_rows(rows, self.prompts.groups.source - first)
            answers.append(_steered(x, self.own.method.op, fitted, own, site.layout, spans))
            first += rows.cond
        return answers

    def _steered_rows(self, rows: PartRows, sources: int) -> list[int]:
        """Rows of a batch whose first `sources` prompts are to be changed."""
        source = range(max(0, min(sources, rows.cond)))
        chosen = [rows.cond_rows.start + i for i in source] if self.rows != "uncond" else []
        return chosen + ([rows.uncond_rows.start + i for i in source] if self.rows != "cond" and rows.uncond else [])


def _joined(first: Activations, second: Activations) -> Activations:
    """The rows of `first`, then those of `second`."""
    (x, own), (y, others) = first, second
    rows = padded_rows((x, y.to(x)))
    if own is None and others is None and x.shape[1] == y.shape[1]:
        return rows, None
    counts = [torch.full((len(p),), p.shape[1]) if n is None else n.cpu() for p, n in ((x, own), (y, others))]
    return rows, torch.cat(counts)


def _together(arrivals: list[Arrival]) -> Activations:
    """The conditional rows of all batches `[N, L, D]`, and how many tokens of each count; None for all."""
    layout = arrivals[0].site.layout
    if layout != "tokens" or arrivals[0].rows.lengths is None:
        return torch.cat([as_tokens(a.x, layout)[a.rows.cond_rows] for a in arrivals]), None
    parts = [a.rows.valid_first(a.x)[a.rows.cond_rows] for a in arrivals]
    lengths = [a.rows.lengths[a.rows.cond_rows] for a in arrivals if a.rows.lengths is not None]
    return padded_rows(parts), torch.cat(lengths)


def _steered(x: Tensor, op: str, fitted: SiteFit, rows: list[int], layout: str, spans: Tensor | None) -> Tensor:
    """`x` with `rows` moved by the fitted parameters, strength 1, through the op that will serve later."""
    if not rows:
        return x
    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in fitted.tensors.items()}
    call = Call.make(op, banks, fitted.options, layout, common=fitted.shared)
    slot = torch.zeros(1, len(x), dtype=torch.int32, device=x.device)
    slot[0, rows] = 1
    span = None if spans is None else spans.to(x.device, torch.int32)
    clock = torch.zeros((), dtype=torch.int64, device=x.device)
    strength = torch.ones(1, len(x), device=x.device)
    return call(x, slot, strength, clock, span)
