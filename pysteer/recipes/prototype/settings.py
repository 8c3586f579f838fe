"""What is fitted and which settings are generated for a pair of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pysteer.capture import Fitted
from pysteer.errors import InputError
from pysteer.methods import MeanDifference, Method, Prototype
from pysteer.recipes.grid import parse_subset
from pysteer.recipes.prototype.config import Kind, PrototypeConfig
from pysteer.recipes.prototype.data import Pair
from pysteer.recipes.setup_file import Setup
from pysteer.steering import Plan

Group = Literal["steered", "reference", "control"]
Schedule = dict[str, dict[Any, tuple[float, float]]]


_MEAN_PAIRS = 96  # a mean needs fewer samples than clusters do


@dataclass(frozen=True)
class ModelSize:
    """Scales and layers of the transformer, and blocks of its text encoder."""

    scales: int
    layers: int
    text_layers: int


@dataclass(frozen=True)
class FitJob:
    """One fit on the first `pairs` prompt pairs: `part` is "text" or "visual", `control` None or "shuffled"."""

    name: str
    part: Literal["text", "visual"]
    method: Method
    sites: tuple[str, ...]
    steps: tuple[int, ...]
    sequential: bool
    pairs: int
    control: str | None = None


@dataclass(frozen=True)
class Setting:
    """One way of generating the evaluation images.

    Attributes:
        key: name in files and tables.
        label: name for people.
        group: steered, reference or control.
        kind: kind of steering, "" for none.
        plan: what is steered, None for nothing.
        strength: factor per part of the model.
        swapped: the target prompts are given instead of the source prompts.
        level: the strength it stands for in the dose-response figure.
    """

    key: str
    label: str
    group: Group
    kind: Kind | Literal[""] = ""
    plan: Plan | None = None
    strength: Mapping[str, float] | float = 1.0
    swapped: bool = False
    level: float = 0.0


def check(config: PrototypeConfig, setup: Setup | None, size: ModelSize) -> None:
    """Raise `InputError` where the configuration asks for places the model does not have, or for nothing."""
    if setup is not None:
        setup.check(size.scales, size.layers, size.text_layers, f"setup {config.experiment_setup}")
        if "visual" in parts(config) and not setup.strengths(size.layers):
            raise InputError("steering setup", value=config.experiment_setup, allowed="a scale that is steered")
        if "text" in parts(config) and setup.text_strength == 0:
            raise InputError("strength_text", value=0, allowed="another number", fix="or use STEERING_TYPE VISUAL")
    if "text" in parts(config) and config.steering_mode == "UNCONDITIONAL":
        raise InputError(
            "STEERING_MODE with text steering",
            value="UNCONDITIONAL",
            allowed="CONDITIONAL, BOTH",
            fix="use CONDITIONAL",
        )
    for part in parts(config):
        places(config, Pair("shape", "a", "b"), part, setup, size)


def parts(config: PrototypeConfig) -> tuple[Literal["text", "visual"], ...]:
    """The parts of the model that are steered."""
    kinds = config.kinds
    return tuple(part for part in ("text", "visual") if part in kinds or "both" in kinds)


def places(
    config: PrototypeConfig, pair: Pair, part: str, setup: Setup | None, size: ModelSize
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sites and steps that are fitted."""
    if part == "text":
        layers: tuple[int, ...] | None = None if setup is None else setup.text_layers
        if setup is None and config.layers_text != "output":
            layers = parse_subset(config.layers_text, size.text_layers, "text layers")
        elif layers == (-1,):
            layers = tuple(range(size.text_layers))
        return (("text.output",) if layers is None else tuple(f"text.block.{layer}" for layer in layers)), (0,)
    location = config.location(pair.attribute)
    if location == "pooled":
        return ("pooled",), (0,)
    if setup is not None:
        table = setup.strengths(size.layers)
        return tuple(f"{location}.{layer}" for layer in sorted(table)), tuple(
            sorted({s for t in table.values() for s in t})
        )
    layers = parse_subset(config.layers, size.layers, "layers")
    scales = parse_subset(config.scale_text(pair.attribute, size.scales), size.scales, "scales")
    if not layers or not scales:
        raise InputError("places to steer", value=f"layers {config.layers}, scales {config.scales}", allowed="some")
    return tuple(f"{location}.{layer}" for layer in layers), scales


def _method(config: PrototypeConfig) -> Method:
    if config.method == "mean_difference":
        return MeanDifference()
    return Prototype(clusters=config.clusters, distance="euclid" if config.distance == "EUCLIDEAN" else "mahalanobis")


