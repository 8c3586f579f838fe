"""Task `images`: steered images; prompt, noise, method, place and strength of every row are its own."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pysteer import files
from pysteer.capture import Fitted
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.load import load_model
from pysteer.recipes.comparison.contenders import NOT_FITTED, find_contenders
from pysteer.recipes.comparison.places import Place, find_place
from pysteer.recipes.config import config_hash
from pysteer.recipes.grid import parse_subset
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.data import Pair, draw_pair, parse_pair
from pysteer.recipes.prototype.generator import choose_device, weights_mark
from pysteer.steering import Plan
from pysteer.steering.plan import PlanEntry
from pysteer.sweep.axes import Axis
from pysteer.sweep.parameters import FitRequest, Fitter
from pysteer.sweep.prefix import Row, generate, scaled
from pysteer.sweep.runs import noise_seed, runs_of
from pysteer.sweep.store import Store
from pysteer.sweep.tasks.base import Engine, Outputs, Task
from pysteer.sweep.tasks.judging import measure, open_judge

_KEPT = 4096  # unsteered images held in memory


@dataclass(frozen=True)
class ImageSetting:
    """A cell: one image.

    Attributes:
        model: a bundled generator, a folder or a name of the hub.
        prompt: the text; `prompts=8` draws captions instead, `prompts=FILE` reads a line each.
        seed: of the noise, which is that of prompt and seed whatever steers.
        pair: `source->target`, the classes a method is fitted to and judged by.
        method: none, or NAME:option=value+option=value.
        site: visual (where the class is drawn), text, or sites such as ca, ca_block or ca.0+ca.1.
        step: auto, all, late (the last two), or steps such as 3-4 or 0+2.
        order: auto, once, or sequential (every site fitted with the earlier ones steered).
        strength: dimensionless; 1 applies what was fitted in full.
        rows: rows that are steered under guidance: cond, uncond or both.
        fitted: folder of parameters fitted before, instead of method and pair.
        fit_pairs: prompt pairs a method is fitted on.
        fit_seed: seed of those and of the method.
        cfg: guidance; nothing for the generator's own.
        settings: further arguments of the generator.
        judge: auto, none, shapes, or a folder of an image classifier or a CLIP model.
        share: whether rows that begin alike are computed once up to where they part.
    """

    model: str = "infinity-shapes"
    prompt: str = ""
    seed: int = 0
    pair: str = ""
    method: str = "none"
    site: str = "visual"
    step: str = "auto"
    order: Literal["auto", "once", "sequential"] = "auto"
    strength: float = 1.0
    rows: Literal["cond", "uncond", "both"] = "cond"
    fitted: str = ""
    fit_pairs: int = 64
    fit_seed: int = 0
    cfg: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    judge: str = "auto"
    share: bool = True

    @property
    def steered(self) -> bool:
        """Whether anything acts."""
        return self.strength != 0 and (self.method != "none" or self.fitted != "")


class ImagesTask(Task):
    """Images by rows; rows that begin alike share their first steps, and each has an unsteered twin to compare with."""

    name = "images"
    setting = ImageSetting
    group = ("model", "cfg", "settings", "share")
    together = ("prompt", "seed")
    sets = ("method", "pair", "site", "step", "order", "fitted", "fit_pairs", "fit_seed", "rows")
    repeats = ("prompt", "seed")
    batch_size = 64

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}  # what `check` loaded, for `open` in the same process

    def options(self) -> dict[str, str]:
        return {"prompts": "how many captions to draw, or a file with a prompt a line"}

    def prepare(self, values: dict[str, Any], axes: list[Axis], options: Mapping[str, str]) -> None:
        super().prepare(values, axes, {n: v for n, v in options.items() if n not in self.options()})
        swept = {axis.name for axis in axes}
        given = options.get("prompts")
        if "prompt" in swept or values["prompt"]:
            if given is not None:
                raise InputError("prompts", value=given, fix="give prompt= or prompts=, not both")
            return
        found = tuple(prompts_of(given or "8", str(values["pair"]), _pairs(values, axes)))
        if len(found) == 1:
            values["prompt"] = found[0]
        else:
            axes.append(Axis("prompt", found))

    def check(self, settings: Sequence[ImageSetting]) -> None:
        pipes = self.loaded
        seen: set[Any] = set()
        for s in settings:
            key = (s.model, s.pair, s.method, s.site, s.step, s.order, s.fitted)
            if key in seen:
                continue
            seen.add(key)
            if s.model not in pipes:
                pipes[s.model] = load_model(s.model)
                if hasattr(pipes[s.model], "read"):
                    raise InputError(
                        "model of images", value=s.model, allowed="a generator of images", fix="sweep texts"
                    )
            request_of(s, pipes[s.model], "")

    def open(self, setting: ImageSetting, folder: Path) -> Engine:
        return ImagesEngine(setting, folder, self.loaded.pop(setting.model, None))

    def score(self) -> Mapping[str, str]:
        return {"target": "target", "damage": "change", "kept": "kept"}


def _pairs(values: Mapping[str, Any], axes: Sequence[Axis]) -> list[str]:
    swept = next((axis.values for axis in axes if axis.name == "pair"), ())
    return [str(pair) for pair in swept or (values["pair"],) if pair]


def prompts_of(given: str, pair: str, pairs: Sequence[str]) -> list[str]:
    """Prompts: captions of the source class that nothing is fitted on, or the lines of a file.

    Raises:
        InputError: neither a number nor a file with texts.
    """
    if not given.strip().isdigit():
        lines = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else []
        texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not texts:
            raise InputError("prompts", value=given, allowed="a number, or a file with a prompt a line")
        return texts
    count = int(given)
    if not 1 <= count <= 100_000:
        raise InputError("prompts", value=count, allowed="1 to 100000")
    if len(pairs) > 1:
        raise InputError("prompts", value=given, allowed="a number with one pair", fix="give prompts=FILE or prompt=")
    if pairs:
        config = PrototypeConfig(prompts=count, fit_pairs=64, other_prompts=0, gate_prompts=16)
        return draw_pair(parse_pair(pairs[0], 1), config, lambda *keys: _derived(0, *keys)).test.source
    from pysteer.zoo.shapes.captions import sample_scenes

    return list(dict.fromkeys(scene.caption for scene in sample_scenes(4 * count, 7)))[:count]


def _derived(*keys: Any) -> int:
    return int(config_hash("sweep", keys)[:15], 16)


def place_of(setting: ImageSetting, pipe: Any, attribute: str) -> Place:
    """Where the method of a setting is fitted and applied: sites, steps (None for all) and order."""
    if setting.site == "visual":
        place = find_place("visual", pipe, attribute)
        steps, sequential = place.steps, place.sequential
        if setting.step != "auto":
            steps = _steps(setting.step, pipe)
        if setting.order != "auto":
            sequential = setting.order == "sequential"
        return Place(place.sites, steps, sequential)
    step = "all" if setting.step == "auto" else setting.step
    place = find_place(setting.site, pipe, attribute)
    return Place(place.sites, _steps(step, pipe), setting.order == "sequential")


def _steps(text: str, pipe: Any) -> tuple[int, ...] | None:
    if text == "all":
        return None
    count = find_family(pipe).steps(pipe, "visual")
    return parse_subset(f"{max(0, count - 2)}-{count - 1}" if text == "late" else text, count, "steps")


def request_of(setting: ImageSetting, pipe: Any, weights: str) -> tuple[FitRequest, Place] | None:
    """What has to be fitted for a setting; None where nothing has.

    Raises:
        InputError: a method, pair or place that cannot be used.
    """
    if setting.fitted:
        if setting.method != "none":
            raise InputError("fitted", value=setting.fitted, fix="leave method out, or fitted")
        Fitted.from_pretrained(setting.fitted)
        return None
    if setting.method == "none":
        return None
    if not setting.pair:
        raise InputError("pair", value="none", allowed="source->target", fix="say what the method is fitted to")
    pair = parse_pair(setting.pair, 1)
    contender = find_contenders([setting.method], pipe, pair.attribute)[0]
    if contender.method.name in NOT_FITTED:
        raise InputError("method", value=setting.method, fix="give the folder of its parameters as fitted=")
    place = place_of(setting, pipe, pair.attribute)
    config = PrototypeConfig(prompts=8, fit_pairs=setting.fit_pairs, other_prompts=0, gate_prompts=16)
    prompts = draw_pair(pair, config, lambda *keys: _derived(setting.fit_seed, *keys)).fit
    whole = not place.sequential and not all(site.startswith("text") for site in place.sites)
    options = {
        "sites": place.sites, "steps": None if whole else place.steps, "sequential": place.sequential,
        "rows": setting.rows, "fit_seed": setting.fit_seed, "settings": call_settings(setting, pipe),
    }  # fmt: skip
    request = FitRequest([weights], contender.method, prompts.source, prompts.target, prompts.seeds, options)
    return request, place


def call_settings(setting: ImageSetting, pipe: Any) -> dict[str, Any]:
    """Arguments of the generator's call."""
    own: dict[str, Any] = dict(setting.settings)
    if setting.cfg is not None:
        own["guidance_scale" if hasattr(pipe, "pipe") else "cfg"] = setting.cfg
    return own


