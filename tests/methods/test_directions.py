"""Directions, given vectors and channels: against the formulas and through the op."""

import pytest
import torch
from applying import apply, normal

from pysteer.errors import InputError
from pysteer.methods.channel_steering import ChannelSteering
from pysteer.methods.contrastive_direction import ContrastiveDirection
from pysteer.methods.vector_steering import VectorSteering
from pysteer.steering.given import channels, vector

WIDTH = 7


def pairs(count: int = 40):
    """Samples that differ along unit 2 by a varying amount, and along nothing else."""
    x = normal(count, WIDTH, 0)
    return x, x + (3 + normal(count, 1, 1)) * torch.eye(WIDTH)[2]


@pytest.mark.parametrize("direction", ["mean", "pca_diff", "pca_center", "lda"])
def test_the_direction_that_tells_the_classes_apart(direction: str) -> None:
    x, y = pairs(2000)
    fit = ContrastiveDirection(direction=direction, unit="one").fit_site(x, y)
    torch.testing.assert_close(fit.tensors["bias"].norm(), torch.tensor(1.0))
    assert fit.tensors["bias"][2] > 0.95
    back = ContrastiveDirection(direction=direction, unit="one").fit_site(y, x)
    assert back.tensors["bias"][2] < -0.95


def test_principal_components_are_those_of_numpy() -> None:
    x, y = normal(5, WIDTH, 2), normal(5, WIDTH, 3) + 1
    for direction, samples in (("pca_diff", y - x), ("pca_center", torch.cat((x - y, y - x)) / 2)):
        away = samples.double() - samples.double().mean(0)
        first = torch.linalg.svd(away).Vh[0]
        found = ContrastiveDirection(direction=direction, unit="one").fit_site(x, y).tensors["bias"].double()
        assert abs(float(first @ found)) == pytest.approx(1.0, abs=1e-6)
        assert (y.mean(0) - x.mean(0)).double() @ found > 0
    with pytest.raises(InputError, match="unpaired"):
        ContrastiveDirection(direction="pca_diff").fit_site(x, y, paired=False)


def test_units_of_adding() -> None:
    x, y = pairs()
    gap = ContrastiveDirection().fit_site(x, y).tensors["bias"]
    torch.testing.assert_close(gap, y.mean(0) - x.mean(0))
    unit = gap.double() / gap.double().norm()
    sigma = ContrastiveDirection(unit="sigma").fit_site(x, y).tensors["bias"]
    within = torch.cat(((x - x.mean(0)).double() @ unit, (y - y.mean(0)).double() @ unit))
    expected = (within.square().sum() / (len(within) - 2)).sqrt()
    assert float(sigma.norm()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("change", ["erase", "project", "replace"])
def test_changes_along_a_direction(change: str) -> None:
    x, y = pairs()
    method = ContrastiveDirection(apply=change)
    fit = method.fit_site(x, y)
    unit = (y.mean(0) - x.mean(0)).double()
    unit /= unit.norm()
    z = normal(9, WIDTH, 4)
    along = (z.double() @ unit)[:, None] * unit
    value = float(y.mean(0).double() @ unit)
    expected = {"erase": z - along, "project": along, "replace": z - along + value * unit}[change]
    torch.testing.assert_close(apply(method.op, fit, z).double(), expected, rtol=1e-5, atol=1e-5)
    halfway = apply(method.op, fit, z, 0.5).double()
    torch.testing.assert_close(halfway, (z.double() + expected) / 2, rtol=1e-5, atol=1e-5)


def test_samples_without_a_direction() -> None:
    x = normal(4, WIDTH, 5)
    for direction in ("mean", "pca_diff", "lda"):
        with pytest.raises(InputError, match="do not differ"):
            ContrastiveDirection(direction=direction).fit_site(x, x)
    with pytest.raises(InputError, match="do not differ"):
        ContrastiveDirection(direction="pca_diff").fit_site(x[:1], x[:1] + 1)


def test_given_vectors() -> None:
    steps = torch.stack((torch.ones(WIDTH), 2 * torch.ones(WIDTH)))
    entry = vector("ffn.0", steps, steps=(1, 3))
    assert (entry.op, entry.steps) == ("affine_shift", (1, 3))
    assert torch.equal(entry.tensors["bias"], steps)
    entry.check()
    one = vector("ffn.0", 5 * torch.eye(WIDTH)[1], apply="replace", value=2.0, steps=(0, 2))
    one.check()
    assert one.tensors["read"].shape == (2, 1, WIDTH)
    assert torch.equal(one.tensors["bias"][1], 2 * torch.eye(WIDTH)[1])
    with pytest.raises(InputError, match=r"\[D\] or \[2, D\]"):
        vector("ffn.0", torch.ones(3, WIDTH), steps=(0, 1))
    with pytest.raises(InputError, match="zeros"):
        vector("ffn.0", torch.zeros(WIDTH), apply="erase")
    with pytest.raises(InputError, match="contrastive_direction"):
        VectorSteering().fit_site(torch.ones(2, WIDTH), torch.ones(2, WIDTH))


def test_channels() -> None:
    x = normal(6, WIDTH, 6)
    for mode, wanted in (("add", x[:, 1] + 3), ("scale", 3 * x[:, 1]), ("set", torch.full((6,), 3.0))):
        entry = channels("ffn.0", WIDTH, 1, 3.0, mode=mode)
        fit = ChannelSteering(channels=(1,), values=(3.0,), mode=mode).fit_site(x, x)
        assert all(torch.equal(entry.tensors[name][0], tensor) for name, tensor in fit.tensors.items())
        steered = apply("affine_shift", fit, x)
        torch.testing.assert_close(steered[:, 1], wanted)
        assert torch.equal(steered[:, 2:], x[:, 2:])
    spread = ChannelSteering(channels=[0, 4], values=[2.0, -1.0], unit="sigma").fit_site(x, x).tensors["bias"]
    torch.testing.assert_close(spread[[0, 4]], x.std(0)[[0, 4]] * torch.tensor([2.0, -1.0]))
    for bad in ({"channels": (1, 1)}, {"values": (1.0, 2.0)}, {"mode": "nudge"}, {"unit": "sigma", "mode": "set"}):
        with pytest.raises(InputError):
            ChannelSteering(**bad)
    with pytest.raises(InputError, match="0 to 6"):
        ChannelSteering(channels=(7,)).fit_site(x, x)
