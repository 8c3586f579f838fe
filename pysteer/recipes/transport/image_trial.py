"""One task on one image generator: fits, images over strengths, and what they show."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pysteer
from pysteer.capture.fitted import Fitted
from pysteer.capture.stream import fingerprint
from pysteer.data.tasks import Task
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.metrics.feature_distance import frechet_distance
from pysteer.metrics.rates import Rate, rate, relative_rate
from pysteer.recipes.comparison.places import find_place
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run
from pysteer.recipes.progress import Advance
from pysteer.recipes.prototype.judge import ShapesJudge
from pysteer.recipes.transport.images import ImageWriter, own_guidance
from pysteer.recipes.transport.places import expand_sites
from pysteer.recipes.transport.settings import ActImageConfig
from pysteer.recipes.transport.text_trial import make_method
from pysteer.steering import Plan

_NAN = float("nan")


@dataclass(frozen=True)
class ImageScore:
    """What images of one strength show; what was not measured is NaN or a rate without outcomes.

    Attributes:
        strength, guidance: of the images.
        target: share of the target class.
        kept: share of the images that keep their other attributes, relative to the unsteered ones; the one kept worst.
        distance: feature distance to the unsteered images.
        change: mean absolute change of a pixel against the unsteered image, 0 to 1.
        clip: means of the CLIP scores by name.
    """

    strength: float
    guidance: float
    target: Rate
    kept: Rate
    distance: float
    change: float
    clip: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for tables."""
        rates = {"target_rate": self.target.as_dict(), "kept_rate": self.kept.as_dict()}
        where = {"strength": self.strength, "guidance": self.guidance}
        return {**where, **rates, "feature_distance": self.distance, "pixel_change": self.change, **self.clip}


@dataclass(frozen=True)
class ImageOutcome:
    """What one method came to: scores by guidance and strength, the images at the generator's own guidance, and the
    strength that reached the most targets times attributes kept (or the largest)."""

    method: str
    place: str
    scores: list[ImageScore]
    images: dict[float, Tensor]
    best: ImageScore


