"""Prompts of a pair of classes: to fit on, to evaluate on, and of other classes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.zoo.shapes.captions import ATTRIBUTES, parse_caption, sample_pairs, sample_scenes

DeriveSeed = Callable[..., int]


@dataclass(frozen=True)
class Pair:
    """Two classes; `attribute` is what they differ in ("shape", "colour" or "class")."""

    attribute: str
    source: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}"

    @property
    def slug(self) -> str:
        return f"{self.source}-to-{self.target}".replace(" ", "-")


@dataclass(frozen=True)
class Prompts:
    """Prompts with the noise seed of each; row i of `target` belongs to row i of `source` when `paired`."""

    source: list[str]
    target: list[str]
    seeds: list[int]
    paired: bool = True

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int) -> Prompts:
        return Prompts(self.source[:count], self.target[:count], self.seeds[:count], self.paired)


@dataclass(frozen=True)
class PairData:
    """The prompts of a pair.

    Attributes:
        fit: pairs that the shifts are fitted on.
        test: pairs that are evaluated.
        gate: source prompts that the row gate is fitted on.
        others: class -> prompts of other classes, for the gate and as negatives of the text fit.
        bystanders: prompts of other classes that are evaluated.
    """

    pair: Pair
    fit: Prompts
    test: Prompts
    gate: list[str]
    others: dict[str, list[str]]
    bystanders: Prompts

    def negatives(self, count: int) -> list[str]:
        """About `count` prompts of other classes, evenly from all of them."""
        share = -(-count // max(1, len(self.others)))
        return [prompt for group in self.others.values() for prompt in group[:share]]


def parse_pair(text: str, variant: int) -> Pair:
    """`circle->square` as a pair; `variant` 0 turns it round. Raises `InputError` for words of different attributes."""
    source, arrow, target = (part.strip().lower() for part in text.partition("->"))
    words = ", ".join((*ATTRIBUTES["shape"], *ATTRIBUTES["colour"]))
    if not arrow or not source or not target:
        raise InputError("pair", value=text, allowed="source->target", fix="write for example circle->square")
    for attribute in ("shape", "colour"):
        if source in ATTRIBUTES[attribute] and target in ATTRIBUTES[attribute] and source != target:
            return Pair(attribute, source, target) if variant == 1 else Pair(attribute, target, source)
    raise InputError("pair", value=text, allowed=f"two different shapes or two different colours of {words}")


def noise_seeds(count: int, seed: int) -> list[int]:
    """`count` seeds of images, below 2^31."""
    rng = random.Random(seed)
    return [rng.randrange(2**31) for _ in range(count)]


def draw_pair(pair: Pair, config: PrototypeConfig, derive_seed: DeriveSeed) -> PairData:
    """Draw captions for `pair`: no evaluation caption was fitted on, and all noise seeds differ."""
    key = (pair.attribute, pair.source, pair.target)

    def scenes(count: int, part: str) -> list[tuple[str, str]]:
        drawn = sample_pairs(count, pair.attribute, pair.source, pair.target, derive_seed("captions", part, *key))
        return [(source.caption, target.caption) for source, target in drawn]

    fitted = scenes(config.fit_pairs, "fit")
    seen = {source for source, _ in fitted}
    fresh: list[tuple[str, str]] = []
    spare: list[tuple[str, str]] = []
    for caption in scenes(6 * config.prompts, "test"):
        (spare if caption[0] in seen else fresh).append(caption)
        seen.add(caption[0])
    fitted_on = {source for source, _ in fitted}
    again = [caption for caption in spare if caption[0] not in fitted_on]
    tested = (fresh + again)[: config.prompts]
    if len(tested) < config.prompts:
        raise InputError(
            "prompts", value=config.prompts, allowed=f"at most {len(tested)} that were not fitted on", fix="take fewer"
        )
    beside = _bystanders(pair, config, derive_seed)
    gate, others = _gate_captions(pair, config, {source for source, _ in tested} | set(beside.source), derive_seed)
    return PairData(
        pair,
        Prompts(
            [s for s, _ in fitted], [t for _, t in fitted], noise_seeds(len(fitted), derive_seed("noise fit", *key))
        ),
        Prompts([s for s, _ in tested], [t for _, t in tested], noise_seeds(len(tested), derive_seed("noise", *key))),
        gate,
        others,
        beside,
    )


def _bystanders(pair: Pair, config: PrototypeConfig, derive_seed: DeriveSeed) -> Prompts:
    key = (pair.attribute, pair.source, pair.target)
    groups = _other_captions(pair, config.other_prompts, derive_seed("beside", *key))
    captions = [caption for group in groups.values() for caption in group]
    return Prompts(captions, captions, noise_seeds(len(captions), derive_seed("noise beside", *key)))


def _gate_captions(
    pair: Pair, config: PrototypeConfig, avoid: set[str], derive_seed: DeriveSeed
) -> tuple[list[str], dict[str, list[str]]]:
    """Source captions and captions of the other classes to fit the gate on, none of them in `avoid`."""
    key = (pair.attribute, pair.source, pair.target)
    drawn = sample_scenes(config.gate_prompts, derive_seed("gate", *key), {pair.attribute: pair.source})
    source = [scene.caption for scene in drawn if scene.caption not in avoid]
    groups = _other_captions(pair, config.gate_prompts, derive_seed("gate others", *key))
    others = {name: [c for c in captions if c not in avoid] for name, captions in groups.items()}
    return source, {name: captions for name, captions in others.items() if captions}


def _other_captions(pair: Pair, count: int, seed: int) -> dict[str, list[str]]:
    """About `count` captions of the other classes, class by class."""
    names = [value for value in ATTRIBUTES[pair.attribute] if value != pair.source]
    shares = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
    drawn = {
        name: [s.caption for s in sample_scenes(share, seed + i, {pair.attribute: name})]
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    }
    return {name: captions for name, captions in drawn.items() if captions}


def read_pair(config: PrototypeConfig, path: str, derive_seed: DeriveSeed) -> PairData:
    """Prompts of the two classes of a JSON file; the first 40 % are fitted on, the rest evaluated.

    Accepted: `{"classes": [a, b], "prompts": {"0": [...], "1": [...]}}`, `{a: [...], b: [...]}` and a list of
    `{"prompt": ..., "label": 0 or 1}`. Lists of equal length are pairs, row by row. Where the file is shorter than
    `fit_pairs` or `prompts`, prompts return with new noise.
    """
    names, classes = _two_classes(files.read_json(path, "prompts file"), path)
    pair = _identify(names, classes, config.dataset)
    if config.variant == 0:
        pair, classes = Pair(pair.attribute, pair.target, pair.source), classes[::-1]
    paired = len(classes[0]) == len(classes[1])
    cuts = [max(1, round(0.4 * len(prompts))) for prompts in classes]
    fit = [_repeat(prompts[:cut], config.fit_pairs) for prompts, cut in zip(classes, cuts, strict=True)]
    test = [_repeat(prompts[cut:], config.prompts) for prompts, cut in zip(classes, cuts, strict=True)]
    beside = Prompts([], [], [])
    gate, others = classes[0][: cuts[0]], {pair.target: classes[1][: cuts[1]]}
    if pair.attribute != "class":
        beside = _bystanders(pair, config, derive_seed)
        gate, others = _gate_captions(pair, config, {*test[0], *beside.source}, derive_seed)
    return PairData(
        pair,
        Prompts(fit[0], fit[1], noise_seeds(config.fit_pairs, derive_seed("noise fit")), paired),
        Prompts(test[0], test[1], noise_seeds(config.prompts, derive_seed("noise")), paired),
        gate,
        others,
        beside,
    )


def _repeat(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def _two_classes(values: Any, path: str) -> tuple[list[str], list[list[str]]]:
    forms = (
        '{"classes": [a, b], "prompts": {"0": [...], "1": [...]}}, {a: [...], b: [...]} or [{"prompt", "label"}, ...]'
    )
    names = ["0", "1"]
    if isinstance(values, list) and all(isinstance(row, dict) for row in values):
        groups: Any = [[row.get("prompt") for row in values if row.get("label") == label] for label in (0, 1)]
        if sum(map(len, groups)) != len(values):
            raise InputError("prompts file, label", value=path, allowed="0 or 1", fix="label every prompt")
    elif isinstance(values, dict) and "prompts" in values:
        prompts = values["prompts"]
        names = [str(name) for name in values.get("classes", names)]
        groups = [prompts.get("0"), prompts.get("1")] if isinstance(prompts, dict) else prompts
    elif isinstance(values, dict) and len(values) == 2:
        names, groups = [str(name) for name in values], list(values.values())
    else:
        raise InputError("prompts file", value=path, allowed=forms, fix="see the example files")
    if not isinstance(groups, list) or len(groups) != 2 or len(names) != 2:
        raise InputError("prompts file, classes", value=path, allowed=forms, fix="give two classes")
    for name, group in zip(names, groups, strict=True):
        good = isinstance(group, list) and all(isinstance(prompt, str) and prompt.strip() for prompt in group)
        if not good or len(group) < 3:
            raise InputError(
                f"prompts file {path}, class {name}", value=group, allowed="at least 3 texts", fix="correct the file"
            )
    return names, groups


def _identify(names: list[str], classes: list[list[str]], dataset: str) -> Pair:
    """The pair that a prompts file is about; captions of shapes say it themselves."""
    if dataset != "shapes_colors":
        return Pair("class", names[0], names[1])
    parsed = [[parse_caption(prompt) for prompt in group] for group in classes]
    for attribute in ("shape", "colour"):
        values = [{caption.get(attribute, "") for caption in group} for group in parsed]
        if all(len(v) == 1 for v in values) and values[0] != values[1] and "" not in values[0] | values[1]:
            return Pair(attribute, values[0].pop(), values[1].pop())
    raise InputError(
        "classes of the prompts file",
        value=", ".join(names),
        allowed="two that differ in their shape or in their colour, the same in every prompt of a class",
        fix="correct the prompts, or DATASET",
    )
