"""Dead weights against their formulas, in all three modes."""

import pytest
import torch
from torch import nn

from pysteer.dynamics import WeightHealth
from pysteer.errors import InputError

from .tiny_vae import tiny_vae


def _formula(weight: torch.Tensor, threshold: float, part: float) -> dict[str, float]:
    size = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    mean = size.double().mean().item()
    relative = part * mean if mean >= 1e-9 else 1e-9
    percent = 100 * (size < relative).double().mean().item()
    if mean < 1e-9:
        percent = 100.0 if bool((size < 1e-9).all()) else 0.0
    return {
        "threshold": 100 * (size < threshold).double().mean().item(),
        "percent_of_mean": percent,
        "both": 100 * ((size < threshold) & (size < relative)).double().mean().item(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [1e-8, 0.02, 0.2])
def test_all_modes(dtype, threshold):
    model = tiny_vae().to(dtype)
    with torch.no_grad():
        model.encoder.conv_in.weight[2] = 0
        model.decoder.conv_in.weight.mul_(1e-12)
        model.decoder.conv_out.weight.data = model.decoder.conv_out.weight.data.to(memory_format=torch.channels_last)
    health = WeightHealth(model, threshold, 0.3)
    found = health.measure(5)
    parameters = dict(model.named_parameters())
    assert "encoder.mid_block.attentions.0.to_q.weight" in found.names
    for index, name in enumerate(found.names):
        for mode, expected in _formula(parameters[name], threshold, 0.3).items():
            assert found.percent[mode][index].item() == pytest.approx(expected, abs=1e-9), (name, mode)
        mean = parameters[name].detach().abs().double().mean().item()
        assert found.mean_abs[index].item() == pytest.approx(mean, rel=1e-6)


def test_the_history_follows_the_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(1, 3))
    health = WeightHealth(model, 1e-3, parameters=["vae.1.weight"])
    health.measure(1)
    with torch.no_grad():
        model[1].weight[0] = 0
    health.measure(2)
    rows = health.rows()
    assert [(row["layer"], row["step"]) for row in rows] == [("1.weight", 1), ("1.weight", 2)]
    assert [row["percentage"] for row in rows] == pytest.approx([0.0, 100 / 3])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "all"}, "percent_of_mean"),
        ({"parameters": ["nothing"]}, "parameter"),
        ({"threshold": -1}, "0 or more"),
    ],
)
def test_what_does_not_fit_is_said(arguments, says):
    with pytest.raises(InputError) as caught:
        WeightHealth(nn.Sequential(nn.Linear(2, 2)), **arguments)
    assert says in str(caught.value)
