"""A score for activation patching that needs no classifier: how far the result has come towards the target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError

Run = Callable[[list[str], list[int]], Any]
_LEAST = 1e-12  # distance of source and target, below which there is no way to go


def recovery(
    run: Run, source_prompts: Sequence[str], target_prompts: Sequence[str], seeds: Sequence[int]
) -> Callable[[Any], Tensor]:
    """Return a score for `locate`: 0 where the result is the source's, 1 where it is the target's.

    The score of a pair is `1 - d(patched, target) / d(source, target)`. For a language model d(a, b) is the
    Kullback-Leibler divergence of the next-token distribution of a from that of b, for an image generator the mean
    squared difference of the pictures. Runs the 2 N prompts once.

    Args:
        run: `f(prompts, seeds)`; what it returns has `logits` `[rows, tokens, V]` (the last token counts) or `images`.
        source_prompts, target_prompts, seeds: the N pairs, as for `locate`.

    Raises:
        InputError: a result that is neither; a pair whose source and target give the same result.
    """
    source = _result(run(list(source_prompts), list(seeds)))
    target = _result(run(list(target_prompts), list(seeds)))
    way = _distance(source, target)
    same = (way < _LEAST).nonzero().flatten().tolist()
    if same:
        pair = f"{source_prompts[same[0]]!r} and {target_prompts[same[0]]!r}"
        raise InputError("pair of prompts to locate", value=pair, allowed="two that give different results")
    count = len(way)

    def score(out: Any) -> Tensor:
        found = _result(out)
        groups = len(found) // count
        return 1 - _distance(found, target.repeat(groups, *[1] * (target.dim() - 1))) / way.repeat(groups)

    return score


def _result(out: Any) -> Tensor:
    """Log-probabilities of the next token `[rows, V]`, or pictures `[rows, ...]` in [0, 1]."""
    if getattr(out, "images", None) is not None:
        images: Tensor = out.images
        return images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    logits = getattr(out, "logits", None)
    if isinstance(logits, Tensor):
        return logits[:, -1].double().log_softmax(-1).cpu()
    raise InputError("result to score", value=type(out).__name__, allowed="one with images or logits")


def _distance(found: Tensor, target: Tensor) -> Tensor:
    if found.dim() == 2:  # KL(target || found)
        return (target.exp() * (target - found)).sum(-1)
    return (found - target).square().flatten(1).mean(1)
