"""Everything that is generated for one pair of classes: fits, baseline, steered images, controls, other classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.capture import Fitted, fit
from pysteer.methods import Prototype, RowGate
from pysteer.recipes.config import config_hash
from pysteer.recipes.frame import Run
from pysteer.recipes.prototype.baseline import BaselineFile
from pysteer.recipes.prototype.config import Kind, PrototypeConfig
from pysteer.recipes.prototype.data import PairData, Prompts
from pysteer.recipes.prototype.painter import Painter, load_sheets, save_sheets
from pysteer.recipes.prototype.settings import FitJob, ModelSize, Setting, Settings, fit_jobs
from pysteer.recipes.setup_file import Setup

Advance = Callable[[float], None]


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, 3] of a setting with their prompts; `gate` [N] is 1 where a prompt was steered."""

    setting: Setting
    prompts: Prompts
    images: Tensor
    gate: Tensor | None = None

    def first(self, count: int) -> ImageSet:
        gate = None if self.gate is None else self.gate[:count]
        return ImageSet(self.setting, self.prompts.first(count), self.images[:count], gate)


@dataclass
class PairImages:
    """What was generated for a pair.

    Attributes:
        headline: setting key -> images of all evaluation prompts.
        doses: kind -> image sets of rising strength, of the first evaluation prompts.
        beside: `baseline` and kinds -> images of the prompts of other classes.
        identical: kind -> whether strength 0 gave the baseline bit for bit.
    """

    data: PairData
    headline: dict[str, ImageSet] = field(default_factory=dict)
    doses: dict[Kind, list[ImageSet]] = field(default_factory=dict)
    beside: dict[str, ImageSet] = field(default_factory=dict)
    identical: dict[Kind, bool] = field(default_factory=dict)


