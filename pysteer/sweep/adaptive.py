"""Adaptive sweeps through Optuna: successive halving, and a Pareto search of target against damage.

The axes that are drawn from are searched; all others are combined with every trial. Trials are asked for in waves, and
the cells of a wave are packed like any others. Prompts and seeds are the budget: halving gives every trial a part of
them at first, and twice as much to those that look best. What is asked next follows from seeds and results alone, so a
search that was interrupted goes through its waves again, finds their cells finished, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pysteer import files
from pysteer.errors import InputError
from pysteer.sweep.axes import Axis
from pysteer.sweep.cells import Cells
from pysteer.sweep.driver import Launch, run_sweep
from pysteer.sweep.plan import Options, SweepPlan, plan_sweep
from pysteer.sweep.store import Store
from pysteer.sweep.tasks.base import Task

MODES = ("halving", "pareto")


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        mode: halving (the highest target minus `weight` times damage) or pareto (both apart).
        trials: settings that are tried.
        wave: trials asked for at a time.
        factor: by which halving multiplies the budget, and divides the trials that stay.
        rungs: budgets of halving.
        weight: of the damage in halving.
        seed: of the search.
    """

    mode: str = "halving"
    trials: int = 32
    wave: int = 8
    factor: int = 2
    rungs: int = 3
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError("adaptive", value=self.mode, allowed=", ".join(MODES))
        if min(self.trials, self.wave, self.rungs) < 1 or self.factor < 2:
            raise InputError("search", value=self, allowed="at least 1 trial, wave and rung, and a factor from 2")


@dataclass
class Trial:
    """One setting that was tried: values of the searched axes, cells it got, means of target and damage."""

    values: dict[str, Any]
    cells: int = 0
    target: float | None = None
    damage: float | None = None
    stopped: bool = False


@dataclass
class Found:
    """What a search found: all trials, and which of them are best (for pareto, the front)."""

    trials: list[Trial]
    best: list[Trial] = field(default_factory=list)