class ImageTrial:
    """All stages of one run of `act-image`."""

    def __init__(self, run: Run, config: ActImageConfig, pipe: Any, task: Task) -> None:
        self.run, self.config, self.pipe, self.task = run, config, pipe, task
        self.methods = {name: make_method(name, config.method.options.get(name, {})) for name in config.method.names}
        self._find_place()
        family = find_family(pipe)
        known = family.sites(pipe)
        mark = fingerprint(pipe, [known[name] for name in self.sites])
        self.identity = [mark, config_hash(task.source, task.target, task.prompts)]
        self.writer = ImageWriter(run, pipe, config.generation, self.identity)
        self.guidance = config.generation.guidance or (own_guidance(pipe, config.generation),)
        self.prompts = task.prompts[: config.generation.num_prompts]
        if len(self.prompts) < config.generation.num_prompts:
            allowed = f"at most {len(self.prompts)}, which the task has"
            raise InputError("generation.num_prompts", value=config.generation.num_prompts, allowed=allowed)
        self.seeds = [run.derive_seed("image", i) % 2**31 for i in range(len(self.prompts))]
        self.judge, self.clip = self._measures()

    def _find_place(self) -> None:
        """Sites, steps and order: those of the settings, else what suits the classes or the kind of model."""
        config, family = self.config, find_family(self.pipe)
        known = family.sites(self.pipe)
        self.steps: tuple[int, ...] | None = config.method.steps or None
        sequential = config.method.incremental == "incr"
        if config.model.sites:
            self.sites = tuple(expand_sites(known, config.model.sites))
            self.place = "+".join(config.model.sites)
        elif self.task.pair is not None:
            from pysteer.zoo.shapes.captions import SHAPES

            found = find_place("visual", self.pipe, "shape" if self.task.pair[0] in SHAPES else "colour")
            self.sites, self.place = tuple(expand_sites(known, found.sites)), found.label
            self.steps = self.steps or found.steps
            sequential = sequential or (config.method.incremental == "auto" and found.sequential)
        else:
            patterns = default_image_sites(self.pipe)
            self.sites, self.place = tuple(expand_sites(known, patterns)), "+".join(patterns)
        self.sequential = sequential
        if sequential and config.method.response_steps:
            raise InputError("method.response_steps", value=config.method.response_steps, allowed="0 with incr")

    def _measures(self) -> tuple[Any, Any]:
        judge = clip = None
        if self.task.pair is not None:
            from pysteer.zoo import load_classifier

            judge = ShapesJudge(load_classifier("shapes"))
        if self.config.evaluation.clip:
            from pysteer.metrics.clip_score import Clip

            clip = Clip(self.config.evaluation.clip)
        return judge, clip

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths that are generated; 0 is always among them, as what the others are compared with."""
        return tuple(sorted({0.0, *self.config.strengths.all()}))

    @property
    def planned(self) -> int:
        """Images that are going to be generated."""
        return len(self.methods) * len(self.guidance) * len(self.strengths) * len(self.prompts)

    def fitted(self, name: str) -> Fitted:
        """The method fitted at the sites of the task."""
        folder = self.run.path(f"fits/{name}")
        with self.run.stage(f"fit-{name}", self.identity) as stage:
            if not stage.done or not folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
                self._fit(name).save_pretrained(folder)
        return Fitted.from_pretrained(folder)

    def _fit(self, name: str) -> Fitted:
        settings, method = self.config.method, self.methods[name]
        call = self.writer.call_settings()
        if settings.response_steps:
            if not hasattr(self.pipe, "pipe"):
                raise InputError("method.response_steps", value=settings.response_steps, allowed="0 for this model")
            call["num_inference_steps"] = settings.response_steps
        with self.run.progress.follow(f"fitting {name}") as show:
            return pysteer.fit(
                self.pipe,
                method,
                self.task.source,
                self.task.target,
                sites=list(self.sites),
                steps=self.steps if not settings.response_steps else None,
                sequential=self.sequential,
                shared=bool(settings.response_steps),
                paired=self.task.paired,
                rows=settings.rows,
                seeds=self.run.derive_seed("fit") % 2**31,
                batch_size=settings.batch_size,
                fit_seed=self.run.seed,
                settings=call,
                progress=show,
            )

    def outcome(self, name: str, advance: Advance) -> ImageOutcome:
        """Images and scores of one method over guidance and strengths."""
        plan: Plan = self.fitted(name).plan(rows=self.config.method.rows)
        found: list[ImageScore] = []
        shown: dict[float, Tensor] = {}
        for guidance in self.guidance:
            images = self.writer.write(name, self.prompts, self.seeds, self.strengths, guidance, plan, advance)
            self.writer.animate(name, guidance, images)
            found += self._scores(images, guidance)
            shown = shown or images
        own = [score for score in found if score.guidance == self.guidance[0] and score.strength != 0]
        best = max(own or found, key=_merit)
        return ImageOutcome(name, self.place, found, shown, best)

    def _scores(self, images: dict[float, Tensor], guidance: float) -> list[ImageScore]:
        base = images[0.0]
        judged = None if self.judge is None else self.judge(base)
        scores = []
        for strength in sorted(images):
            own, nothing = images[strength], rate([])
            target, kept, distance = nothing, nothing, _NAN
            if self.judge is not None and judged is not None and self.task.pair is not None:
                verdict = self.judge(own)
                changed = "shape" if self.task.pair[0] in set(_shapes()) else "colour"
                target = rate([label == self.task.pair[1] for label in verdict.labels[changed]])
                kept = _kept(judged.labels, verdict.labels, changed)
                distance = frechet_distance(judged.features, verdict.features) if len(own) > 1 else _NAN
            change = float((own.float() - base.float()).abs().mean()) / 255
            scores.append(ImageScore(strength, guidance, target, kept, distance, change, self._clip_scores(base, own)))
        return scores

    def _clip_scores(self, base: Tensor, own: Tensor) -> dict[str, float]:
        if self.clip is None:
            return {}
        settings, task = self.config.evaluation, self.config.task
        pair = self.task.pair or (task.source or "none", task.target or self.task.name)
        source = settings.source_text or pair[0].replace("_", " ")
        target = settings.target_text or pair[1].replace("_", " ")
        found = self.clip.scores(base, own, source, target)
        named = {"clip_source": found.source, "clip_target": found.target, "clip_prefers_target": found.prefers_target}
        return {
            name: float(value.nanmean()) for name, value in {**named, "clip_directional": found.directional}.items()
        }


def _shapes() -> Sequence[str]:
    from pysteer.zoo.shapes.captions import SHAPES

    return SHAPES


def _kept(before: dict[str, list[str]], after: dict[str, list[str]], changed: str) -> Rate:
    """Of the attributes that should stay, the one kept worst: share of images with the label they had unsteered."""
    found = []
    for name in ("shape", "colour", "background"):
        if name != changed and name in before:
            same = [a == b for a, b in zip(before[name], after[name], strict=True)]
            found.append(relative_rate(same, [True] * len(same)))
    return min(found, key=lambda each: each.value)


def _merit(score: ImageScore) -> float:
    """Target rate times attributes kept; by CLIP where there is no classifier, else the strength."""
    if score.target.total:
        return score.target.value * score.kept.value
    return score.clip.get("clip_prefers_target", score.strength)


_DEFAULT_SITES = {
    "UNet2DConditionModel": (r".*norm.*",),
    "FluxTransformer2DModel": ("block", "context"),
}


def default_image_sites(pipe: Any) -> tuple[str, ...]:
    """The sites AcT uses for a kind of model: norms of a UNet, both streams of the blocks of FLUX; else the blocks.

    Raises:
        InputError: a model for which the sites have to be given.
    """
    family = find_family(pipe)
    kind = type(family.root(pipe, "visual")).__name__
    if kind in _DEFAULT_SITES:
        return _DEFAULT_SITES[kind]
    known = family.sites(pipe)
    for name in ("block", "ca_block"):
        if any(site.rpartition(".")[0] == name for site in known):
            return (name,)
    raise InputError("model.sites", value="none", allowed="sites of this model", fix="give model.sites=...")
