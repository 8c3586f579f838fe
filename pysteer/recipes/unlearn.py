"""Recipe `unlearn`: make a model forget one class with a sparse autoencoder, and measure what else it forgets.

SAeUron (Cywinski and Deja 2025): means of the latents by concept and step are streamed; the latents that mark the
concept at a step are multiplied by a negative factor where they are active. How many latents and which factor is
searched on prompts of their own; the table is measured on fresh prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pysteer import steer
from pysteer.dream.parts import Share
from pysteer.dream.unlearning import ConceptMeans, add_rows, edited_latents, unlearning_plan
from pysteer.errors import InputError
from pysteer.metrics.rates import Rate, rate
from pysteer.recipes.dreaming.config import DreamRecipeConfig
from pysteer.recipes.dreaming.forgetting import Outcome, write_report
from pysteer.recipes.dreaming.prompts import FIXED
from pysteer.recipes.dreaming.studio import Studio
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.steering import Plan
from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import ATTRIBUTES, Scene, sample_scenes

_BUNDLED = {"colour": "diffusion-shapes-attention", "shape": "diffusion-shapes"}
_SEARCHED: dict[str, dict[str, tuple[float, ...]]] = {
    "colour": {"percentile": (99.0,), "factor": (-0.03, -0.1), "floor": (1.0, 9.0, 12.0)},
    "shape": {"percentile": (99.0, 97.0, 95.0), "factor": (-1.0, -3.0, -8.0), "floor": (1.0,)},
}
_FRESH, _SEARCH = 2_000_000, 1_000_000  # seeds, away from those that fit


@dataclass(frozen=True)
class UnlearnConfig:
    """Which concept of which model, and how the edit is found.

    Attributes:
        model: a bundled generator of the shapes task, or the folder of one.
        site: where the autoencoder reads; empty for the site it was trained on.
        sae: name of a bundled autoencoder, or the folder of one; empty for the bundled one that reads where
            shapes show, or for a colour the one where colours enter.
        concept: what is unlearned, a shape or a colour.
        fixed: attributes that all captions state.
        fit_prompts: captions per class that the means are made of.
        search_prompts: captions of the concept, and as many of all other classes together, that choose the edit.
        prompts: the same, fresh ones that the table is measured on.
        percentiles: of the scores; latents above are edited. Empty for what suits the bundled autoencoders, as for the
            next two.
        factors: gamma of the paper, what the latents are multiplied by besides their mean.
        floors: from which multiples of its mean over the concepts a latent is edited; 1 in the paper.
        rows: cond, uncond or both; both in the paper.
        error: keep, or saeuron for the published hook, which loses part of the activation.
        keep: least rate of all other classes that an edit has to keep.
        settings: arguments of the pipeline.
        batch_size: prompts generated at once.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: of prompts and noise.
    """

    model: str = "diffusion-shapes"
    site: str = ""
    sae: str = ""
    concept: str = "red"
    fixed: dict[str, str] = field(default_factory=lambda: dict(FIXED))
    fit_prompts: int = 16
    search_prompts: int = 16
    prompts: int = 96
    percentiles: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    floors: tuple[float, ...] = ()
    rows: str = "both"
    error: str = "keep"
    keep: float = 0.9
    settings: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0, "num_inference_steps": 20})
    batch_size: int = 64
    device: str = field(default="auto", metadata={"identity": False})
    seed: int = 9000

    def __post_init__(self) -> None:
        if not self.attribute:
            words = ", ".join((*ATTRIBUTES["shape"], *ATTRIBUTES["colour"]))
            raise InputError("concept to unlearn", value=self.concept, allowed=words)
        if min(self.fit_prompts, self.search_prompts, self.prompts, self.batch_size) < 2:
            raise InputError("numbers of prompts", value=self.fit_prompts, allowed="whole numbers from 2")

    @property
    def attribute(self) -> str:
        """shape or colour, whichever the concept is a value of; "" for none."""
        return next((name for name in ("shape", "colour") if self.concept in ATTRIBUTES[name]), "")

    @property
    def autoencoder(self) -> str:
        """Name or folder of the autoencoder."""
        return self.sae or _BUNDLED[self.attribute]

    @property
    def searched(self) -> list[dict[str, float]]:
        """The settings of the edit that are tried."""
        usual = _SEARCHED[self.attribute]
        chosen = {name: getattr(self, f"{name}s") or usual[name] for name in usual}
        return [dict(zip(chosen, values, strict=True)) for values in product(*chosen.values())]

    @property
    def concepts(self) -> tuple[str, ...]:
        """All values of the attribute."""
        return ATTRIBUTES[self.attribute]


@dataclass
class _Work:
    """What the parts of the recipe share."""

    config: UnlearnConfig
    run: Run
    studio: Studio
    classifier: Any

    def scenes(self, count: int, offset: int) -> list[Scene]:
        """`count` scenes of the concept, then as many of the other values in turn."""
        c = self.config
        others = [value for value in c.concepts if value != c.concept]
        seed = c.seed + offset
        own = sample_scenes(count, seed, {**c.fixed, c.attribute: c.concept})
        rest = [
            sample_scenes(1, seed + 1 + i, {**c.fixed, c.attribute: others[i % len(others)]})[0] for i in range(count)
        ]
        return [*own, *rest]

    def paint(self, scenes: Sequence[Scene], offset: int, plan: Plan | None, advance: Any) -> Tensor:
        """Images of scenes, uint8 `[N, H, W, 3]`, the same noise whatever the plan."""
        c, pipe, made = self.config, self.studio.pipe, []
        for first in range(0, len(scenes), c.batch_size):
            part = scenes[first : first + c.batch_size]
            seeds = [c.seed + offset + first + i for i in range(len(part))]
            captions = [scene.caption for scene in part]
            if plan is None:
                made.append(pipe(captions, seeds=seeds, **c.settings).images)
            else:
                with steer(pipe, plan):
                    made.append(pipe(captions, seeds=seeds, **c.settings).images)
            advance(len(part))
        return torch.cat(made)


@recipe("unlearn", UnlearnConfig)
def run_unlearn(config: UnlearnConfig, run: Run) -> Summary:
    """Remove one shape or colour from a diffusion model with a sparse autoencoder; measure what is lost elsewhere."""
    inner = DreamRecipeConfig(
        model=config.model, site=config.site, sae=config.autoencoder, use_raw=False, settings=config.settings,
        device=config.device,
    )  # fmt: skip
    work = _Work(config, run, Studio(inner, run, Share()), load_classifier("shapes"))
    means = _means(work)
    best = _search(work, means)
    outcomes, images, scenes = _measured(work, means, best)
    write_report(run, config, outcomes, images, scenes, best)
    unsteered, steered = outcomes
    headline = {
        "concept": config.concept, "setting": best, "latents": _edited(work, means, best),
        "unsteered": unsteered.as_dict(), "unlearned": steered.as_dict(),
    }  # fmt: skip
    kept = steered.worst_kept()
    top = {"target_rate": steered.concept.value, "kept_rate": kept.value, **best}
    return Summary(best=top, headline=headline, tables={"classes": [*unsteered.rows(), *steered.rows()]})


def _means(work: _Work) -> ConceptMeans:
    c, run, studio = work.config, work.run, work.studio
    path = run.path("means.safetensors")
    features = studio.features["sae"]
    with run.stage("means", features.digest()) as stage:
        if not stage.done:
            found = ConceptMeans.empty(c.concepts, studio.timesteps, features.count)
            rows = [(n, value) for n, value in enumerate(c.concepts) for _ in range(c.fit_prompts)]
            scenes = [
                sample_scenes(1, c.seed + i, {**c.fixed, c.attribute: value})[0] for i, (_, value) in enumerate(rows)
            ]
            with run.progress.task("prompts read", len(rows)) as advance:
                for first in range(0, len(rows), c.batch_size):
                    part = range(first, min(first + c.batch_size, len(rows)))
                    add_rows(
                        found, studio.pipe, features, [scenes[i].caption for i in part], [rows[i][0] for i in part],
                        [c.seed + i for i in part], c.settings,
                    )  # fmt: skip
                    advance(len(part))
            found.save(path)
    return ConceptMeans.load(path)


def _plan(work: _Work, means: ConceptMeans, setting: dict[str, float]) -> Plan:
    c = work.config
    return unlearning_plan(
        means, work.studio.features["sae"], c.concept, percentile=setting["percentile"], factor=setting["factor"],
        floor=setting["floor"], rows=c.rows, error=c.error,
    )  # fmt: skip


def _edited(work: _Work, means: ConceptMeans, setting: dict[str, float]) -> list[int]:
    """All latents that are edited at some step."""
    return sorted({latent for step in edited_latents(_plan(work, means, setting)) for latent in step})


def _search(work: _Work, means: ConceptMeans) -> dict[str, float]:
    """The setting with the lowest rate of the concept among those that keep enough; else the one that keeps most."""
    c, run = work.config, work.run
    settings = c.searched
    scenes = work.scenes(c.search_prompts, _SEARCH)
    with run.stage("search") as stage:
        found: list[dict[str, float]] = list(stage.notes.get("found", []))
        if not stage.done:
            with run.progress.task("images of the search", len(settings) * len(scenes)) as advance:
                for setting in settings:
                    images = work.paint(scenes, _SEARCH, _plan(work, means, setting), advance)
                    outcome = judge(work, scenes, images, "search")
                    kept = outcome.others.value * outcome.others_else.value
                    found.append({**setting, "concept": outcome.concept.value, "kept": kept})
            stage.notes["found"] = found
    run.write_json("search.json", found)
    good = [row for row in found if row["kept"] >= c.keep**2]
    best = (
        min(good, key=lambda row: (row["concept"], -row["kept"])) if good else max(found, key=lambda row: row["kept"])
    )
    return {name: best[name] for name in ("percentile", "factor", "floor")}


def _measured(
    work: _Work, means: ConceptMeans, best: dict[str, float]
) -> tuple[list[Outcome], list[Tensor], list[Scene]]:
    c, run = work.config, work.run
    scenes = work.scenes(c.prompts, _FRESH)
    images, outcomes = [], []
    with run.progress.task("fresh images", 2 * len(scenes)) as advance:
        for name, plan in (("unsteered", None), ("unlearned", _plan(work, means, best))):
            images.append(work.paint(scenes, _FRESH, plan, advance))
            outcomes.append(judge(work, scenes, images[-1], name))
    run.write_parquet("metrics.parquet", [row for outcome in outcomes for row in outcome.rows()])
    return outcomes, images, scenes


def judge(work: _Work, scenes: Sequence[Scene], images: Tensor, name: str) -> Outcome:
    """How often the concept and all other classes are seen where they are asked for."""
    c = work.config
    other = "colour" if c.attribute == "shape" else "shape"
    labels = work.classifier.classify(images).labels
    asked = [getattr(scene, c.attribute) for scene in scenes]
    right = torch.tensor([seen == want for seen, want in zip(labels[c.attribute], asked, strict=True)])
    also = torch.tensor([s == getattr(scene, other) for s, scene in zip(labels[other], scenes, strict=True)])
    own = torch.tensor([value == c.concept for value in asked])
    classes: dict[str, Rate] = {}
    for value in c.concepts:
        classes[value] = rate(right[torch.tensor([each == value for each in asked])])
    for value in ATTRIBUTES[other]:
        chosen = torch.tensor([getattr(scene, other) == value for scene in scenes]) & ~own
        classes[value] = rate(also[chosen])
    return Outcome(
        name, c.concept, concept=rate(right[own]), others=rate(right[~own]), concept_else=rate(also[own]),
        others_else=rate(also[~own]), classes=classes, attribute=c.attribute, other=other,
    )  # fmt: skip