class PairExperiment:
    """Generates the images of one pair; every part is a stage of the run, so a second start continues.

    Args:
        run: the run.
        config: its configuration.
        painter: makes the images.
        data: the prompts.
        setup: strengths per scale and layer, or None.
        size: of the model.
        generator: plain values that identify the generator, part of what stages depend on.
    """

    def __init__(
        self,
        run: Run,
        config: PrototypeConfig,
        painter: Painter,
        data: PairData,
        setup: Setup | None,
        size: ModelSize,
        generator: Any,
    ) -> None:
        self.run, self.config, self.painter, self.data = run, config, painter, data
        self.setup, self.size = setup, size
        self.slug = data.pair.slug
        self.jobs = fit_jobs(config, data.pair, setup, size)
        self.inputs = [generator, config_hash(data), None if setup is None else setup.as_json()]

    @property
    def doses(self) -> list[float]:
        """Strengths that are generated for the dose-response figure beside 0 and the headline strength."""
        return sorted(set(self.config.strengths) - {0.0, self.config.strength})

    @property
    def planned(self) -> int:
        """How many images will be generated, fits included."""
        config = self.config
        fits = sum(2 * job.pairs for job in self.jobs if job.part == "visual")
        full = 2 + len(config.kinds) + (sum(job.control is not None for job in self.jobs) * 2 if config.controls else 0)
        full += any(job.name == "mean_ffn" for job in self.jobs)
        dose = len(self.doses) * min(config.dose_prompts, config.prompts)
        zero = min(config.batch_size, config.prompts)
        beside = len(self.data.bystanders)
        kinds = len(config.kinds)
        return fits + full * config.prompts + kinds * (dose + zero) + (kinds + 1) * beside

    def generate(self, advance: Advance, baseline: BaselineFile | None = None) -> PairImages:
        """Fit and generate everything; `advance(n)` is told about n finished images."""
        fits = {job.name: self._fit(job, advance) for job in self.jobs}
        gate = self._row_gate() if self.config.gate else None
        made = PairImages(self.data)
        settings = Settings(self.config, self.data.pair, self.setup, self.size, fits)
        test = self.data.test
        open_for = None if gate is None else gate(self.painter.pooled(test.source))
        for setting in settings.headline():
            known = baseline.load(self.data) if baseline is not None and setting.key == "baseline" else None
            made.headline[setting.key] = self._images(setting, test, open_for, advance, known)
        if baseline is not None:
            baseline.save(self.data, made.headline["baseline"].images)
        for kind in self.config.kinds:
            made.identical[kind] = self._zero(settings, kind, made, open_for, advance)
            made.doses[kind] = self._dose(settings, kind, made, open_for, advance)
        self._beside(settings, made, gate, advance)
        return made

    def _fit(self, job: FitJob, advance: Advance) -> Fitted:
        folder = self.run.path(f"fitted/{self.slug}/{job.name}")
        data, config = self.data, self.config
        prompts = data.fit.first(job.pairs)
        count = 2 * len(prompts) if job.part == "visual" else 0
        with self.run.stage(f"{self.slug}-fit-{job.name}", self.inputs, quiet=True) as stage:
            if stage.done:
                advance(count)
                return Fitted.from_pretrained(folder)
            use_others = job.part == "text" and isinstance(job.method, Prototype)
            paired = prompts.paired
            fitted = fit(
                self.painter.pipe,
                job.method,
                prompts.source,
                prompts.target,
                sites=job.sites,
                steps=job.steps if job.part == "visual" else None,
                sequential=job.sequential,
                seeds=prompts.seeds if paired else prompts.seeds * 2,
                negatives=data.negatives(config.fit_pairs) if use_others else None,
                paired=paired,
                control=job.control,
                rows=config.rows,
                batch_size=config.batch_size,
                fit_seed=config.seed,
                settings=self.painter.settings,
            )
            fitted.save_pretrained(folder)
            self.painter.painted += count
            advance(count)
        return fitted

    def _row_gate(self) -> RowGate:
        pooled = self.painter.pooled
        others = [pooled(group) for group in self.data.others.values()]
        return RowGate.fit(pooled(self.data.gate), others, threshold=self.config.gate_threshold)

    def _images(
        self,
        setting: Setting,
        prompts: Prompts,
        gate: Tensor | None,
        advance: Advance,
        known: Tensor | None = None,
        folder: str = "",
    ) -> ImageSet:
        """The images of a setting, from the run folder when the stage was finished before."""
        path = self.run.path(f"images/{self.slug}/{folder}{setting.key}.png")
        used = gate if setting.plan is not None else None
        name = f"{self.slug}-images-{folder.replace('/', '-')}{setting.key.replace('.', '_')}"
        with self.run.stage(name, [*self.inputs, config_hash(prompts)], quiet=True) as stage:
            if stage.done:
                images = load_sheets(path, len(prompts), *stage.notes["side"])
                advance(len(prompts))
                return ImageSet(setting, prompts, images, used)
            images = self._paint(setting, prompts, used, advance) if known is None else known
            if known is not None:
                advance(len(prompts))
            save_sheets(images, path)
            stage.notes["side"] = list(images.shape[1:3])
        return ImageSet(setting, prompts, images, used)

    def _paint(self, setting: Setting, prompts: Prompts, gate: Tensor | None, advance: Advance) -> Tensor:
        words = prompts.target if setting.swapped else prompts.source
        return self.painter.paint(
            words, prompts.seeds, advance, plan=setting.plan, strength=setting.strength, gate=gate
        )

    def _zero(self, settings: Settings, kind: Kind, made: PairImages, gate: Tensor | None, advance: Advance) -> bool:
        """Whether strength 0 gives the baseline bit for bit, on the first batch (equal batches, equal arithmetic)."""
        count = min(self.config.batch_size, self.config.prompts)
        with self.run.stage(f"{self.slug}-zero-{kind}", self.inputs, quiet=True) as stage:
            if stage.done:
                advance(count)
                return bool(stage.notes["identical"])
            first = self.data.test.first(count)
            setting = settings.steered(kind, 0.0, f"{kind}_zero")
            images = self._paint(setting, first, None if gate is None else gate[:count], advance)
            same = bool(torch.equal(images, made.headline["baseline"].images[:count]))
            stage.notes["identical"] = same
        return same

    def _dose(
        self, settings: Settings, kind: Kind, made: PairImages, gate: Tensor | None, advance: Advance
    ) -> list[ImageSet]:
        count = min(self.config.dose_prompts, self.config.prompts)
        first = self.data.test.first(count)
        sets = [made.headline["baseline"].first(count), made.headline[kind].first(count)]
        for level in self.doses:
            setting = settings.steered(kind, level, f"{kind}-strength-{level:g}")
            sets.append(self._images(setting, first, None if gate is None else gate[:count], advance, folder="doses/"))
        return sorted(sets, key=lambda item: item.setting.level)

    def _beside(self, settings: Settings, made: PairImages, gate: RowGate | None, advance: Advance) -> None:
        prompts = self.data.bystanders
        if not len(prompts):
            return
        open_for = None if gate is None else gate(self.painter.pooled(prompts.source))
        plain = Setting("baseline", "unsteered", "reference")
        made.beside["baseline"] = self._images(plain, prompts, None, advance, folder="others/")
        for kind in self.config.kinds:
            setting = settings.steered(kind, self.config.strength, kind)
            made.beside[kind] = self._images(setting, prompts, open_for, advance, folder="others/")


def image_folder(run: Run, slug: str) -> Path:
    """Where the images of a pair are."""
    return run.path(f"images/{slug}/grid.png").parent
