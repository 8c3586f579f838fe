"""Examples of two classes and their activations, which any number of fits share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.fitted import Fitted, stack_fits
from pysteer.capture.generation import Generate, default_generate, run_steps
from pysteer.capture.groups import Groups, valid_means
from pysteer.capture.prompt_sets import PromptSets
from pysteer.capture.recorder import Recorder
from pysteer.capture.sequential import Activations, Progress, SequentialFit, SiteFits
from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError, PysteerError
from pysteer.families.base import find_family
from pysteer.methods import Method, SiteFit
from pysteer.methods.base import check_choice
from pysteer.steering.plan import SiteParameters
from pysteer.steering.positions import Positions


class Examples:
    """Prompts of two classes, run once for all the fits that use them.

    A prompt runs unsteered, in batches, when the first fit needs it; its activations are kept for later fits: of other
    methods, of fewer examples, with shuffled labels. A sequential fit runs its source prompts again, since those are
    steered while it is made; target and negatives are taken from what is kept.

        examples = pysteer.Examples(pipe, source, target, sites="ca")
        plans = [examples.fit(method).plan() for method in (MeanDifference(), Prototype(clusters=64))]

    Memory: `4 n sum over (site, step) of L D` bytes for the n prompts that have run, in a model of fp32; L is 1 with
    `pool="mean"`. Whatever is attached when a prompt runs acts on what is kept.

    Args:
        pipe, source_prompts, target_prompts, sites, steps, seeds, negatives, paired, positions, batch_size, settings,
            generate: as in `pysteer.fit`.
        pool: "tokens", or "mean" for methods that pool, which keeps one vector per prompt.

    Raises:
        InputError: unknown sites or steps, prompts that do not pair up.
    """

    def __init__(
        self,
        pipe: Any,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        sites: str | Iterable[str],
        steps: Iterable[int] | None = None,
        seeds: int | Sequence[int] = 0,
        negatives: Sequence[str] | None = None,
        paired: bool = True,
        positions: Positions = "all",
        pool: str = "tokens",
        batch_size: int = 64,
        settings: Mapping[str, Any] | None = None,
        generate: Generate | None = None,
    ) -> None:
        check_choice("pool of examples", pool, ("tokens", "mean"))
        if type(batch_size) is not int or batch_size < 1:
            raise InputError("batch_size", value=batch_size, allowed="a whole number above 0")
        if isinstance(positions, Tensor):
            raise InputError("positions to fit", value="a mask", allowed='"all", "last" or a slice')
        self.pipe, self.positions, self.pool, self.batch_size = pipe, positions, pool, batch_size
        self.family = find_family(pipe)
        self.sites = choose_sites(self.family, pipe, sites)
        self.visual_steps = _checked_steps(steps, run_steps(self.family, pipe, self.sites, settings or {}))
        self.prompts = PromptSets.make(source_prompts, target_prompts, negatives, seeds, paired)
        self.generate = generate or default_generate(pipe, self.sites, settings or {})
        self.steps = {site.name: (0,) if self.family.once(pipe, site) else self.visual_steps for site in self.sites}
        self._forget()

    def _forget(self) -> None:
        names, every = [site.name for site in self.sites], {step for steps in self.steps.values() for step in steps}
        self._places: dict[int, int] = {}  # row of the prompts -> row of what is recorded
        self._recorder = Recorder(self.pipe, names, steps=every, positions=self.positions, pool=self.pool)

    def fit(
        self,
        method: Method,
        *,
        first: int | None = None,
        sequential: bool = False,
        shared: bool = False,
        control: str | None = None,
        rows: str = "cond",
        fit_seed: int = 0,
        progress: Progress | None = None,
    ) -> Fitted:
        """Fit `method` at every site and step; equals `pysteer.fit` of the same prompts.

        Args:
            method: the method with its configuration.
            first: examples per side, the first ones; None for all.
            sequential, shared, control, rows, fit_seed, progress: as in `pysteer.fit`.

        Raises:
            InputError: fewer examples than asked for, a method that cannot do what is asked.
        """
        if self.pool != "tokens" and (sequential or not method.pooled):
            what = "a sequential fit" if sequential else method.name
            raise InputError("pool of examples", value=self.pool, allowed=f"tokens, which {what} is fitted from")
        asked = FitOptions(first, sequential, shared, control, rows, fit_seed, progress)
        return self.fit_with(method, asked, kept=True)

    def fit_with(self, method: Method, asked: FitOptions, kept: bool) -> Fitted:
        """Fit; without `kept` a sequential fit runs target and negatives beside the source and keeps nothing."""
        chosen = self.prompts.first(asked.first)
        chosen = chosen.shuffled(asked.seed) if asked.control == "shuffled" else chosen
        texts = any(site.part == "text" for site in self.sites) and self.positions == "all"
        chosen = chosen.aligned(self.pipe) if texts else chosen
        wanted = {name: steps[-1:] if asked.shared else steps for name, steps in self.steps.items()}
        own = SiteFits(method, chosen.groups, asked.seed, wanted, asked.progress)
        fits = self._sequential(own, chosen, asked.rows, kept) if asked.sequential else self._at_once(own, chosen)
        parts = {site.name: site.part for site in self.sites}
        parameters = [
            stack_fits(name, method.op, found, lasting=asked.shared or self.family.lasting(self.pipe, parts[name]))
            for name, found in fits.items()
        ]
        return Fitted(method, parameters, self._meta(parameters, chosen.groups, asked))

    def _meta(self, parameters: Sequence[SiteParameters], groups: Groups, asked: FitOptions) -> dict[str, Any]:
        positions = self.positions
        return {
            "sites": [entry.site for entry in parameters],
            "steps": list(self.visual_steps),
            "rows": asked.rows,
            "positions": [positions.start, positions.stop] if isinstance(positions, slice) else positions,
            "sequential": asked.sequential,
            "shared": asked.shared,
            "paired": groups.paired,
            "control": asked.control,
            "source_prompts": groups.source,
            "target_prompts": groups.target,
            "negative_prompts": groups.negatives,
            "fit_seed": asked.seed,
        }

    def _at_once(self, own: SiteFits, chosen: PromptSets) -> dict[str, dict[int, SiteFit]]:
        self._record(chosen.rows)
        for name, step in self._recorder.recorded():
            if step in own.steps[name]:
                # One set of parameters for all the steps is fitted from the activations of all of them.
                together = self.steps[name] if len(own.steps[name]) == 1 else (step,)
                parts = [self._activations(name, each, chosen.rows, own.method.pooled) for each in together]
                x, lengths = parts[0] if len(parts) == 1 else (torch.cat([x for x, _ in parts], dim=1), parts[-1][1])
                own.fit(self._recorder.sites[name], step, x, lengths)
        return own.finished()

    def _sequential(self, own: SiteFits, chosen: PromptSets, rows: str, kept: bool) -> dict[str, dict[int, SiteFit]]:
        unsteered = chosen.rows[chosen.groups.source :]
        if kept:
            self._record(unsteered)
        work = SequentialFit(
            self.pipe, self.sites, self.positions, self.generate, chosen, rows, own,
            known=(lambda site, step: self._activations(site, step, unsteered, False)) if kept else None,
        )  # fmt: skip
        return work.run(self.batch_size)

    def _record(self, rows: Sequence[int]) -> None:
        """Run those prompts that have not run yet."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._places]
        try:
            for start in range(0, len(missing), self.batch_size):
                part = missing[start : start + self.batch_size]
                with self._recorder:
                    self.generate(
                        [self.prompts.prompts[row] for row in part], [self.prompts.seeds[row] for row in part]
                    )
                for row in part:
                    self._places[row] = len(self._places)
        except BaseException:
            self._forget()  # some sites may hold rows of the batch that others do not
            raise

    def _activations(self, site: str, step: int, rows: Sequence[int], pooled: bool) -> Activations:
        """What is kept of `rows` `[N, L, D]`, pooled over the tokens if asked for, and how many tokens count."""
        x, lengths = self._recorder.get(site, step), self._recorder.lengths(site, step)
        if len(x) != len(self._places):
            raise PysteerError(
                f"site {site} ran with {len(x)} rows at step {step} for {len(self._places)} prompts; "
                "fix: run the model once per prompt"
            )
        places = torch.tensor([self._places[row] for row in rows])
        if places.tolist() != list(range(len(x))):
            x, lengths = x[places.to(x.device)], lengths[places]
            x = x[:, : int(lengths.max())]
        whole = None if bool((lengths == x.shape[1]).all()) else lengths
        if pooled and self.pool == "tokens":
            return (valid_means(x, lengths) if whole is not None else x.float().mean(1, keepdim=True)), None
        return x, whole


@dataclass(frozen=True)
class FitOptions:
    """What `Examples.fit` was asked for; see there.

    Raises:
        InputError: an unknown control or kind of rows, or both ways of fitting.
    """

    first: int | None = None
    sequential: bool = False
    shared: bool = False
    control: str | None = None
    rows: str = "cond"
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.control is not None:
            check_choice("control", self.control, ("shuffled",))
        check_choice("rows to steer", self.rows, ("cond", "uncond", "both"))
        if self.shared and self.sequential:
            raise InputError("sequential", value="with shared", allowed="one of the two")


def _checked_steps(steps: Iterable[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if steps is None else tuple(steps)
    for step in chosen:
        if type(step) is not int or not 0 <= step < count:
            raise InputError("step to fit", value=step, allowed=f"0 to {count - 1}")
    if len(set(chosen)) != len(chosen) or not chosen:
        raise InputError("steps to fit", value=list(chosen), allowed="at least one, each once")
    return tuple(sorted(chosen))
