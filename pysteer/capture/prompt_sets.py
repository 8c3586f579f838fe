"""The prompts of a fit with their noise seeds, and which of them are source, target and negatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pysteer.capture.groups import Groups, align_tokens
from pysteer.errors import InputError


@dataclass(frozen=True)
class PromptSets:
    """Prompts with their seeds, in the order source, target, negatives.

    Attributes:
        prompts, seeds: of every row.
        groups: how many of them are what.
        rows: which row of the full sets each one is.
    """

    prompts: list[str]
    seeds: list[int]
    groups: Groups
    rows: list[int]

    @classmethod
    def make(
        cls,
        source: Sequence[str],
        target: Sequence[str],
        negatives: Sequence[str] | None,
        seeds: int | Sequence[int],
        paired: bool,
    ) -> "PromptSets":
        """All prompts; see `pysteer.fit` for the arguments.

        Raises:
            InputError: something that is not text, pairs that do not match, another number of seeds.
        """
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
        prompts = [*source, *target, *others]
        return cls(prompts, numbers, Groups(len(source), len(target), len(others), paired), list(range(len(prompts))))

    def first(self, count: int | None) -> "PromptSets":
        """The first `count` of source and target each, and all negatives; None for all.

        Raises:
            InputError: there are not that many.
        """
        if count is None:
            return self
        source, target = self.groups.source, self.groups.target
        if type(count) is not int or not 1 <= count <= min(source, target):
            raise InputError("examples per side", value=count, allowed=f"1 to {min(source, target)}")
        kept = [*range(count), *range(source, source + count), *range(source + target, len(self.prompts))]
        return self._chosen(kept, replace(self.groups, source=count, target=count))

    def shuffled(self, seed: int) -> "PromptSets":
        """The same prompts and seeds with random labels; negatives keep theirs."""
        both = self.groups.source + self.groups.target
        order = torch.randperm(both, generator=torch.Generator().manual_seed(seed)).tolist()
        order += range(both, len(self.prompts))
        return self._chosen(order, replace(self.groups, paired=False))

    def aligned(self, pipe: Any) -> "PromptSets":
        """With the token positions of paired texts that belong together."""
        if not self.groups.paired or not hasattr(pipe, "token_ids"):
            return self
        count = self.groups.source
        ids = pipe.token_ids(self.prompts[: 2 * count])
        pairs = [align_tokens(ids[i], ids[count + i]) for i in range(count)]
        first, second = (tuple(torch.tensor(pair[side]) for pair in pairs) for side in (0, 1))
        return replace(self, groups=replace(self.groups, source_positions=first, target_positions=second))

    def _chosen(self, order: Sequence[int], groups: Groups) -> "PromptSets":
        prompts, seeds = [self.prompts[i] for i in order], [self.seeds[i] for i in order]
        return PromptSets(prompts, seeds, groups, [self.rows[i] for i in order])
