"""Streaming activations of many prompts to disk or into moments, in constant memory; both continue where they ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.capture.generation import Generate, default_generate
from pysteer.capture.moments import Moments
from pysteer.capture.pooling import POOLS, pooled_rows, stacked_rows
from pysteer.capture.store import FORMAT, ActivationStore, ShardWriter, begin
from pysteer.capture.taps import PartRows, as_tokens, choose_sites, tapped
from pysteer.errors import InputError, PysteerError
from pysteer.families.base import find_family
from pysteer.methods.base import check_choice
from pysteer.steering.positions import Positions
from pysteer.steering.site import Site

Progress = Callable[[int, int], object]
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Request:
    """What to read, from which runs."""

    pipe: Any
    prompts: Sequence[str]
    seeds: Sequence[int]
    sites: Sequence[Site]
    steps: frozenset[int] | None
    lasting: frozenset[str]  # sites where what is fitted at step 0 serves all steps
    pool: str
    rows: str
    positions: Positions
    batch_size: int
    generate: Generate

    def run(self, first: int, take: Callable[[Site, int, Tensor, Tensor | None], None], done: Progress) -> None:
        """Run the prompts from `first` on; `take(site, step, x [R, L, D], lengths)` sees what is wanted of a batch."""

        family = find_family(self.pipe)

        def see(site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
            wanted = {"cond": rows.cond_rows, "uncond": rows.uncond_rows}[self.rows]
            if (family.once(self.pipe, site) or self.steps is None or step in self.steps) and len(x[wanted]):
                known = rows.lengths if site.layout == "tokens" else None
                tokens = as_tokens(x.detach() if known is None else rows.valid_first(x.detach()), site.layout)[wanted]
                take(site, step, tokens, None if known is None else known[wanted])
            return x

        total = len(self.prompts)
        with torch.no_grad(), tapped(self.pipe, self.sites, see, self.positions):
            for start in range(first, total, self.batch_size):
                part = slice(start, start + self.batch_size)
                self.generate(list(self.prompts[part]), list(self.seeds[part]))
                done(min(start + self.batch_size, total), total)


def _request(
    pipe: Any,
    prompts: Sequence[str],
    sites: str | Iterable[str],
    steps: Iterable[int] | None,
    pool: str,
    rows: str,
    positions: Positions,
    seeds: int | Sequence[int],
    batch_size: int,
    settings: Mapping[str, Any] | None,
    generate: Generate | None,
) -> _Request:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("prompts to capture", value=prompts, allowed="a list with at least one string")
    check_choice("pool", pool, tuple(POOLS))
    check_choice("rows to capture", rows, ("cond", "uncond"))
    if type(batch_size) is not int or batch_size < 1:
        raise InputError("batch_size", value=batch_size, allowed="a whole number above 0")
    numbers = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(numbers) != len(prompts):
        raise InputError("seeds", value=len(numbers), allowed=f"one number, or {len(prompts)} of them")
    family = find_family(pipe)
    chosen = choose_sites(family, pipe, sites)
    lasting = frozenset(site.name for site in chosen if family.lasting(pipe, site.part))
    if generate is None:
        generate = default_generate(pipe, chosen, settings or {})
    wanted = None if steps is None else frozenset(steps)
    return _Request(pipe, prompts, numbers, chosen, wanted, lasting, pool, rows, positions, batch_size, generate)


def capture(
    pipe: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    sites: str | Iterable[str],
    steps: Iterable[int] | None = None,
    pool: str = "tokens",
    labels: Sequence[str] | None = None,
    rows: str = "cond",
    positions: Positions = "all",
    seeds: int | Sequence[int] = 0,
    batch_size: int = 16,
    dtype: str = "keep",
    shard_bytes: int = 256 << 20,
    settings: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Run prompts and write the activations at `sites` into a folder, in shards; memory does not grow with prompts.

    The same call continues where an earlier one was interrupted.

    Args:
        pipe: a model or pipeline of a known family.
        prompts: what to run.
        out: the folder; see `pysteer.capture.store` for the files.
        sites: names, short names or regular expressions.
        steps: steps of the clock to keep, None for all.
        pool: what is kept of the tokens of a row: "tokens" (all that count), "mean", "max", "min" or "last".
        labels: a word per prompt, to tell classes apart later.
        rows: "cond" or "uncond".
        positions: tokens that count, see `pysteer.steer`; padding never does.
        seeds: noise seed of the first prompt, counting up, or one per prompt.
        batch_size: prompts per run.
        dtype: "keep", "fp32", "bf16" or "fp16".
        shard_bytes: size of a shard, which is held in memory until it is written.
        settings: passed on to the pipeline.
        generate: `f(prompts, seeds)` that runs the model instead.
        progress: told `(done, total)` prompts after every batch.

    Raises:
        InputError: unknown sites, another capture in the folder, prompts, labels or seeds that do not fit.
    """
    request = _request(
        pipe, prompts, sites, steps, pool, rows, positions, seeds, batch_size, settings, generate
    )  # fmt: skip
    check_choice("dtype to store", dtype, tuple(DTYPES))
    words = [""] * len(prompts) if labels is None else [str(label) for label in labels]
    if len(words) != len(prompts):
        raise InputError("labels", value=len(words), allowed=f"{len(prompts)}, one per prompt")
    folder, target = Path(out), DTYPES[dtype]
    columns: dict[str, Sequence[Any]] = {
        "prompt": list(range(len(prompts))),
        "text": list(prompts),
        "seed": request.seeds,
        "label": words,
    }
    begin(folder, _description(request, dtype, columns), columns)
    writer, place = ShardWriter(folder, shard_bytes), {"first": 0}
    place["first"] = writer.done

    def take(site: Site, step: int, x: Tensor, lengths: Tensor | None) -> None:
        for number, kept in enumerate(pooled_rows(x, lengths, pool), start=place["first"]):
            writer.add(number, site.name, step, kept.to("cpu", target or kept.dtype, copy=True))

    def finished(count: int, total: int) -> None:
        place["first"] = count
        writer.finish_batch(count)
        if progress is not None:
            progress(count, total)

    try:
        request.run(writer.done, take, finished)
    finally:
        writer.keep_finished(place["first"])
        writer.flush()
    store = ActivationStore.open(folder)
    silent = [site.name for site in request.sites if not store.steps(site.name)]
    if silent:
        raise PysteerError(f"sites never ran: {', '.join(silent)}; fix: leave them out, or choose other steps")
    return store


