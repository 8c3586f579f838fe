"""The stages that make pictures: plots, prior and deep_dream."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.dream.analysis import Analysis
from pysteer.dream.capture import png_bytes
from pysteer.dream.deep_dream import Dreamer
from pysteer.dream.denoiser import Denoiser
from pysteer.dream.parts import Parts
from pysteer.dream.prior import PriorPlan, PriorRow, draw_priors
from pysteer.errors import InputError
from pysteer.recipes.config import config_values
from pysteer.recipes.dreaming.studio import Studio

_ACTIVE = "active_timesteps"
_PEAKS = "activity_peaks"


def run_plots(studio: Studio) -> None:
    """A picture of the profile of every chosen feature: frequency, largest activation, peaks and examples."""
    from pysteer.recipes.dreaming.figures import Painted, draw_profile

    c, run = studio.config.plots, studio.run
    for kind in studio.features:
        found = studio.analysis(c.timestep_analysis_run, kind)
        features = studio.chosen(c.timestep_analysis_run, kind, (), None, None)
        pictures = Painted.of(studio, kind, c.timestep_analysis_run)
        with run.progress.task(f"plots ({kind})", len(features)) as advance:
            for feature in features:
                path = run.path(f"plots/{kind}/feature-{feature:05d}.{c.format}")
                draw_profile(path, found, feature, pictures, studio.config.timestep_analysis, c)
                advance()
        run.write_json(f"plots/{kind}/active_features.json", found.live.nonzero()[:, 0].tolist())


@dataclass
class _Batches:
    """Items in batches of at most `most` rows, at least one item each."""

    sizes: Sequence[int]
    most: int

    def of(self, items: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for item in items:
            if batch and sum(self.sizes[i] for i in batch) + self.sizes[item] > self.most:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch


def prior_plan(studio: Studio, kind: str) -> PriorPlan:
    """The settings of the stage prior for raw channels or latents."""
    c, peaks = studio.config.prior, studio.config.timestep_analysis
    return PriorPlan(
        timesteps=c.timesteps,
        scale=c.steer_strength_scale_sae if kind == "sae" else c.steer_strength_scale,
        seeds=c.seeds[: c.n_results], prompt=c.prompt,
        peak_separation=peaks.peak_separation, peak_threshold=peaks.peak_threshold, peaks=peaks.top_peak_count,
        settings=_with_guidance(studio.config.settings, c.guidance_scale),
    )  # fmt: skip


def _with_guidance(settings: dict[str, Any], scale: float) -> dict[str, Any]:
    return {**_without_guidance(settings), **({} if scale == 1.0 else {"guidance_scale": scale})}


def _without_guidance(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "guidance_scale"}


def run_prior(studio: Studio, kind: str) -> Parts:
    """Draw the priors of this process's features; features that are there are skipped."""
    c, run, features = studio.config.prior, studio.run, studio.features[kind]
    plan, found = prior_plan(studio, kind), studio.analysis(c.timestep_analysis_run, kind)
    chosen = studio.chosen(c.timestep_analysis_run, kind, (), c.start_channel, c.end_channel)
    identity = {
        "features": {kind: features.digest()}, "chosen": chosen, "plan": config_values(plan),
        "analysis": studio.analysis_hash(c.timestep_analysis_run),
    }  # fmt: skip
    parts = Parts(run.path(f"prior/{kind}/x").parent, identity, len(chosen))
    rows = [plan.rows(found, feature) for feature in chosen]
    left = parts.left(studio.share)
    with run.progress.task(f"priors ({kind})", sum(len(rows[item]) for item in left)) as advance:
        for start in range(0, len(left), c.features_per_batch):
            items = left[start : start + c.features_per_batch]
            batch = [row for item in items for row in rows[item]]
            if batch:
                made = draw_priors(studio.pipe, features, batch, plan)
                _keep_priors(parts, items, batch, made.images, made.latents)
            else:
                _keep_priors(parts, items, [], torch.zeros(0, 1, 1, 3, dtype=torch.uint8), torch.zeros(0, 1))
            advance(len(batch))
    return parts


