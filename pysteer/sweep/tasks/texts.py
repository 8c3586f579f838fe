"""Task `texts`: texts of a steered language model; prompt, seed, method and strength of every row are its own."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pysteer.capture import Fitted
from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.load import load_model
from pysteer.recipes.comparison.contenders import method_of
from pysteer.recipes.config import config_hash
from pysteer.recipes.prototype.generator import choose_device, weights_mark
from pysteer.steering import Plan
from pysteer.sweep.axes import Axis
from pysteer.sweep.parameters import FitRequest, Fitter
from pysteer.sweep.prefix import Row, generate, scaled
from pysteer.sweep.runs import noise_seed, runs_of
from pysteer.sweep.tasks.base import Engine, Outputs, Task

_STEPS = {"all": (0, 1), "read": (0,), "write": (1,)}


@dataclass(frozen=True)
class TextSetting:
    """A cell: one text.

    Attributes:
        model: smollm2, a folder or a name of the hub.
        prompt: what is continued; `prompts=FILE` reads a line each.
        seed: of what is drawn, with prompt, whatever steers.
        method: none, or NAME:option=value+option=value, fitted to the lines of two files.
        source: file with a text a line, or nothing with `fitted`.
        target: file with texts of what they should come to resemble.
        site: sites such as block.10 or block.10+block.18.
        fitted: folder of parameters fitted before.
        step: whether it acts while the prompt is read, while the text is written, or at all steps.
        skip: first tokens of every text that are left out of the fit; those of many models have huge activations.
        strength: dimensionless; 1 applies what was fitted in full.
        max_new_tokens: of every text.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is drawn from.
        words: words that say that a text is about the target: `words=[[goal, team]]`, as commas alone make an axis.
        perplexity: whether to measure that of every text under the unsteered model.
        share: whether rows with the same prompt and steering read it once.
    """

    model: str = "smollm2"
    prompt: str = ""
    seed: int = 0
    method: str = "none"
    source: str = ""
    target: str = ""
    site: str = "block.10"
    fitted: str = ""
    step: Literal["all", "read", "write"] = "all"
    skip: int = 1
    strength: float = 1.0
    max_new_tokens: int = 20
    temperature: float = 0.0
    top_p: float = 1.0
    words: tuple[str, ...] = field(default_factory=tuple)
    perplexity: bool = True
    share: bool = True

    @property
    def steered(self) -> bool:
        """Whether anything acts."""
        return self.strength != 0 and (self.method != "none" or self.fitted != "")


class TextsTask(Task):
    """Texts by rows; rows with the same prompt and steering read it once."""

    name = "texts"
    setting = TextSetting
    group = ("model", "max_new_tokens", "temperature", "top_p", "share")
    together = ("prompt",)
    sets = ("method", "source", "target", "site", "fitted", "skip")
    repeats = ("prompt", "seed")
    batch_size = 64

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}  # what `check` loaded, for `open` in the same process

    def options(self) -> dict[str, str]:
        return {"prompts": "a file with a prompt a line"}

    def prepare(self, values: dict[str, Any], axes: list[Axis], options: Mapping[str, str]) -> None:
        super().prepare(values, axes, {n: v for n, v in options.items() if n not in self.options()})
        given = options.get("prompts")
        if (given is None) == (not values["prompt"] and all(axis.name != "prompt" for axis in axes)):
            raise InputError("prompts", value=given or "none", fix="give prompt= or prompts=FILE")
        if given is not None:
            texts = lines_of(given, "prompts")
            if len(texts) == 1:
                values["prompt"] = texts[0]
            else:
                axes.append(Axis("prompt", tuple(texts)))

    def check(self, settings: Sequence[TextSetting]) -> None:
        models = self.loaded
        for s in settings:
            if s.model not in models:
                models[s.model] = load_model(s.model)
                if not hasattr(models[s.model], "read"):
                    raise InputError("model of texts", value=s.model, allowed="a language model", fix="sweep images")
            request_of(s, models[s.model])

    def open(self, setting: TextSetting, folder: Path) -> Engine:
        return TextsEngine(setting, folder, self.loaded.pop(setting.model, None))

    def score(self) -> Mapping[str, str]:
        return {"target": "hit", "damage": "log_perplexity"}


def lines_of(path: str, what: str) -> list[str]:
    """The different lines of a file.

    Raises:
        InputError: no file, or one without text.
    """
    if not Path(path).is_file():
        raise InputError(f"file of {what}", value=path, allowed="a text a line", fix="check the path")
    found = list(dict.fromkeys(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()))
    texts = [line for line in found if line]
    if not texts:
        raise InputError(f"file of {what}", value=path, allowed="a text a line")
    return texts


def request_of(setting: TextSetting, lm: Any) -> FitRequest | None:
    """What has to be fitted for a setting; None where nothing has.

    Raises:
        InputError: a method, site or file that cannot be used.
    """
    if setting.fitted:
        if setting.method != "none":
            raise InputError("fitted", value=setting.fitted, fix="leave method out, or fitted")
        Fitted.from_pretrained(setting.fitted)
        return None
    if setting.method == "none":
        return None
    method = method_of(setting.method)
    sites = tuple(setting.site.split("+"))
    choose_sites(find_family(lm), lm, sites)
    source, target = lines_of(setting.source, "source"), lines_of(setting.target, "target")
    options = {"sites": sites, "paired": False, "positions": slice(setting.skip, None)}
    return FitRequest([setting.model], method, source, target, [0] * (len(source) + len(target)), options)


class TextsEngine(Engine):
    """A loaded language model with the parameters that were fitted for it."""

    def __init__(self, setting: TextSetting, folder: Path, lm: Any = None) -> None:
        self.folder, self.lm = folder, load_model(setting.model) if lm is None else lm
        self.device = choose_device("auto")
        if self.device.type != "cpu":
            self.lm.to(self.device)
        settings = {name: getattr(setting, name) for name in ("max_new_tokens", "temperature", "top_p")}
        self.runs, self.share = runs_of(self.lm, settings), setting.share
        self.plans: dict[Any, tuple[Plan, str]] = {}
        self.fitter = Fitter(self.lm, folder)
        self.weights = weights_mark(self.lm)

    def provenance(self) -> dict[str, Any]:
        return {"weights": self.weights, "device": self.device.type}

    def plan(self, setting: TextSetting) -> tuple[Plan, str]:
        """What steers a setting at strength 1, at all steps, and a hash of the parameters."""
        key = tuple(getattr(setting, name) for name in TextsTask.sets)
        if key not in self.plans:
            request = request_of(setting, self.lm)
            if setting.fitted:
                made, mark = Fitted.from_pretrained(setting.fitted), config_hash(setting.fitted)
            else:
                assert request is not None
                made, mark = self.fitter.parameters(request), request.key
            self.plans[key] = (made.plan(), mark)
        return self.plans[key]

    def generate(self, settings: Sequence[TextSetting]) -> Outputs:
        for s in sorted((s for s in settings if s.steered), key=lambda s: (s.source, s.target, s.site, s.skip)):
            self.plan(s)  # what is fitted on the same examples one after the other
        self.fitter.forget_examples()
        rows: list[Row] = []
        columns: list[dict[str, Any]] = []
        for s in settings:
            noise = noise_seed(s.prompt, s.seed)
            plan, mark = self.plan(s) if s.steered else (Plan(), "")
            plan = _at(scaled(plan, s.strength), _STEPS[s.step])
            rows.append(Row(s.prompt, noise, plan))
            prompt_hash = hashlib.blake2b(s.prompt.encode(), digest_size=8).hexdigest()
            columns.append({"noise": noise, "parameters": mark or None, "prompt_hash": prompt_hash})
        shared = generate(self.runs, rows, share=self.share)
        written, finite = self.runs.finish(shared.state)
        index = shared.index.tolist()
        texts = [written[i] for i in index]
        bad = [i for i, place in enumerate(index) if not bool(finite[place])]
        if any(s.perplexity for s in settings):  # here, since the model must not be steered while it judges
            for column, value in zip(columns, self._perplexities(settings, texts), strict=True):
                column["log_perplexity"] = value
        weight = sum(self.runs.weights)
        failed = dict.fromkeys(bad, "NaN or infinity in the logits")
        return Outputs(texts=texts, columns=columns, failed=failed, work=(shared.work[0] / weight, len(rows)))

    def _perplexities(self, settings: Sequence[TextSetting], texts: Sequence[str]) -> list[float | None]:
        whole = [s.prompt + text for s, text in zip(settings, texts, strict=True)]
        parts = list(dict.fromkeys(whole))
        values = torch.cat([self.lm.negative_log_likelihood(parts[i : i + 32]) for i in range(0, len(parts), 32)])
        known = {
            text: value if math.isfinite(value) else None for text, value in zip(parts, values.tolist(), strict=True)
        }
        return [known[text] if s.perplexity else None for s, text in zip(settings, whole, strict=True)]

    def evaluate(self, settings: Sequence[TextSetting], outputs: Outputs) -> list[dict[str, Any]]:
        assert outputs.texts is not None
        return [
            {"hit": mentions(text, s.words) if s.words else None, "length": len(text.split())}
            for s, text in zip(settings, outputs.texts, strict=True)
        ]


def mentions(text: str, words: Sequence[str]) -> bool:
    """Whether one of the words is in the text, as a whole word, in any case."""
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words)


def _at(plan: Plan, steps: tuple[int, ...]) -> Plan:
    made = Plan()
    made.entries = [type(e)(e.parameters, {step: e.at(step) for step in steps}) for e in plan.entries]
    return made