def search(
    plan_words: Sequence[str],
    task_name: str,
    folder: str | Path,
    options: SearchOptions,
    *,
    launch: Launch | None = None,
    batch_size: int = 0,
    tell: Callable[[str], object] = lambda line: None,
) -> Found:
    """Search the drawn axes of a sweep; cells go to the store of `folder` like those of any sweep.

    Raises:
        InputError: nothing to search, or a task that does not say what is good.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    whole = plan_sweep(task_name, plan_words, Options(samples=1, batch_size=batch_size))
    drawn = [axis for axis in whole.axes if axis.drawn]
    roles = whole.task.score()
    if "target" not in roles or (options.mode == "pareto" and "damage" not in roles):
        raise InputError("adaptive", value=task_name, allowed="a task that measures a target and damage")
    rest = [axis for axis in whole.axes if not axis.drawn]
    grid = SweepPlan(whole.task, whole.base, rest, Options(batch_size=batch_size)).cells
    budget = np.random.default_rng(options.seed).permutation(len(grid))  # each rung gets a fair part of the prompts
    store = Store(folder)
    store.create({**whole.mark(plan_words), "cells": 0, "search": vars(options)})
    searcher = _Search(whole.task, whole.base, drawn, grid, budget, store, options, launch, batch_size, tell, roles)
    found = searcher.run(optuna)
    store.create({**whole.mark(plan_words), "cells": searcher.asked, "search": vars(options)})
    files.write_json(store.path("search.json"), {"trials": found.trials, "best": found.best})
    return found


class _Search:
    def __init__(
        self, task: Task, base: Mapping[str, Any], drawn: list[Axis], grid: Cells, budget: Any, store: Store,
        options: SearchOptions, launch: Launch | None, batch_size: int, tell: Callable[[str], object],
        roles: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.task, self.base, self.drawn, self.grid, self.budget = task, dict(base), drawn, grid, budget
        self.store, self.options, self.launch, self.batch_size = store, options, launch, batch_size
        self.tell, self.roles = tell, roles
        self.trials: list[Trial] = []
        self.asked = 0

    def run(self, optuna: Any) -> Found:
        o = self.options
        if o.mode == "pareto":
            sampler = optuna.samplers.NSGAIISampler(seed=o.seed, population_size=o.wave)
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        else:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=o.factor, bootstrap_count=0
            )
            sampler = optuna.samplers.TPESampler(seed=o.seed, n_startup_trials=o.wave, constant_liar=True)
            study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        while len(self.trials) < o.trials:
            count = min(o.wave, o.trials - len(self.trials))
            asked = [study.ask() for _ in range(count)]
            wave = [Trial({axis.name: _suggest(trial, axis) for axis in self.drawn}) for trial in asked]
            self.trials += wave
            if o.mode == "pareto":
                self._measure(wave, len(self.grid))
                for trial, own in zip(asked, wave, strict=True):
                    study.tell(trial, [own.target or 0.0, own.damage if own.damage is not None else 1e9])
            else:
                self._halve(study, asked, wave, optuna)
            self.tell(self._line())
        return Found(self.trials, self._best())

    def _halve(self, study: Any, asked: list[Any], wave: list[Trial], optuna: Any) -> None:
        """Every rung: the cells of all trials that are left in one pack, then the worse ones end."""
        o = self.options
        alive = list(zip(asked, wave, strict=True))
        for rung in range(o.rungs):
            part = max(1, round(len(self.grid) / o.factor ** (o.rungs - 1 - rung)))
            self._measure([own for _, own in alive], part)
            for trial, own in alive:
                trial.report(self._value(own), step=o.factor**rung)
            if rung + 1 == o.rungs:
                break
            order = sorted(alive, key=lambda pair: -self._value(pair[1]))
            kept = max(1, len(order) // o.factor)
            # Of the best ones of this wave those end that are worse than what earlier waves had at this rung.
            alive = [pair for i, pair in enumerate(order) if i == 0 or (i < kept and not pair[0].should_prune())]
            for trial, own in order:
                if not any(own is other for _, other in alive):
                    own.stopped = True
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        for trial, own in alive:
            study.tell(trial, self._value(own))

    def _value(self, trial: Trial) -> float:
        return (trial.target or 0.0) - self.options.weight * (trial.damage or 0.0)

    def _measure(self, trials: list[Trial], part: int) -> None:
        """Run the first `part` of the budget for every trial, and take the means."""
        rows = self.budget[:part]
        names = self.grid.names + [axis.name for axis in self.drawn]
        values: dict[str, list[Any]] = {name: list(known) for name, known in self.grid.values.items()}
        codes = np.empty((len(trials) * part, len(names)), np.int32)
        for i, axis in enumerate(self.drawn):
            own = [trial.values[axis.name] for trial in trials]
            values[axis.name] = list(dict.fromkeys(own))
            place = [values[axis.name].index(value) for value in own]
            codes[:, len(self.grid.names) + i] = np.repeat(np.array(place, np.int32), part)
        codes[:, : len(self.grid.names)] = np.tile(self.grid.codes[rows], (len(trials), 1))
        cells = Cells(self.task.name, self.base, values, codes)
        keys = [key.decode() for key in cells.keys]
        plan = SweepPlan.of_cells(self.task, cells.without_doubles(), self.batch_size)
        run_sweep(plan, self.store.folder, launch=self.launch, mark=False)
        measures = self._rows(set(keys))
        for i, trial in enumerate(trials):
            mine = [measures[key] for key in keys[i * part : (i + 1) * part] if key in measures]
            self.asked += part - trial.cells
            trial.cells = part
            trial.target, trial.damage = (_mean([pair[k] for pair in mine]) for k in (0, 1))

    def _rows(self, keys: set[str]) -> dict[str, tuple[float | None, float | None]]:
        import pyarrow.parquet as pq

        found: dict[str, tuple[float | None, float | None]] = {}
        names = [self.roles["target"], self.roles.get("damage", "")]
        for path in self.store.shards():
            table = pq.read_table(path)
            columns = [table[n].to_pylist() if n in table.column_names else [None] * len(table) for n in names]
            for key, target, damage in zip(table["key"].to_pylist(), *columns, strict=True):
                if key in keys:
                    found[key] = (None if target is None else float(target), damage)
        return found

    def _best(self) -> list[Trial]:
        full = [t for t in self.trials if t.target is not None and not t.stopped]
        if self.options.mode == "halving":
            return sorted(full, key=lambda t: -self._value(t))[:1]
        front, least = [], float("inf")
        for trial in sorted(full, key=lambda t: (-(t.target or 0.0), t.damage or 0.0)):
            if trial.damage is not None and trial.damage < least:
                least = trial.damage
                front.append(trial)
        return front

    def _line(self) -> str:
        best = self._best()
        shown = "; ".join(describe(trial) for trial in best[:3])
        return f"{len(self.trials)}/{self.options.trials} trials, {self.asked} cells, best: {shown}"


def describe(trial: Trial) -> str:
    """A trial in one line."""
    values = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.values.items())
    target = "?" if trial.target is None else f"{trial.target:.3f}"
    return f"{values}: target {target}" + ("" if trial.damage is None else f", damage {trial.damage:.4g}")


def _suggest(trial: Any, axis: Axis) -> Any:
    if axis.values:
        return axis.values[trial.suggest_categorical(axis.name, list(range(len(axis.values))))]
    if axis.whole:
        return trial.suggest_int(axis.name, int(axis.low), int(axis.high))
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def search_command(
    mode: str, task: str, words: Sequence[str], options: Options, folder: Path, launch: Launch, **more: Any
) -> None:
    """`pysteer sweep ... --adaptive MODE --samples N`: N trials."""
    import typer

    if options.zipped:
        raise InputError("zip", value=options.zipped, allowed="none with --adaptive")
    if launch.launcher == "slurm":
        raise InputError("launcher", value="slurm", allowed="local, processes, ray with --adaptive")
    chosen = SearchOptions(mode, trials=options.samples or 32, seed=options.sample_seed)
    found = search(words, task, folder, chosen, launch=launch, batch_size=options.batch_size, tell=typer.echo)
    for trial in found.best:
        typer.echo(f"best: {describe(trial)}")
    typer.echo(f"{len(found.trials)} trials: {folder}")