def _keep_priors(parts: Parts, items: list[int], batch: list[PriorRow], images: Tensor, latents: Tensor) -> None:
    table = {
        "feature": [row.feature for row in batch],
        "seed": [row.seed for row in batch],
        "timestep": [row.timestep for row in batch],
        "strength": [max(row.strengths.values(), key=abs, default=0.0) for row in batch],
        "png": [png_bytes(image) for image in images],
    }
    parts.add(
        items,
        {
            "safetensors": lambda path: files.write_safetensors(path, {"latents": latents}),
            "parquet": lambda path: files.write_parquet(path, table),
        },
    )


@dataclass(frozen=True)
class Start:
    """Where a dream starts: a feature, a timestep, a seed, and the latents of a prior (None for noise)."""

    feature: int
    timestep: float
    seed: int
    latents: Tensor | None


def read_priors(parts: Parts) -> dict[int, list[tuple[float, int, Tensor]]]:
    """(timestep, seed, latents) of the priors of every feature."""
    import pyarrow.parquet as pq

    found: dict[int, list[tuple[float, int, Tensor]]] = {}
    for part in parts:
        table = pq.read_table(part.files["parquet"], columns=["feature", "seed", "timestep"]).to_pylist()
        latents = files.read_safetensors(part.files["safetensors"], "latents of priors")[0]["latents"]
        for row, own in zip(table, latents, strict=False):
            found.setdefault(row["feature"], []).append((row["timestep"], row["seed"], own))
    return found


def dream_starts(studio: Studio, kind: str, feature: int, found: Analysis, priors: Any) -> list[Start]:
    """The dreams of a feature: timesteps times priors or seeds."""
    c, peaks = studio.config.deep_dream, studio.config.timestep_analysis
    times: list[float] = []
    for asked in c.timesteps:
        if asked == _PEAKS:
            options = {"threshold": peaks.peak_threshold, "separation": peaks.peak_separation}
            own = found.peaks(feature, most=peaks.top_peak_count, total=peaks.total_timesteps, **options)  # type: ignore
            times += [float(peak) for peak, _ in own]
        elif asked == _ACTIVE:
            times += [float(found.timesteps[place]) for place in found.active_steps(feature)]
        else:
            times.append(float(asked))
    times = list(dict.fromkeys(times))[: 1 if c.use_just_one_timestep else None]
    if not c.use_prior:
        return [Start(feature, time, seed, None) for time in times for seed in c.seeds[: c.n_results]]
    starts = []
    for time in times:
        near: dict[int, tuple[float, Tensor]] = {}
        for prior_time, seed, latents in priors.get(feature, ()):
            distance = 0.0 if prior_time < 0 else abs(prior_time - time)
            if seed not in near or distance < near[seed][0]:
                near[seed] = (distance, latents)
        starts += [Start(feature, time, seed, latents) for seed, (_, latents) in list(near.items())[: c.n_results]]
    return starts


@dataclass
class _Snapshots:
    """Pictures of dreams on the way: decoded where the model is, made into PNG by another thread meanwhile."""

    denoiser: Denoiser
    starts: Sequence[Start]
    pool: ThreadPoolExecutor
    rows: list[Future[list[dict[str, Any]]]] = field(default_factory=list)
    last: int = 0

    def __call__(self, step: int, latents: Tensor, figures: dict[str, Tensor]) -> None:
        images = self.denoiser.decode(latents)
        values = {name: value.tolist() for name, value in figures.items()}
        self.last = step
        self.rows.append(self.pool.submit(self._encoded, step, images, values))

    def _encoded(self, step: int, images: Tensor, values: dict[str, list[float]]) -> list[dict[str, Any]]:
        return [
            {"feature": start.feature, "timestep": start.timestep, "seed": start.seed, "step": step,
             **{name: each[i] for name, each in values.items()}, "png": png_bytes(images[i])}
            for i, start in enumerate(self.starts)
        ]  # fmt: skip

    def table(self) -> list[dict[str, Any]]:
        """All rows; those of the last step are the dreams."""
        rows = [row for future in self.rows for row in future.result()]
        return [{**row, "final": row["step"] == self.last} for row in rows]