def _description(request: _Request, dtype: str, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    positions = request.positions
    digest = hashlib.sha256()
    for name in ("text", "seed", "label"):
        for value in columns[name]:
            digest.update(f"{value}\0".encode())
    return {
        "format": FORMAT,
        "model": fingerprint(request.pipe, request.sites),
        "sites": [
            {"name": site.name, "part": site.part, "layout": site.layout, "lasting": site.name in request.lasting}
            for site in request.sites
        ],
        "steps": None if request.steps is None else sorted(request.steps),
        "pool": request.pool,
        "rows": request.rows,
        "positions": [positions.start, positions.stop] if isinstance(positions, slice) else positions,
        "dtype": dtype,
        "prompts": len(request.prompts),
        "prompts_sha256": digest.hexdigest(),
    }


def fingerprint(pipe: Any, sites: Sequence[Site]) -> str:
    """A digest of the modules that `sites` belong to: classes, names, shapes and the first values of the weights."""
    family = find_family(pipe)
    digest = hashlib.sha256()
    for part in sorted({site.part for site in sites}):
        root = family.root(pipe, part)
        digest.update(f"{part} {type(root).__name__}\0".encode())
        for name, weight in root.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)}\0".encode())
            digest.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def capture_moments(
    pipe: Any,
    prompts: Sequence[str],
    *,
    sites: str | Iterable[str],
    steps: Iterable[int] | None = None,
    pool: str = "mean",
    rows: str = "cond",
    positions: Positions = "all",
    seeds: int | Sequence[int] = 0,
    batch_size: int = 16,
    gram: bool = False,
    into: Moments | None = None,
    settings: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Run prompts and add up the moments of the activations at `sites`; no activation is kept.

    Args:
        gram: also add up the covariance of every site, `D x D`.
        into: moments to go on with.
        The rest as for `capture`.

    Returns:
        Moments per site and step, which can be saved, merged and fitted (`pysteer.fit_stored`).
    """
    request = _request(pipe, prompts, sites, steps, pool, rows, positions, seeds, batch_size, settings, generate)
    found = Moments() if into is None else into
    found.lasting |= request.lasting

    def take(site: Site, step: int, x: Tensor, lengths: Tensor | None) -> None:
        found.add(site.name, step, stacked_rows(x, lengths, pool), gram=gram)

    request.run(0, take, progress or (lambda done, total: None))
    return found
