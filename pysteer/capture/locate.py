"""Find the sites and steps that carry a concept: patch activations of one run into another and see what comes out.

Activation patching: while a source prompt is generated, its activations at a place are replaced by those that the
target prompt has there in a run from the same noise. Where the result turns into the target, the place carries the
difference of the two prompts, and a method fitted there can turn it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.generation import whole_run
from pysteer.capture.groups import align_tokens
from pysteer.capture.taps import PartRows, choose_sites, tapped
from pysteer.errors import InputError, PysteerError
from pysteer.families.base import find_family
from pysteer.steering.site import Site

Score = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Place:
    """Sites that are patched together, and at which steps (None for all).

    Attributes:
        sites: names; "ca" stands for all layers.
        steps: steps of the sites' clock; sites that run once (texts, pooled vectors) are patched whatever is given.
    """

    sites: tuple[str, ...]
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Located:
    """What patching did.

    Attributes:
        places: what was patched.
        scores: `[places, N]` fp32, the score of every source prompt with a place patched.
        source, target: `[N]`, the scores of the source and the target prompts as they are.
    """

    places: list[Place]
    scores: Tensor
    source: Tensor
    target: Tensor

    def best(self) -> list[int]:
        """Indices of the places, the highest mean score first."""
        return self.scores.mean(1).argsort(descending=True, stable=True).tolist()


def locate(
    pipe: Any,
    source_prompts: Sequence[str],
    target_prompts: Sequence[str],
    places: Iterable[Place],
    *,
    score: Score,
    seeds: Sequence[int],
    batch_size: int = 256,
    generate: Callable[[list[str], list[int]], Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Located:
    """Patch the target's activations into the source's run, place by place.

    Several places share a batch as rows, beside one set of target rows that all of them take from.

    Args:
        pipe: a pipeline of a known family.
        source_prompts, target_prompts: pairs, N each; generated from the same noise.
        places: what to patch.
        score: of what `generate` returns, a number per prompt `[rows]`, for example 1 where the target class shows.
        seeds: noise seed of every pair.
        batch_size: most prompts in a batch; at least 2 N.
        generate: `f(prompts, seeds)`; by default `pipe(prompts, seeds=seeds)`, or for a language model one reading of
            the prompts, with the logits of the last token.
        progress: told how many places are done, after every batch.

    Raises:
        InputError: unknown sites, prompts or seeds that do not pair up, a batch that is too small.
    """
    family = find_family(pipe)
    wanted = list(places)
    sites = [choose_sites(family, pipe, place.sites) for place in wanted]
    count = len(source_prompts)
    if not count or len(target_prompts) != count or len(seeds) != count:
        given = f"{count}, {len(target_prompts)} and {len(seeds)}"
        raise InputError("numbers of source prompts, target prompts and seeds", value=given, allowed="equal, above 0")
    if batch_size < 2 * count:
        raise InputError("batch_size", value=batch_size, allowed=f"at least {2 * count}, twice the prompts")
    run = generate or whole_run(pipe)
    work = _Patching(pipe, list(source_prompts), list(target_prompts), list(seeds), run, score)
    first = work.score([], [])
    share, rows = batch_size // count - 1, []
    for start in range(0, len(wanted), share):
        chunk = slice(start, start + share)
        rows.append(work.score(wanted[chunk], sites[chunk])[:-1])
        if progress is not None:
            progress(len(wanted[chunk]))
    plain = work.run_plain()
    scores = torch.cat(rows) if rows else torch.zeros(0, count)
    return Located(wanted, scores, plain, first[-1])


class _Patching:
    """Batches of `[source rows of place 1 | of place 2 | ... | target rows]`."""

    def __init__(
        self, pipe: Any, source: list[str], target: list[str], seeds: list[int], run: Callable[..., Any], score: Score
    ) -> None:
        self.pipe, self.source, self.target, self.seeds, self.run, self.rate = pipe, source, target, seeds, run, score
        self.family = find_family(pipe)
        self.pairs: list[tuple[list[int], list[int]]] | None = None
        if hasattr(pipe, "token_ids"):
            ids = pipe.token_ids([*source, *target])
            count = len(source)
            self.pairs = [align_tokens(ids[i], ids[count + i]) for i in range(count)]

    def run_plain(self) -> Tensor:
        """Scores of the source prompts, unpatched."""
        return self._checked(self.rate(self.run(self.source, self.seeds)), len(self.source))

    def score(self, places: list[Place], sites: list[list[Site]]) -> Tensor:
        """Scores `[places + 1, N]`; the last row is that of the target prompts."""
        groups, count = len(places), len(self.source)
        every = {site.name: site for own in sites for site in own}
        members = {name: [i for i in range(groups) if name in {s.name for s in sites[i]}] for name in every}

        def see(site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
            once = self.family.once(self.pipe, site)
            chosen = [i for i in members[site.name] if once or step in (places[i].steps or (step,))]
            return self._patched(site, x, rows, chosen, groups) if chosen else x

        prompts, seeds = self.source * groups + self.target, self.seeds * (groups + 1)
        with tapped(self.pipe, every.values(), see):
            found = self.rate(self.run(prompts, seeds))
        return self._checked(found, len(prompts)).view(groups + 1, count)

    def _patched(self, site: Site, x: Tensor, rows: PartRows, chosen: list[int], groups: int) -> Tensor:
        count, y = len(self.source), x.clone()
        halves = [rows.cond_rows.start] if rows.cond else []
        halves += [rows.uncond_rows.start] if rows.uncond and not (halves and site.part == "text") else []
        for offset in halves:
            takes = slice(offset + groups * count, offset + (groups + 1) * count)
            for i in chosen:
                into = slice(offset + i * count, offset + (i + 1) * count)
                if site.part == "text" and site.layout == "tokens" and self.pairs is not None:
                    for row, (here, there) in enumerate(self.pairs):
                        a, b = into.start + row, takes.start + row
                        y[a, _shifted(here, rows, a)] = x[b, _shifted(there, rows, b)]
                else:
                    y[into] = x[takes]
        return y

    @staticmethod
    def _checked(scores: Tensor, rows: int) -> Tensor:
        if not isinstance(scores, Tensor) or scores.shape != (rows,):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PysteerError(f"the score gave {got}; it has to be a tensor [{rows}], one number per prompt")
        return scores.float().cpu()


def _shifted(places: list[int], rows: PartRows, row: int) -> list[int]:
    """Places among the tokens of a row as places in the batch, where a row may begin with padding."""
    first = 0 if rows.spans is None else int(rows.spans[row, 0])
    return [first + place for place in places]