def run_dreams(studio: Studio, kind: str) -> Parts:
    """Optimise the dreams of this process's features; features that are there are skipped."""
    c, run, features = studio.config.deep_dream, studio.run, studio.features[kind]
    found = studio.analysis(c.timestep_analysis_run, kind)
    prior_parts = studio.parts(c.prior_run, "prior", kind) if c.use_prior else None
    chosen = studio.chosen(c.timestep_analysis_run, kind, c.channels, c.start_channel, c.end_channel)
    if prior_parts is not None:
        drawn = set(prior_parts.identity["chosen"])
        missing = [feature for feature in chosen if feature not in drawn]
        if missing and c.channels:
            allowed = "features of the prior run"
            raise InputError("priors of channels", value=missing[:5], allowed=allowed, fix="deep_dream.use_prior=false")
        chosen = [feature for feature in chosen if feature in drawn]
    config = c.config(kind)
    identity = {
        "features": {kind: features.digest()}, "chosen": chosen, "config": config_values(config),
        "timesteps": list(c.timesteps), "one": c.use_just_one_timestep, "results": c.n_results,
        "priors": prior_parts.content() if prior_parts is not None else "",
        "seeds": [] if c.use_prior else list(c.seeds), "analysis": studio.analysis_hash(c.timestep_analysis_run),
    }  # fmt: skip
    parts = Parts(run.path(f"deep_dream/{kind}/x").parent, identity, len(chosen))
    priors = read_priors(prior_parts) if prior_parts is not None else {}
    starts = [dream_starts(studio, kind, feature, found, priors) for feature in chosen]
    left = parts.left(studio.share)
    if not left:
        return parts
    denoiser = Denoiser(studio.pipe, settings=_without_guidance(studio.config.settings))
    dreamer = Dreamer(denoiser, features, config)
    batches = _Batches([len(each) for each in starts], c.rows_per_batch)
    with run.progress.task(f"dreams ({kind})", sum(len(starts[item]) for item in left)) as advance:
        for items in batches.of(left):
            batch = [start for item in items for start in starts[item]]
            _dream_batch(dreamer, parts, items, batch)
            advance(len(batch))
    return parts


def _dream_batch(dreamer: Dreamer, parts: Parts, items: list[int], batch: list[Start]) -> None:
    table: list[dict[str, Any]] = []
    latents = torch.zeros(0, 1)
    if batch:
        seeds = [start.seed for start in batch]
        noise = dreamer.start(seeds)
        begin = torch.stack([noise[i] if s.latents is None else s.latents for i, s in enumerate(batch)])
        chosen, times = [start.feature for start in batch], [start.timestep for start in batch]
        with ThreadPoolExecutor(1) as pool:
            snapshots = _Snapshots(dreamer.denoiser, batch, pool)
            made = dreamer(begin, chosen, times, seeds, snapshot=snapshots)
            table, latents = snapshots.table(), made.latents
    parts.add(
        items,
        {
            "safetensors": lambda path: files.write_safetensors(path, {"latents": latents}),
            "parquet": lambda path: files.write_parquet(path, table or _EMPTY),
        },
    )


_EMPTY: dict[str, list[Any]] = {
    name: []
    for name in ("feature", "timestep", "seed", "step", "activation", "total_variation", "range", "moment", "loss",
                 "png", "final")
}  # fmt: skip


def decode_png(data: bytes) -> Tensor:
    """A PNG as uint8 `[H, W, 3]`."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
