"""Planted dead channels are found and named; thresholds, persistence and the published rule."""

import pytest
import torch
from torch import nn

from pysteer.dynamics import Classifier, Monitor, Quantile
from pysteer.errors import InputError

from .tiny_vae import pictures, plant, tiny_vae


@pytest.fixture(scope="module")
def planted():
    model = tiny_vae()
    names = plant(model)
    with Monitor(model, "GroupNorm", every=1) as monitor:
        model(pictures())
        (window,) = monitor.step(1)
    return model, names, window


@pytest.mark.parametrize("method", ["std", "gamma"])
def test_every_planted_channel_is_found_and_nothing_else(planted, method):
    model, names, window = planted
    dead = Classifier(method, model=model).classify(window)
    assert sorted(dead.names()) == sorted(names)
    assert dead.count == 3
    assert dead.total == sum(window.widths)
    assert all(row["since"] == 1 for row in dead.rows())


def test_mean_abs_misses_a_constant_channel_and_the_union_does_not(planted):
    _, names, window = planted
    by_mean = Classifier("mean_abs").classify(window)
    assert set(names) - set(by_mean.names()) == {"decoder.conv_norm_out.output[2]"}
    assert sorted((by_mean | Classifier("std").classify(window)).names()) == sorted(names)


def test_the_published_rule(planted):
    model, _, window = planted
    path = "encoder.down_blocks.0.resnets.0.norm1"
    classifier = Classifier("threshold_groupnorm_activity", 0.2, layers=[f"vae.{path}.output"], model=model)
    (found,) = classifier.classify(window).scales().values()
    assert found["param_name_scale"] == f"{path}.weight"
    assert found["inactive_channel_indices"] == [3]
    assert found["threshold_value"] == 0.2
    assert found["values_of_inactive_channels"] == [0.0]


def test_fractions_are_dead_from_above():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, 100.0]))
    with Monitor(model, "ReLU", every=1) as monitor:
        model(torch.randn(4, 2, 5, 5))
        (window,) = monitor.step(1)
    assert Classifier("zero_fraction", 1.0).classify(window).names() == ["1.output[0]"]
    assert Classifier("near_zero_fraction").classify(window).names() == ["1.output[0]"]


def test_persistence_counts_windows_in_a_row_and_remembers_since_when():
    norm = nn.GroupNorm(1, 2)
    model = nn.Sequential(norm)
    classifier = Classifier("std", persistence=2)
    found = []
    with Monitor(model, "norm", every=10) as monitor:
        for step, scale in zip(range(10, 70, 10), (0.0, 1.0, 0.0, 0.0, 0.0, 1.0), strict=True):
            with torch.no_grad():
                norm.weight[1] = scale
            model(torch.randn(2, 2, 4, 4))
            dead = classifier.classify(monitor.step(step)[0])
            found.append([(row["channel"], row["since"]) for row in dead.rows()])
            if step == 40:
                resumed = Classifier("std", persistence=2)
                resumed.load_state_dict(classifier.state_dict())
                classifier = resumed
    assert found == [[], [], [], [(1, 30)], [(1, 30)], []]


def test_thresholds_by_layer_and_by_quantile(planted):
    _, names, window = planted
    by_layer = Classifier("std", {r"decoder\.conv_norm_out": 1e9, ".*": 0.0}).classify(window)
    assert {name.partition(".output")[0] for name in by_layer.names()} == {"decoder.conv_norm_out"}
    by_quantile = Classifier("std", Quantile(0.5, 0.01)).classify(window)
    assert sorted(by_quantile.names()) == sorted(names)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "stdd"}, "did you mean std?"),
        ({"method": "gamma"}, "model="),
        ({"persistence": 0}, "from 1"),
        ({"layers": ["encoder.conv_norm_outt"]}, "did you mean encoder.conv_norm_out.output?"),
        ({"threshold": {"encoder.conv_norm_out": 1.0}}, "layer without a threshold"),
    ],
)
def test_what_does_not_fit_is_said(planted, arguments, says):
    with pytest.raises(InputError) as caught:
        Classifier(**arguments).classify(planted[2])
    assert says in str(caught.value)