def fit_jobs(config: PrototypeConfig, pair: Pair, setup: Setup | None, size: ModelSize) -> list[FitJob]:
    """Everything that has to be fitted for a pair, controls included."""
    jobs = []
    for part in parts(config):
        sites, steps = places(config, pair, part, setup, size)
        feeding = config.is_sequential(pair.attribute) if part == "visual" else len(sites) > 1
        sequential = feeding and sites != ("pooled",)
        jobs.append(FitJob(part, part, _method(config), sites, steps, sequential, config.fit_pairs))
        if config.controls:
            jobs.append(
                FitJob(
                    f"shuffled_{part}", part, _method(config), sites, steps, sequential, config.fit_pairs, "shuffled"
                )
            )
    if config.controls and "visual" in parts(config):
        sites = tuple(f"ffn.{layer}" for layer in range(size.layers))
        every = tuple(range(size.scales))
        pairs = min(_MEAN_PAIRS, config.fit_pairs)
        jobs.append(FitJob("mean_ffn", "visual", MeanDifference(pooled=True), sites, every, False, pairs))
    return jobs


class Settings:
    """The settings of a pair, made from its fits."""

    def __init__(
        self, config: PrototypeConfig, pair: Pair, setup: Setup | None, size: ModelSize, fits: Mapping[str, Fitted]
    ) -> None:
        self.config, self.pair, self.setup, self.size, self.fits = config, pair, setup, size, fits

    def headline(self) -> Iterator[Setting]:
        """The settings that all evaluation prompts are generated with, in the order of the tables."""
        yield Setting("baseline", "unsteered", "reference")
        yield Setting("swap", "prompt swap (ceiling)", "reference", swapped=True)
        for kind in self.config.kinds:
            yield self.steered(kind, self.config.strength, kind)
        if not self.config.controls:
            return
        if "mean_ffn" in self.fits:
            plan, strength = self.fits["mean_ffn"].plan(rows=self.config.rows), self.config.mean_strength
            label = f"mean shift at ffn, strength {strength:g}"
            yield Setting("mean_ffn", label, "control", "visual", plan, strength, level=strength)
        for part in parts(self.config):
            yield self._control(part, "random", f"random direction, same norm ({part})")
            yield self._control(part, "shuffled", f"shuffled labels ({part})")

    def steered(self, kind: Kind, level: float, key: str) -> Setting:
        """Steering of a kind at strength `level`."""
        chosen = [part for part in parts(self.config) if kind in (part, "both")]
        plan = sum((self._plan(part, self.fits[part]) for part in chosen), Plan())
        strength: dict[str, float] = {part: level * self._factor(part, kind) for part in chosen}
        return Setting(key, self.label(kind), "steered", kind, plan, strength, level=level)

    def label(self, kind: Kind) -> str:
        """What steers, for people."""
        config = self.config
        how = "mean shift" if config.method == "mean_difference" else f"{config.clusters} prototypes"
        names = {"text": "text encoder", "visual": config.location(self.pair.attribute)}
        if names["visual"] == "pooled":
            names["visual"] = "pooled text vector"
        where = " and ".join(names[part] for part in parts(config) if kind in (part, "both"))
        return f"{kind}: {how}, {where}"

    def _control(self, part: str, control: str, label: str) -> Setting:
        kind: Kind = "text" if part == "text" else "visual"
        seed = self.config.seed
        fitted = self.fits[part].random_direction(seed) if control == "random" else self.fits[f"shuffled_{part}"]
        level = self.config.strength
        strength: dict[str, float] = {part: level * self._factor(part, kind)}
        return Setting(f"{control}_{part}", label, "control", kind, self._plan(part, fitted), strength, level=level)

    def _factor(self, part: str, kind: Kind) -> float:
        if self.setup is not None:
            return self.setup.text_strength if part == "text" else 1.0
        return self.config.visual_share(self.pair.attribute) if part == "visual" and kind == "both" else 1.0

    def _plan(self, part: str, fitted: Fitted) -> Plan:
        if part == "text":
            return fitted.plan(rows="cond")
        if self.setup is None:
            return fitted.plan(rows=self.config.rows)
        return fitted.plan(schedule=self._schedule(self.setup))

    def _schedule(self, setup: Setup) -> Schedule:
        """Strengths of the setup by site and step, with the rows that STEERING_MODE leaves out at 0."""
        cond, uncond = float(self.config.rows != "uncond"), float(self.config.rows != "cond")
        table = setup.strengths(self.size.layers)
        location = self.config.location(self.pair.attribute)
        if location == "pooled":
            first = next(iter(table.values()))
            c, u = first[min(first)]  # the vector exists once, before scale 0
            return {"pooled": {0: (c * cond, u * uncond)}}
        return {
            f"{location}.{layer}": {scale: (c * cond, u * uncond) for scale, (c, u) in strengths.items()}
            for layer, strengths in table.items()
        }
