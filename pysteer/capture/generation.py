"""How a model is run over prompts when its activations are read."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pysteer.errors import InputError
from pysteer.families.base import Family
from pysteer.steering.site import Site

Generate = Callable[[list[str], list[int]], object]


def default_generate(pipe: Any, sites: list[Site], settings: Mapping[str, Any]) -> Generate:
    """`f(prompts, seeds)` that runs as much of `pipe` as reaches `sites`.

    Args:
        pipe: a language model with its tokenizer, or a pipeline.
        sites: where activations are read.
        settings: passed on to the model.

    Raises:
        InputError: a bare model, which does not take prompts.
    """
    if hasattr(pipe, "read"):
        chosen = {**_without_waste(pipe.model), **settings}
        return lambda prompts, seeds: pipe.read(prompts, **chosen)
    if all(site.part.startswith("text") for site in sites) and hasattr(pipe, "encode_text"):
        return lambda prompts, seeds: pipe.encode_text(prompts)
    if not callable(pipe) or not hasattr(pipe, "encode_text"):
        raise InputError("prompts need a pipeline", value=type(pipe).__name__, fix="pass generate=f(prompts, seeds)")
    decode = any(site.part == "vae" for site in sites)
    return lambda prompts, seeds: pipe(prompts, seeds=seeds, decode=decode, **settings)


def run_steps(family: Family, pipe: Any, sites: list[Site], settings: Mapping[str, Any]) -> int:
    """How many steps a run of `pipe` with these settings has at `sites`; 1 where all of them run once."""
    if hasattr(pipe, "steps") and not all(family.once(pipe, site) for site in sites):
        return int(pipe.steps(**settings))
    return max((family.steps(pipe, site.part) for site in sites if site.part != "text"), default=1)


def whole_run(pipe: Any) -> Callable[[list[str], list[int]], Any]:
    """`f(prompts, seeds)` that returns pictures, or for a language model the logits of the last token."""
    if hasattr(pipe, "read"):
        chosen = _without_waste(pipe.model)
        return lambda prompts, seeds: pipe.read(prompts, **chosen)
    return lambda prompts, seeds: pipe(prompts, seeds=seeds)


def _without_waste(model: Any) -> dict[str, Any]:
    """Arguments under which a language model makes neither the logits of all tokens nor a cache."""
    known = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in (("logits_to_keep", 1), ("use_cache", False)) if name in known}
