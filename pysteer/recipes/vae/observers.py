"""What looks on while the autoencoder trains: monitor, classifier, nudger, weight health, and their tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pysteer.dynamics import (
    Add,
    Classifier,
    DeadChannels,
    Monitor,
    Nudger,
    Reinitialise,
    Reset,
    Scale,
    WeightHealth,
    When,
)
from pysteer.dynamics.interventions import Operation
from pysteer.recipes.vae.config import STRATEGIES, InterventionPart, VaeDynamicsConfig


def operation_of(part: InterventionPart, seed: int) -> Operation:
    """The operation that a strategy stands for."""
    kind = STRATEGIES[part.strategy]
    if kind == "scale":
        return Scale(part.nudge_factor, part.max_scale_value)
    if kind == "add":
        return Add(part.nudge_value_add, part.max_scale_value)
    return Reset() if kind == "reset" else Reinitialise(seed)


class Observers:
    """Everything that looks on, for one training.

    Attributes:
        activity: rows of `tracked_activation_stats.csv`.
        interventions: rows of `intervention_history.csv`: step, inactive, nudged.
        dead: rows of dead channels of the newest window, see `DeadChannels.rows`.
        first_seen, last_seen: step at which a channel was first and last called dead, by name.
        weights: rows of `dead_neuron_percentage_history.csv`.
    """

    def __init__(
        self, config: VaeDynamicsConfig, model: nn.Module, optimizer: Any, folder: Path | None, nudge: bool, seed: int
    ) -> None:
        self.config = config
        self.monitor: Monitor | None = None
        self.classifier: Classifier | None = None
        self.nudger: Nudger | None = None
        self.health: WeightHealth | None = None
        tracking, part, rules = config.tracking, config.intervention, config.classification
        if tracking.enabled:
            layers = list(tracking.target_layers) or "GroupNorm"
            kept = None if folder is None else folder / "channel_history"
            self.monitor = Monitor(model, layers, every=tracking.track_interval, window=tracking.window, folder=kept)
            if rules.enabled:
                chosen = list(rules.layers_to_classify) or None
                settings = {"layers": chosen, "persistence": rules.persistence, "model": model}
                self.classifier = Classifier(rules.method, rules.threshold, **settings)  # type: ignore[arg-type]
                if nudge:
                    when = When(part.intervention_interval, part.start_step, part.stop_step)
                    self.nudger = Nudger(model, operation_of(part, seed), when, optimizer, part.optimizer_state)
        raw = config.dead_neuron_tracking
        if raw.enabled:
            threshold = config.threshold if raw.threshold is None else raw.threshold
            percent = config.mean_percentage if raw.mean_percentage is None else raw.mean_percentage
            self.health = WeightHealth(model, threshold, percent, raw.dead_type or config.dead_type)
        self.activity: list[dict[str, Any]] = []
        self.interventions: list[dict[str, Any]] = []
        self.dead: list[dict[str, Any]] = []
        self.first_seen: dict[str, int] = {}
        self.last_seen: dict[str, int] = {}
        self.weights: list[dict[str, Any]] = []
        self._newest: DeadChannels | None = None

    def after(self, step: int) -> None:
        """What is to be done once step `step` is over, in order: track, classify, intervene, count weights."""
        if self.monitor is not None:
            for window in self.monitor.step(step):
                self.activity += window.table(self.monitor.metrics) if window.phase == "train" else []
                if self.classifier is not None and window.phase == "train":
                    self._note(self.classifier.classify(window))
        if self._newest is not None:
            part = self.config.intervention
            nudged = self.nudger.step(step, self._newest) if self.nudger is not None else 0
            if step % part.intervention_interval == 0:
                row = {"step": step, "inactive": self._newest.count, "nudged": nudged}
                self.interventions.append(row)
        if self.health is not None and step % self.config.dead_neuron_tracking.track_interval == 0:
            self.health.measure(step)
            self.weights += self.health.rows()
            self.health.history.clear()

    def _note(self, dead: DeadChannels) -> None:
        self._newest = dead
        self.dead = dead.rows()
        for name in dead.names():
            self.first_seen.setdefault(name, dead.step)
            self.last_seen[name] = dead.step

    @property
    def inactive(self) -> int:
        """Channels that are dead in the newest window."""
        return len(self.dead)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps as tensors, by file; the sums of the monitor are those of all processes."""
        held = {} if self.monitor is None else {"monitor": self.monitor.state_dict(merged=True)}
        parts = {"classifier": self.classifier, "nudger": self.nudger}
        return held | {name: each.state_dict() for name, each in parts.items() if each is not None}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        names = ("activity", "interventions", "dead", "first_seen", "last_seen", "weights")
        return {name: getattr(self, name) for name in names}

    def restore(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], main: bool = True
    ) -> None:
        """Go on from a checkpoint; sums of all processes are taken up by the main one alone."""
        if self.monitor is not None:
            sums = tensors["monitor"]
            self.monitor.load_state_dict(sums if main else {"armed": sums["armed"]})
        for name, each in (("classifier", self.classifier), ("nudger", self.nudger)):
            if each is not None:
                each.load_state_dict(tensors.get(name, {}))
        for name in ("activity", "interventions", "dead", "first_seen", "last_seen", "weights"):
            setattr(self, name, state[name])
        if self.monitor is not None:
            self.monitor.history.rewind(step)
            if self.classifier is not None and step >= self.config.tracking.track_interval:
                widths = {point.name: point.width for point in self.monitor.points}
                self._newest = DeadChannels.from_rows(self.dead, step, widths)
