"""Fit a method at a list of sites of a model, from generations of two sets of prompts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.fitted import Fitted, stack_fits
from pysteer.capture.generation import Generate, default_generate, run_steps
from pysteer.capture.groups import Groups, align_tokens
from pysteer.capture.lockstep import Arrival, in_lockstep
from pysteer.capture.recorder import Recorder
from pysteer.capture.taps import PartRows, as_tokens, choose_sites, refuse_steered, tapped
from pysteer.errors import InputError, PysteerError
from pysteer.families.base import find_family
from pysteer.methods import Method, SiteFit
from pysteer.methods.base import check_choice
from pysteer.steering.call import Call
from pysteer.steering.positions import Positions
from pysteer.steering.site import Site

Progress = Callable[[int, int], object]


def fit(
    pipe: Any,
    method: Method,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    *,
    sites: str | Iterable[str],
    steps: Iterable[int] | None = None,
    sequential: bool = False,
    shared: bool = False,
    seeds: int | Sequence[int] = 0,
    negatives: Sequence[str] | None = None,
    paired: bool = True,
    control: str | None = None,
    rows: str = "cond",
    positions: Positions = "all",
    batch_size: int = 64,
    fit_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit `method` at every site and step.

    At once: all prompts are generated unsteered, in batches, and every (site, step) is fitted on its own. Memory: the
    recorded activations, `4 (N + M + Q) sum over (site, step) of L D` bytes for N source, M target and Q negative
    prompts; with a method that pools, L is 1.

    Sequential: one generation of all prompts. Whenever a site is reached it is fitted, and from then on the source rows
    are steered by it, so that every site is fitted with the edits of all earlier sites and steps active (including text
    sites). However many sites there are, every prompt runs once. A language model takes the prompts in batches that
    wait for each other at every site. Other pipelines need all prompts in one batch of R = 2 (N + M + Q) rows (half
    that without guidance): for a transformer of `depth` blocks and T tokens over all scales the cache takes
    `8 depth R T D` bytes in fp32.

    Args:
        pipe: a pipeline (or, with `generate`, a model) of a known family.
        method: the method with its configuration, for example `Prototype(clusters=64)`.
        source_prompts: prompts of the class to change, N of them.
        target_prompts: prompts of the class to reach; when `paired`, prompt i is source prompt i with the class word
            changed, and both are generated from the same noise.
        sites: names; "ca_block" stands for all layers. Text and visual sites may be mixed.
        steps: visual steps, None for all. Text sites and `pooled` have step 0 only.
        sequential: fit every site with the earlier ones steered.
        shared: fit one set of parameters per site, from all the steps together; it then serves every step.
        seeds: noise seed of the first prompt, counting up, or one seed per source prompt (and then per target prompt,
            when not paired).
        negatives: prompts of other classes, whose activations should stay as they are (methods that can).
        paired: whether the prompts are pairs.
        control: None, or "shuffled": the labels of the N + M prompts are permuted and pairs dissolved, a fit that must
            not work.
        rows: rows steered during a sequential fit, and by default later: "cond", "uncond" or "both". Parameters are
            always fitted from the conditional rows.
        positions: tokens of every text that enter the fit, see `pysteer.steer`; `slice(1, None)` leaves out the first
            token, whose activations dwarf all others in many language models.
        batch_size: prompts per batch; not used in a sequential fit of an image generator.
        fit_seed: seed of the method and of the shuffle.
        settings: passed on to `pipe(...)`: cfg, tau, top_p, negative_prompts and so on.
        generate: `f(prompts, seeds)` that runs the model; by default `pipe(prompts, seeds=seeds, decode=False,
            **settings)`.
        progress: called as `f(done, total)` after every fitted (site, step).

    Returns:
        The fitted parameters, in the order of the model's execution.

    Raises:
        InputError: unknown sites or steps, prompts that do not pair up, a method that cannot do what is asked.
    """
    if control is not None:
        check_choice("control", control, ("shuffled",))
    check_choice("rows to steer", rows, ("cond", "uncond", "both"))
    if type(batch_size) is not int or batch_size < 1:
        raise InputError("batch_size", value=batch_size, allowed="a whole number above 0")
    if isinstance(positions, Tensor):
        raise InputError("positions to fit", value="a mask", allowed='"all", "last" or a slice')
    if shared and sequential:
        raise InputError("sequential", value="with shared", allowed="one of the two")
    family = find_family(pipe)
    chosen = choose_sites(family, pipe, sites)
    visual_steps = _checked_steps(steps, run_steps(family, pipe, chosen, settings or {}))
    prompts = _PromptSets.make(source_prompts, target_prompts, negatives, seeds, paired)
    if control == "shuffled":
        prompts = prompts.shuffled(fit_seed)
    if generate is None:
        generate = default_generate(pipe, chosen, settings or {})
    work = _Work(pipe, method, chosen, visual_steps, prompts, rows, positions, fit_seed, generate, progress, shared)
    fits = work.sequential(batch_size) if sequential else work.at_once(batch_size)
    parts = {site.name: site.part for site in chosen}
    parameters = [
        stack_fits(name, method.op, by_step, lasting=shared or family.lasting(pipe, parts[name]))
        for name, by_step in fits.items()
    ]
    meta = {
        "sites": [entry.site for entry in parameters],
        "steps": list(visual_steps),
        "rows": rows,
        "positions": [positions.start, positions.stop] if isinstance(positions, slice) else positions,
        "sequential": sequential,
        "shared": shared,
        "paired": prompts.groups.paired,
        "control": control,
        "source_prompts": prompts.groups.source,
        "target_prompts": prompts.groups.target,
        "negative_prompts": prompts.groups.negatives,
        "fit_seed": fit_seed,
    }
    return Fitted(method, parameters, meta)


