"""Recipe `dream`: what the features of a diffusion model stand for, in seven stages.

provision, capture, timestep_analysis, plots, prior, deep_dream, representation: one after the other, or one at a time
with `stage=NAME` in the same run folder. A stage can use the results of another run by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq

from pysteer.dream.parts import Share
from pysteer.recipes.dreaming.collecting import judged_rate, run_representation
from pysteer.recipes.dreaming.config import STAGES, DreamRecipeConfig
from pysteer.recipes.dreaming.making import run_dreams, run_plots, run_prior
from pysteer.recipes.dreaming.page import dream_report
from pysteer.recipes.dreaming.reading import provision, run_analysis, run_capture
from pysteer.recipes.dreaming.studio import Studio
from pysteer.recipes.dreaming.workers import run_workers
from pysteer.recipes.frame import Run, Summary, recipe

SHARED = ("capture", "prior", "deep_dream")  # stages that several processes can share


@recipe("dream", DreamRecipeConfig)
def run_dream(config: DreamRecipeConfig, run: Run) -> Summary:
    """Find out when features of a diffusion model are active, what they draw, and what they dream of."""
    studio = Studio(config, run, Share())
    wanted = STAGES if config.stage == "all" else (config.stage,)
    for name in wanted:
        _STAGES[name](studio)
    return _summary(studio)


def work(studio: Studio, stage: str) -> None:
    """Do the share of one process of a stage of `SHARED`."""
    if stage == "capture":
        run_capture(studio)
        return
    for kind in studio.features:
        (run_prior if stage == "prior" else run_dreams)(studio, kind)


def _shared(stage: str) -> Callable[[Studio], None]:
    def do(studio: Studio) -> None:
        if studio.config.workers > 1:
            run_workers(studio.run, stage, studio.config.workers, studio.pipe.device)
        work(studio, stage)  # what is left, if anything
        for kind in studio.features if stage != "capture" else ("",):
            studio.parts("", stage, kind)  # raises unless every item is there exactly once

    return do


def _once(name: str, do: Callable[[Studio], None], inputs: Callable[[Studio], Any]) -> Callable[[Studio], None]:
    """A stage that one process does, once for the same inputs."""

    def run_once(studio: Studio) -> None:
        with studio.run.stage(name, inputs(studio)) as stage:
            if not stage.done:
                do(studio)

    return run_once


def _digests(studio: Studio) -> Any:
    return {kind: features.digest() for kind, features in studio.features.items()}


def _captured(studio: Studio) -> Any:
    return studio.parts(studio.config.timestep_analysis.capture_run, "capture").content()


def _analysed(studio: Studio) -> Any:
    return studio.analysis_hash(studio.config.plots.timestep_analysis_run)


def _collected(studio: Studio) -> Any:
    c = studio.config.representation
    runs = [(c.prior_run, "prior"), (c.deep_dream_run, "deep_dream")]
    runs += [(c.deep_dream_no_noise_run, "deep_dream")] if c.deep_dream_no_noise_run else []
    made = [studio.parts(name, stage, kind).content() for name, stage in runs for kind in studio.features]
    return [studio.analysis_hash(c.timestep_analysis_run), made]


def _represent(studio: Studio) -> None:
    with studio.run.stage("representation", _collected(studio)) as stage:
        if not stage.done:
            judged = run_representation(studio)
            rates = {key: judged_rate(rows) for key, rows in judged.items() if rows}
            stage.notes["judged"] = {key: {**r.as_dict(), "chance": chance} for key, (r, chance) in rates.items()}
            rows = [{"images": key, **row} for key, found in judged.items() for row in found]
            studio.run.write_parquet("metrics.parquet", rows or {"images": []})
    dream_report(
        studio.run, studio.config, _headline(studio, stage.notes["judged"]), studio.run.folder / "representation"
    )


_STAGES: dict[str, Callable[[Studio], None]] = {
    "provision": _once("provision", provision, _digests),
    "capture": _shared("capture"),
    "timestep_analysis": _once("timestep_analysis", run_analysis, _captured),
    "plots": _once("plots", run_plots, _analysed),
    "prior": _shared("prior"),
    "deep_dream": _shared("deep_dream"),
    "representation": _represent,
}


def _headline(studio: Studio, judged: dict[str, Any]) -> dict[str, Any]:
    """The figures of what is there so far."""
    found: dict[str, Any] = {}
    for kind, features in studio.features.items():
        path = studio.run.folder / f"timestep_analysis/{kind}.parquet"
        if not path.is_file():
            continue
        rows = pq.read_table(path, columns=["live", "area", "label"]).to_pylist()
        live = [row for row in rows if row["live"]]
        about: dict[str, Any] = {"count": features.count, "live": len(live)}
        if any(row["area"] > 0 for row in live):
            about["selective"] = sum(row["area"] > 0.9 for row in live) / len(live)
        for role in ("prior", "dream"):
            about[role] = judged.get(f"{kind}.{role}")
        found[kind] = about
    return found


def _summary(studio: Studio) -> Summary:
    marker = studio.run.folder / "stages/representation.json"
    judged: dict[str, Any] = {}
    if marker.is_file():
        from pysteer import files

        judged = files.read_json(marker, "stage marker")["notes"].get("judged", {})
    headline = _headline(studio, judged)
    best: dict[str, Any] = {}
    for kind, about in headline.items():
        for role in ("prior", "dream"):
            if about[role] and about[role]["value"] > best.get("target_rate", -1.0):
                best = {"features": kind, "images": role, "target_rate": about[role]["value"]}
    return Summary(best=best, headline=headline)
