"""Priors: images drawn from no prompt while one feature is added to every token of the site.

Adding a feature is adding a constant vector, so a row of a batch is any feature, seed and set of timesteps: the batch
carries as many as it has rows, and what is added is looked up per row and step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pysteer.dream.analysis import Analysis
from pysteer.dream.denoiser import unguided
from pysteer.dream.features import Features
from pysteer.errors import InputError
from pysteer.steering import Plan, steer
from pysteer.steering.given import vector
from pysteer.steering.plan import SiteParameters

TIMES = ("active_timesteps", "all_timesteps", "activity_peaks")
EVERY = -1.0  # the timestep of a row that is steered at all of its feature's timesteps


@dataclass(frozen=True)
class PriorRow:
    """One image: a feature, a seed, the timestep it is steered around (`EVERY` for all of the feature's), and how
    strongly at which step of the run (in units of the feature's direction)."""

    feature: int
    seed: int
    timestep: float
    strengths: Mapping[int, float]


@dataclass(frozen=True)
class PriorPlan:
    """How priors are drawn.

    Attributes:
        timesteps: active_timesteps (where the feature is active), all_timesteps, or activity_peaks: a row of its own
            around every peak.
        scale: what is added at a timestep, in units of the feature's largest activation there (mean over the tokens).
        seeds: of the images of every feature.
        peak_separation: timesteps between peaks; around a peak, half of it either way is steered.
        peaks: most peaks of a feature.
        prompt: what is drawn; usually nothing.
        settings: arguments of the pipeline. Guidance is off where the pipeline has it and nothing else is said; with
            guidance conditional rows are steered alone, so that it tells them from the others by the feature as well.
    """

    timesteps: str = "active_timesteps"
    scale: float = 1.0
    seeds: Sequence[int] = (1024, 1111, 4359, 3248, 1026)
    peak_separation: int = 100
    peak_threshold: float = 0.0
    peaks: int = 3
    prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timesteps not in TIMES:
            raise InputError("timesteps of the prior", value=self.timesteps, allowed=", ".join(TIMES))
        if not self.seeds:
            raise InputError("seeds of the prior", value="none", allowed="at least one")

    def rows(self, analysis: Analysis, feature: int) -> list[PriorRow]:
        """The rows of a feature; none where it is never active."""
        steps = len(analysis.timesteps)
        places = list(range(steps)) if self.timesteps == "all_timesteps" else analysis.active_steps(feature)
        most = analysis.most[feature]

        def strengths(chosen: Sequence[int]) -> dict[int, float]:
            # The run goes from the largest timestep to the smallest.
            return {steps - 1 - place: self.scale * float(most[place]) for place in chosen}

        if not places:
            return []
        if self.timesteps != "activity_peaks":
            return [PriorRow(feature, seed, EVERY, strengths(places)) for seed in self.seeds]
        found = []
        options = {"threshold": self.peak_threshold, "separation": self.peak_separation, "most": self.peaks}
        for peak, _ in analysis.peaks(feature, **options):  # type: ignore[arg-type]
            nearest = analysis.step_of(peak)
            near = [p for p in places if abs(float(analysis.timesteps[p]) - peak) <= self.peak_separation / 2]
            chosen = strengths(near or [nearest])
            found += [PriorRow(feature, seed, float(peak), chosen) for seed in self.seeds]
        return found


@dataclass(frozen=True)
class Priors:
    """Images uint8 `[R, H, W, 3]` and latents fp32 `[R, ...]` of R rows."""

    images: Tensor
    latents: Tensor


def draw_priors(pipe: Any, features: Features, rows: Sequence[PriorRow], plan: PriorPlan) -> Priors:
    """Draw all rows as one batch.

    Args:
        pipe: an `ImageGenerator`.
        features: of the site that is steered.
        rows: what to draw.
        plan: prompt and settings.

    Raises:
        InputError: no rows.
    """
    if not rows:
        raise InputError("rows of priors", value="none", allowed="at least one")
    parameters: dict[int, SiteParameters] = {}
    plans = []
    alone = float(plan.settings.get("guidance_scale", 1.0)) <= 1.0
    for row in rows:
        if row.feature not in parameters:  # rows of one feature share its vector in the bank
            parameters[row.feature] = vector(features.site.name, features.direction(row.feature))
        schedule: dict[int | None, tuple[float, float]] = {
            s: (value, value if alone else 0.0) for s, value in row.strengths.items()
        }
        plans.append(Plan([parameters[row.feature]], {features.site.name: schedule}))
    with torch.no_grad(), steer(pipe, plans):
        out = pipe([plan.prompt] * len(rows), seeds=[row.seed for row in rows], **unguided(pipe, plan.settings))
    return Priors(out.images.cpu(), out.latents.float().cpu())