def _checked_steps(steps: Iterable[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if steps is None else tuple(steps)
    for step in chosen:
        if type(step) is not int or not 0 <= step < count:
            raise InputError("step to fit", value=step, allowed=f"0 to {count - 1}")
    if len(set(chosen)) != len(chosen) or not chosen:
        raise InputError("steps to fit", value=list(chosen), allowed="at least one, each once")
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class _PromptSets:
    """All prompts with their seeds, in the order source, target, negatives."""

    prompts: list[str]
    seeds: list[int]
    groups: Groups

    @classmethod
    def make(
        cls,
        source: Sequence[str],
        target: Sequence[str],
        negatives: Sequence[str] | None,
        seeds: int | Sequence[int],
        paired: bool,
    ) -> "_PromptSets":
        for what, given in (("source", source), ("target", target), ("negative", negatives if negatives else [""])):
            if isinstance(given, str) or not given or not all(isinstance(prompt, str) for prompt in given):
                raise InputError(f"{what} prompts", value=given, allowed="a list with at least one string")
        if paired and len(source) != len(target):
            value = f"{len(source)} and {len(target)}"
            raise InputError("numbers of paired prompts", value=value, allowed="equal", fix="or pass paired=False")
        others = list(negatives or [])
        own = len(source) + (0 if paired else len(target))
        numbers = list(range(seeds, seeds + own)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if len(numbers) != own:
            raise InputError("seeds", value=len(numbers), allowed=f"one number, or {own} of them")
        numbers += numbers[: len(source)] if paired else []
        first = max(numbers) + 1
        numbers += range(first, first + len(others))
        return cls([*source, *target, *others], numbers, Groups(len(source), len(target), len(others), paired))

    def shuffled(self, seed: int) -> "_PromptSets":
        """The same prompts and seeds with random labels; negatives keep theirs."""
        both = self.groups.source + self.groups.target
        order = torch.randperm(both, generator=torch.Generator().manual_seed(seed)).tolist()
        order += range(both, len(self.prompts))
        groups = replace(self.groups, paired=False)
        return _PromptSets([self.prompts[i] for i in order], [self.seeds[i] for i in order], groups)

    def aligned(self, pipe: Any) -> "_PromptSets":
        """With the token positions of paired texts that belong together."""
        if not self.groups.paired or not hasattr(pipe, "token_ids"):
            return self
        count = self.groups.source
        ids = pipe.token_ids(self.prompts[: 2 * count])
        pairs = [align_tokens(ids[i], ids[count + i]) for i in range(count)]
        first, second = (tuple(torch.tensor(pair[side]) for pair in pairs) for side in (0, 1))
        return replace(self, groups=replace(self.groups, source_positions=first, target_positions=second))


class _Work:
    """One call of `fit`."""

    def __init__(
        self,
        pipe: Any,
        method: Method,
        sites: list[Site],
        steps: tuple[int, ...],
        prompts: _PromptSets,
        rows: str,
        positions: Positions,
        seed: int,
        generate: Generate,
        progress: Progress | None,
        shared: bool,
    ) -> None:
        self.pipe, self.method, self.sites, self.rows, self.seed = pipe, method, sites, rows, seed
        self.positions = positions
        texts = any(site.part == "text" for site in sites) and positions == "all"
        self.prompts = prompts.aligned(pipe) if texts else prompts
        self.generate, self.progress = generate, progress
        family = find_family(pipe)
        self.steps = {site.name: (0,) if family.once(pipe, site) else steps for site in sites}
        self.wanted = {name: own[-1:] if shared else own for name, own in self.steps.items()}  # at which it is fitted
        self.total = sum(len(steps) for steps in self.wanted.values())
        self.fits: dict[str, dict[int, SiteFit]] = {}

    def at_once(self, batch_size: int) -> dict[str, dict[int, SiteFit]]:
        """Fit everything from one unsteered pass over all prompts."""
        every = {step for steps in self.steps.values() for step in steps}
        names, pool = [site.name for site in self.sites], "mean" if self.method.pooled else "tokens"
        with Recorder(self.pipe, names, steps=every, positions=self.positions, pool=pool) as recorder:
            for start in range(0, len(self.prompts.prompts), batch_size):
                part = slice(start, start + batch_size)
                self.generate(self.prompts.prompts[part], self.prompts.seeds[part])
        for name, step in recorder.recorded():
            if step in self.wanted[name]:
                x, lengths = recorder.get(name, step), recorder.lengths(name, step)
                whole = bool((lengths == x.shape[1]).all())
                together = self.steps[name] if len(self.wanted[name]) == 1 else ()  # of all the steps, where they share
                x = torch.cat([recorder.get(name, each) for each in together], dim=1) if len(together) > 1 else x
                self._fit(recorder.sites[name], step, x, None if whole else lengths)
        return self._finished()

    def sequential(self, batch_size: int) -> dict[str, dict[int, SiteFit]]:
        """Fit every site when all prompts have reached it, and steer the source rows by it from there on."""
        prompts, seeds = self.prompts.prompts, self.prompts.seeds
        if batch_size >= len(prompts) or not hasattr(self.pipe, "read"):

            def see(site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
                return self._fit_and_steer([Arrival(site, step, x, rows)])[0]

            with tapped(self.pipe, self.sites, see, self.positions):
                self.generate(prompts, seeds)
            return self._finished()
        refuse_steered(find_family(self.pipe).root(self.pipe, self.sites[0].part))
        parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
        runs = [partial(self.generate, prompts[part], seeds[part]) for part in parts]
        in_lockstep(runs, self._fit_and_steer, lambda see: tapped(self.pipe, self.sites, see, self.positions))
        return self._finished()

    def _fit_and_steer(self, arrivals: list[Arrival]) -> list[Tensor]:
        """Fit a site from the activations of all batches, and steer the source rows of each."""
        site, step = arrivals[0].site, arrivals[0].step
        if step not in self.wanted[site.name] or any(a.rows.cond == 0 for a in arrivals):
            return [a.x for a in arrivals]
        fitted = self._fit(site, step, *_together(arrivals))
        answers, first = [], 0
        for _, _, x, rows in arrivals:
            spans = rows.spans if site.layout == "tokens" else None
            own = self._steered_rows(rows, self.prompts.groups.source - first)
            answers.append(_steered(x, self.method.op, fitted, own, site.layout, spans))
            first += rows.cond
        return answers

    def _steered_rows(self, rows: PartRows, sources: int) -> list[int]:
        """Rows of a batch whose first `sources` prompts are to be changed."""
        source = range(max(0, min(sources, rows.cond)))
        chosen = [rows.cond_rows.start + i for i in source] if self.rows != "uncond" else []
        return chosen + ([rows.uncond_rows.start + i for i in source] if self.rows != "cond" and rows.uncond else [])

    def _fit(self, site: Site, step: int, x: Tensor, lengths: Tensor | None) -> SiteFit:
        groups = self.prompts.groups
        if len(x) != groups.rows:
            raise PysteerError(f"site {site.name} ran with {len(x)} prompts, {groups.rows} were asked for")
        if step in self.fits.get(site.name, {}):
            raise PysteerError(f"site {site.name} ran twice at step {step}; fix: run the model once per fit")
        source, target, negatives = groups.split(x, lengths, self.method.pooled)
        means = {"rows": groups.split(x, lengths, True)} if self.method.needs_rows else {}
        fitted = self.method.fit_site(
            source, target, negatives=negatives, paired=groups.paired, seed=self.seed, **means
        )
        fitted.options.update(self.method.options_of_layout(site.layout))
        self.fits.setdefault(site.name, {})[step] = fitted
        if self.progress is not None:
            self.progress(sum(map(len, self.fits.values())), self.total)
        return fitted

    def _finished(self) -> dict[str, dict[int, SiteFit]]:
        for name, steps in self.wanted.items():
            missing = [step for step in steps if step not in self.fits.get(name, {})]
            if missing:
                raise PysteerError(f"site {name} never ran at step {missing[0]}, so it cannot be fitted")
        return self.fits


def _together(arrivals: list[Arrival]) -> tuple[Tensor, Tensor | None]:
    """The conditional rows of all batches `[N, L, D]`, and how many tokens of each count; None for all."""
    layout = arrivals[0].site.layout
    if layout != "tokens" or arrivals[0].rows.lengths is None:
        return torch.cat([as_tokens(a.x, layout)[a.rows.cond_rows] for a in arrivals]), None
    parts = [a.rows.valid_first(a.x)[a.rows.cond_rows] for a in arrivals]
    longest = max(part.shape[1] for part in parts)
    tokens = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
    lengths = [a.rows.lengths[a.rows.cond_rows] for a in arrivals if a.rows.lengths is not None]
    return tokens, torch.cat(lengths)


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
