"""Classifying adapters by their weights: several runs on splits of their own, with intervals and controls."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysteer.errors import InputError
from pysteer.metrics import Rate
from pysteer.metrics.rates import wilson
from pysteer.weightspace.coordinates import Coordinates, coordinates
from pysteer.weightspace.families import Features
from pysteer.weightspace.mlp import MlpConfig, train_mlps
from pysteer.weightspace.splits import Split, grouped_split

MODELS = ("ridge", "linear", "boosting", "mlp", "mlp3")
_MLPS = {"mlp": MlpConfig((512, 512)), "mlp3": MlpConfig((1024, 1024, 1024), lr=1e-4)}
_BOOSTED = 64  # coordinates that trees are grown on; their time goes with this number


@dataclass(frozen=True)
class Outcome:
    """Test figures of one feature family and one model over several runs.

    Attributes:
        family, model: which.
        size: number of features.
        accuracies, f1, auc: one per run: accuracy, macro F1, macro one-against-rest area under the curve.
        confusion: int64 `[classes, classes]`, rows are true classes, summed over runs.
        classes: their names, in the order of `confusion`.
        shuffled: whether the labels were mixed up (a control that must be at chance).
    """

    family: str
    model: str
    size: int
    accuracies: tuple[float, ...]
    f1: tuple[float, ...]
    auc: tuple[float, ...]
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]
    shuffled: bool = False

    @property
    def accuracy(self) -> Rate:
        """Mean test accuracy over runs; low and high end of its 95 % interval, the wider of two: Student's t over
        runs, and Wilson's for a test part of the size of one run (runs share adapters, so they are not independent).
        """
        mean, count = float(np.mean(self.accuracies)), len(self.accuracies)
        per_run = int(self.confusion.sum()) // count
        low, high = wilson(round(mean * per_run), per_run)
        if count > 1:
            from scipy.stats import t  # type: ignore[import-untyped]

            half = float(t.ppf(0.975, count - 1)) * float(np.std(self.accuracies, ddof=1)) / math.sqrt(count)
            low, high = min(low, mean - half), max(high, mean + half)
        return Rate(mean, max(0.0, low), min(1.0, high), per_run)

    def as_dict(self) -> dict[str, Any]:
        rate = self.accuracy
        return {
            "family": self.family, "model": self.model, "features": self.size, "shuffled": self.shuffled,
            "accuracy": rate.value, "low": rate.low, "high": rate.high, "runs": len(self.accuracies),
            "std": float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None,
            "f1": float(np.mean(self.f1)), "auc": float(np.mean(self.auc)), "test_per_run": rate.total,
        }  # fmt: skip


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """Everything about an outcome as plain values, for `outcome_of`."""
    return {**vars(outcome), "confusion": outcome.confusion.tolist()}


def outcome_of(record: dict[str, Any]) -> Outcome:
    """The outcome of a record."""
    lists = {name: tuple(record[name]) for name in ("accuracies", "f1", "auc", "classes")}
    return Outcome(**{**record, **lists, "confusion": np.array(record["confusion"], np.int64)})


@dataclass(frozen=True)
class Task:
    """Labels and splits that every family is measured on, a split per run."""

    classes: tuple[str, ...]
    targets: tuple[Tensor, ...]
    splits: tuple[Split, ...]
    seeds: tuple[int, ...]
    shuffled: bool = False

    @staticmethod
    def of(labels: Sequence[str], groups: Sequence[int], runs: int, seed: int, shuffled: bool = False) -> Task:
        """Draw the splits of all runs; `shuffled` gives every adapter the label of another one, anew in each run.

        Raises:
            InputError: no runs, unlabelled adapters, or classes too small to split.
        """
        if runs < 1:
            raise InputError("runs", value=runs, allowed="1 or more")
        if not all(labels):
            raise InputError("labels", value=f"{sum(not each for each in labels)} adapters without one",
                             allowed="a class for every adapter", fix="leave them out with where()")  # fmt: skip
        classes = tuple(sorted(set(labels)))
        targets, splits = [], []
        for run in range(runs):
            own = list(labels)
            if shuffled:
                random.Random(seed + 7919 * (run + 1)).shuffle(own)
            splits.append(grouped_split(own, groups, seed + run))
            targets.append(torch.tensor([classes.index(each) for each in own]))
        return Task(classes, tuple(targets), tuple(splits), tuple(seed + run for run in range(runs)), shuffled)


def measure(features: Features, task: Task, model: str, *, keep: int | None = None) -> Outcome:
    """Train and test one model on one feature family, see `measure_models`."""
    return measure_models(features, task, [model], keep=keep)[0]


def measure_models(features: Features, task: Task, models: Sequence[str], *, keep: int | None = None) -> list[Outcome]:
    """Train and test models on one feature family, in every run of the task.

    Args:
        features: of all adapters.
        task: labels and splits.
        models: ridge (strength chosen on the validation part), linear (multinomial logistic regression, likewise),
            boosting (histogram gradient boosting), mlp (512-512) or mlp3 (1024-1024-1024), both with the weights of
            their best epoch.
        keep: only so many principal coordinates.

    Raises:
        InputError: unknown model.
    """
    for model in models:
        if model not in MODELS:
            raise InputError("model", value=model, allowed=", ".join(MODELS))
    found, data = [], {}
    for model in models:
        few = _BOOSTED if model == "boosting" and features.size > _BOOSTED and keep is None else keep
        if few not in data:
            data[few] = [coordinates(features, split, few) for split in task.splits]
        found.append(_measured(features, task, model, data[few], keep))
    return found


def _measured(features: Features, task: Task, model: str, data: Sequence[Coordinates], keep: int | None) -> Outcome:
    picked = [tuple(target[torch.from_numpy(part)] for part in (split.train, split.val, split.test))
              for target, split in zip(task.targets, task.splits, strict=True)]  # fmt: skip
    if model in _MLPS:
        pairs = [(train, val) for train, val, _ in picked]
        chances = train_mlps(data, pairs, len(task.classes), _MLPS[model], task.seeds)
    else:
        function = {"ridge": _ridge, "linear": _linear, "boosting": _boosting}[model]
        chances = [
            function(each, train, val, len(task.classes), seed)
            for each, (train, val, _), seed in zip(data, picked, task.seeds, strict=True)
        ]
    return _outcome(features, task, model, chances, [test for _, _, test in picked], keep)


def _outcome(
    features: Features, task: Task, model: str, chances: Sequence[Tensor], truth: Sequence[Tensor], keep: int | None
) -> Outcome:
    count = len(task.classes)
    confusion = np.zeros((count, count), np.int64)
    accuracies, f1s, aucs = [], [], []
    for scores, wanted in zip(chances, truth, strict=True):
        said = scores.argmax(1)
        own = np.zeros_like(confusion)
        np.add.at(own, (wanted.numpy(), said.numpy()), 1)
        confusion += own
        accuracies.append(float((said == wanted).float().mean()))
        hit = own.diagonal()
        f1s.append(float(np.mean(2 * hit / np.maximum(1, own.sum(0) + own.sum(1)))))
        aucs.append(_auc(scores, wanted, count))
    name = features.family if keep is None else f"{features.family}, {keep} components"
    return Outcome(name, model, features.size, tuple(accuracies), tuple(f1s), tuple(aucs), confusion, task.classes,
                   task.shuffled)  # fmt: skip


def _auc(scores: Tensor, wanted: Tensor, count: int) -> float:
    """Mean over classes of the area under the curve of one against the rest (Mann and Whitney; ties count half)."""
    from scipy.stats import rankdata

    found = []
    for each in range(count):
        positive = (wanted == each).numpy()
        many, rest = int(positive.sum()), int((~positive).sum())
        if many and rest:
            ranks = rankdata(scores[:, each].numpy())
            found.append((ranks[positive].sum() - many * (many + 1) / 2) / (many * rest))
    return float(np.mean(found))


def _ridge(data: Coordinates, train: Tensor, val: Tensor, classes: int, seed: int) -> Tensor:
    """Ridge regression on +-1 targets; scores of the test part as a softmax, to be ranked."""
    x, target = data.train.double(), torch.nn.functional.one_hot(train, classes).double() * 2 - 1
    mean, offset = x.mean(0), target.mean(0)
    centred = x - mean
    held, test = (part.double() - mean for part in (data.val, data.test))
    if data.principal:
        values, right = centred.square().sum(0), None
    elif x.shape[1] > len(x):
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        right = centred.T @ (vectors / values.clamp_min(1e-12).sqrt())
    else:
        values, right = torch.linalg.eigh(centred.T @ centred)
    values = values.clamp_min(0)
    projected = centred.T @ (target - offset)
    if right is not None:
        projected, held, test = right.T @ projected, held @ right, test @ right
    best, chosen = (-1.0, -math.inf), torch.zeros(0)
    for power in np.arange(-3.0, 4.51, 0.5):
        penalty = 10**power * float(values.mean().clamp_min(1e-12))
        weights = projected / (values + penalty)[:, None]
        guess = held @ weights + offset
        wanted = torch.nn.functional.one_hot(val, classes).double() * 2 - 1
        score = (float((guess.argmax(1) == val).double().mean()), -float((guess - wanted).square().mean()))
        if score > best:
            best, chosen = score, test @ weights + offset
    return chosen.softmax(1).float()


def _linear(data: Coordinates, train: Tensor, val: Tensor, classes: int, seed: int) -> Tensor:
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    best, found = -1.0, None
    for strength in (1e-4, 1e-3, 1e-2, 1e-1):
        model = LogisticRegression(C=strength, max_iter=200).fit(data.train.numpy(), train.numpy())
        score = float((model.predict(data.val.numpy()) == val.numpy()).mean())
        if score > best:
            best, found = score, model
    assert found is not None
    return torch.from_numpy(found.predict_proba(data.test.numpy())).float()


def _boosting(data: Coordinates, train: Tensor, val: Tensor, classes: int, seed: int) -> Tensor:
    from sklearn.ensemble import HistGradientBoostingClassifier  # type: ignore[import-untyped]

    model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, learning_rate=0.15, early_stopping=False,
                                           random_state=seed)  # fmt: skip
    model.fit(data.train.numpy(), train.numpy())
    return torch.from_numpy(model.predict_proba(data.test.numpy())).float()
