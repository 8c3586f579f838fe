"""Classifiers find what is there, find nothing where labels are mixed up, and never see an image twice."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from pysteer.errors import InputError
from pysteer.weightspace import Task, classify, measure
from pysteer.weightspace.classify import MODELS
from pysteer.weightspace.coordinates import coordinates
from pysteer.weightspace.families import Features
from pysteer.weightspace.mlp import MlpConfig, train_mlps
from pysteer.weightspace.splits import grouped_split


def _planted(count=120, classes=3, width=400, signal=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = [f"c{i % classes}" for i in range(count)]
    means = torch.randn(classes, width, generator=generator) * signal / width**0.5
    x = torch.randn(count, width, generator=generator) + means[[i % classes for i in range(count)]]
    return Features("planted", x, None, width), labels


@pytest.mark.parametrize("model", MODELS)
def test_a_planted_difference_is_found_and_mixed_labels_are_not(model, monkeypatch):
    small = {"mlp": MlpConfig((64, 64), epochs=40), "mlp3": MlpConfig((64, 64, 64), lr=1e-3, epochs=40)}
    monkeypatch.setattr(classify, "_MLPS", small)
    given, labels = _planted(signal=12.0)
    task = Task.of(labels, range(len(labels)), 3, 0)
    found = measure(given, task, model)
    assert found.accuracy.value > 0.8
    assert found.accuracy.low < found.accuracy.value <= found.accuracy.high
    assert found.confusion.sum() == sum(len(split.test) for split in task.splits)
    control = measure(given, Task.of(labels, range(len(labels)), 3, 0, shuffled=True), model)
    assert control.shuffled
    assert control.accuracy.value < 0.6


def test_inner_products_give_the_same_as_features():
    given, labels = _planted()
    x = given.values.double()
    products = Features("planted", None, x @ x.T, 400)
    # z-scoring is for features alone, so features are given that have unit deviation nearly everywhere.
    split = grouped_split(labels, range(len(labels)), 0)
    a, b = coordinates(Features("planted", given.values, None, 400), split), coordinates(products, split)
    assert a.train.shape == b.train.shape
    centred = x[split.train] - x[split.train].mean(0)
    inner = b.train.double() @ b.train.double().T
    wanted = centred @ centred.T
    torch.testing.assert_close(inner / inner.trace(), wanted / wanted.trace(), rtol=1e-4, atol=1e-6)
    cross = b.test.double() @ b.train.double().T
    far = (x[split.test] - x[split.train].mean(0)) @ centred.T
    torch.testing.assert_close(cross / inner.trace(), far / wanted.trace(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("signal", "keep"), [(4.0, None), (2.0, None), (4.0, 20)])
def test_ridge_on_principal_coordinates_needs_no_second_decomposition(signal, keep):
    given, labels = _planted(signal=signal)
    split = grouped_split(labels, range(len(labels)), 0)
    data = coordinates(given, split, keep)
    assert data.principal
    centred = data.train.double() - data.train.double().mean(0)
    inner = centred.T @ centred
    assert (inner - inner.diag().diag()).abs().max() < 1e-6 * inner.diagonal().max()
    targets = [torch.tensor([int(labels[i][1:]) for i in part]) for part in (split.train, split.val)]
    quick, slow = (classify._ridge(each, *targets, 3, 0) for each in (data, dataclasses.replace(data, principal=False)))
    torch.testing.assert_close(quick, slow, rtol=1e-4, atol=1e-5)
    assert (quick.argmax(1) != quick.argmax(1)[0]).any()


def test_models_measured_together_are_what_each_is_alone():
    given, labels = _planted(count=90)
    task = Task.of(labels, range(len(labels)), 2, 0)
    together = classify.measure_models(given, task, ["ridge", "boosting", "linear"])
    assert [each.model for each in together] == ["ridge", "boosting", "linear"]
    for each in together:
        alone = measure(given, task, each.model)
        assert (each.accuracies, each.auc, each.size) == (alone.accuracies, alone.auc, alone.size)
    with pytest.raises(InputError, match="nonsense"):
        classify.measure_models(given, task, ["ridge", "nonsense"])


def test_the_test_part_does_not_reach_the_training_part():
    given, labels = _planted()
    split = grouped_split(labels, range(len(labels)), 0)
    changed = given.values.clone()
    changed[split.test] *= 100
    one, two = coordinates(given, split), coordinates(Features("x", changed, None, 400), split)
    assert torch.equal(one.train, two.train)
    assert torch.equal(one.val, two.val)


def test_constant_and_huge_features_do_no_harm():
    given, labels = _planted()
    x = torch.cat([given.values, torch.full((120, 3), 7.0), torch.zeros(120, 2)], 1)
    task = Task.of(labels, range(120), 2, 0)
    wanted = measure(given, task, "ridge").accuracies
    assert measure(Features("x", x, None, 405), task, "ridge").accuracies == wanted


def test_splits_keep_groups_together_and_classes_even():
    rng = random.Random(0)
    groups = [rng.randrange(90) for _ in range(300)]
    labels = [f"c{group % 3}" for group in groups]
    for seed in range(5):
        split = grouped_split(labels, groups, seed)
        parts = [{groups[i] for i in part} for part in (split.train, split.val, split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert sorted(np.concatenate([split.train, split.val, split.test])) == list(range(300))
        assert 0.62 < len(split.train) / 300 < 0.78
        shares = [np.mean([labels[i] == "c0" for i in part]) for part in (split.train, split.test)]
        assert abs(shares[0] - shares[1]) < 0.12
    assert not np.array_equal(grouped_split(labels, groups, 0).test, grouped_split(labels, groups, 1).test)


def test_what_cannot_be_split():
    with pytest.raises(InputError, match="at least two"):
        grouped_split(["a"] * 10, range(10), 0)
    with pytest.raises(InputError, match="lacks classes"):
        grouped_split(["a"] * 9 + ["b"], range(10), 0)
    with pytest.raises(InputError, match="lacks classes"):
        grouped_split(["a", "b"] * 5, [0] * 10, 0)  # all share an image
    with pytest.raises(InputError, match="without one"):
        Task.of(["a", "", "b"], range(3), 1, 0)


def test_networks_side_by_side_are_what_each_is_alone():
    given, labels = _planted(60, 3, 20)
    task = Task.of(labels, range(60), 3, 0)
    data = [coordinates(given, split) for split in task.splits]
    pairs = [
        (t[torch.from_numpy(s.train)], t[torch.from_numpy(s.val)])
        for t, s in zip(task.targets, task.splits, strict=True)
    ]
    config = MlpConfig((16, 16), batch=8, epochs=6)
    together = train_mlps(data, pairs, 3, config, task.seeds)
    for i in range(3):
        alone = train_mlps(data[i : i + 1], pairs[i : i + 1], 3, config, task.seeds[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-4)