class ImagesEngine(Engine):
    """A loaded generator with its judge and the parameters that were fitted for it."""

    def __init__(self, setting: ImageSetting, folder: Path, pipe: Any = None) -> None:
        self.folder, self.model_name = folder, setting.model
        self.pipe = load_model(setting.model) if pipe is None else pipe
        self.device = choose_device("auto")
        if self.device.type != "cpu":
            self.pipe.to(self.device)
        if hasattr(self.pipe, "pipe"):
            self.pipe.pipe.set_progress_bar_config(disable=True)
        self.weights = weights_mark(self.pipe)
        self.settings = call_settings(setting, self.pipe)
        self.runs = runs_of(self.pipe, self.settings)
        self.share = setting.share
        self.plans: dict[Any, tuple[Plan, str]] = {}
        self.fitter = Fitter(self.pipe, folder)
        self.judges: dict[Any, Any] = {}
        self.twins: OrderedDict[str, Tensor] = OrderedDict()

    def provenance(self) -> dict[str, Any]:
        return {"weights": self.weights, "device": self.device.type}

    def plan(self, setting: ImageSetting) -> tuple[Plan, str]:
        """What steers a setting at strength 1, and a hash of the parameters."""
        key = tuple(getattr(setting, name) for name in ImagesTask.sets)
        if key not in self.plans:
            request = request_of(setting, self.pipe, self.weights)
            if setting.fitted:
                made = Fitted.from_pretrained(setting.fitted)
                plan, mark = (
                    made.plan(rows=setting.rows),
                    config_hash(files.read_json(Path(setting.fitted) / "config.json")),
                )
            elif request is None:
                plan, mark = Plan(), ""
            else:
                made = self.fitter.parameters(request[0])
                plan, mark = _at_steps(made.plan(rows=setting.rows), request[1].steps, self.runs.parts), request[0].key
            self.plans[key] = (plan, mark)
        return self.plans[key]

    def generate(self, settings: Sequence[ImageSetting]) -> Outputs:
        for s in sorted((s for s in settings if s.steered), key=lambda s: (s.pair, s.site, s.fit_pairs, s.fit_seed)):
            self.plan(s)  # what is fitted on the same examples one after the other
        self.fitter.forget_examples()
        rows, columns = [], []
        for s in settings:
            noise = noise_seed(s.prompt, s.seed)
            plan, mark = self.plan(s) if s.steered else (Plan(), "")
            rows.append(Row(s.prompt, noise, scaled(plan, s.strength)))
            prompt_hash = hashlib.blake2b(s.prompt.encode(), digest_size=8).hexdigest()
            columns.append({"noise": noise, "parameters": mark or None, "prompt_hash": prompt_hash})
        twins = {self._twin_key(s): Row(s.prompt, noise_seed(s.prompt, s.seed), Plan()) for s in settings}
        missing = [key for key in twins if not self._twin_path(key).is_file()]
        shared = generate(self.runs, [*rows, *(twins[key] for key in missing)], share=self.share)
        images, finite = self.runs.finish(shared.state)
        images, finite = images[shared.index], finite[shared.index]
        self._keep_twins(missing, images[len(rows) :])
        bad = [i for i in range(len(rows)) if not bool(finite[i])]
        weight = sum(self.runs.weights)
        work = (shared.work[0] / weight, len(rows))
        failed = dict.fromkeys(bad, "NaN or infinity in the image")
        return Outputs(images[: len(rows)].contiguous(), columns=columns, failed=failed, work=work)

    # -- unsteered twins

    def _twin_key(self, s: ImageSetting) -> str:
        return config_hash(self.weights, s.prompt, s.seed, self.settings)

    def _twin_path(self, key: str) -> Path:
        return self.folder / "baselines" / key[:2] / key

    def _keep_twins(self, keys: Sequence[str], images: Tensor) -> None:
        names = Store(self.folder).put_images(list(images.contiguous()))
        for key, name, image in zip(keys, names, images, strict=True):
            path = self._twin_path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, name)
            self._remember(key, image)

    def _remember(self, key: str, image: Tensor) -> None:
        self.twins[key] = image.clone()
        while len(self.twins) > _KEPT:
            self.twins.popitem(last=False)

    def _twin(self, s: ImageSetting) -> Tensor:
        key = self._twin_key(s)
        held = self.twins.get(key)
        if held is None:
            from PIL import Image

            path = Store(self.folder).image_path(self._twin_path(key).read_text(encoding="utf-8"))
            held = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        return held

    def evaluate(self, settings: Sequence[ImageSetting], outputs: Outputs) -> list[dict[str, Any]]:
        assert outputs.images is not None
        measures: list[dict[str, Any]] = [{} for _ in settings]
        kinds = list(dict.fromkeys((s.judge, s.pair) for s in settings))
        for kind in kinds:
            rows = [i for i, s in enumerate(settings) if (s.judge, s.pair) == kind]
            pair: Pair | None = parse_pair(kind[1], 1) if kind[1] else None
            if kind not in self.judges:
                self.judges[kind] = open_judge(kind[0], self.model_name, pair)
            twins = torch.stack([self._twin(settings[i]) for i in rows])
            prompts = [settings[i].prompt for i in rows]
            found = measure(self.judges[kind], pair, outputs.images[rows], twins, prompts)
            for i, measured in zip(rows, found, strict=True):
                measures[i] = measured
        return measures


def _at_steps(plan: Plan, steps: tuple[int, ...] | None, parts: Mapping[str, str]) -> Plan:
    """The plan at some of the visual steps that it was fitted for."""
    if steps is None:
        return plan
    made = Plan()
    for entry in plan.entries:
        text = parts[entry.parameters.site].startswith("text")
        chosen: dict[int | None, tuple[float, float]] = {step: entry.at(step) for step in steps}
        made.entries.append(entry if text else PlanEntry(entry.parameters, chosen))
    return made
