"""What is fitted at sites with maps, and methods at one site in a stated order."""

from typing import Any

import pytest
import torch
from steering_toy import LAYERS, STEPS, WIDTH, Toy
from test_bounds import MapFamily, Maps
from torch import Tensor

import pysteer
from pysteer.families import base
from pysteer.methods import AurA, GaussianTransport, LinearAcT, Method
from pysteer.methods.unit_map import support_of
from pysteer.steering import Plan, channels, steer, vector


def fitted_on_maps(method: Method, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source and target maps `[N, D, H, W]`, new maps, and those steered by the fit at strength 0.7."""
    family = MapFamily()
    monkeypatch.setattr(base, "_FAMILIES", [family])
    model, inputs = Maps(), torch.randn(24, WIDTH, 3, 4)
    inputs += torch.randn(24, WIDTH, 1, 1)
    inputs[12:] = 1.5 * inputs[12:] + 0.4

    def run(x: Tensor) -> Tensor:
        family.announce("visual", len(x), 0, None)
        return model(x)

    def generate(prompts: Any, seeds: Any) -> None:
        run(inputs[[int(prompt) for prompt in prompts]])

    numbers = [str(number) for number in range(24)]
    fitted = pysteer.fit(model, method, numbers[:12], numbers[12:], sites="all", paired=False, generate=generate)
    x = torch.randn(6, WIDTH, 3, 4)
    with steer(model, fitted.plan(), strength=0.7):
        steered = run(x)
    return model(inputs[:12]), model(inputs[12:]), model(x), steered


def along_maps(values: Tensor) -> Tensor:
    return values.double().view(-1, 1, 1)


def test_linear_act_shifts_maps_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    method = LinearAcT(support="10-90")
    source, target, x, steered = fitted_on_maps(method, monkeypatch)
    fit = method.fit_site(source.mean((2, 3)), target.mean((2, 3)), paired=False).tensors
    mean = x.double().mean((2, 3), keepdim=True)
    moved = along_maps(fit["gain"]) * mean + along_maps(fit["bias"])
    inside = (mean > along_maps(fit["low"])) & (mean < along_maps(fit["high"]))
    expected = torch.where(inside, x - mean + 0.7 * moved + 0.3 * mean, x.double())
    torch.testing.assert_close(steered.double(), expected, rtol=1e-5, atol=1e-5)
    assert inside.any()
    assert not inside.all()


@pytest.mark.parametrize("support", ["all", "10-90"])
def test_gaussian_transport_moves_pixels_where_the_mean_is_inside(
    support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, x, steered = fitted_on_maps(GaussianTransport(support=support), monkeypatch)
    a, b = (maps.double().mean((2, 3)) for maps in (source, target))
    moved = along_maps(b.std(0) / a.std(0)) * (x - along_maps(a.mean(0))) + along_maps(b.mean(0))
    expected = 0.7 * moved + 0.3 * x
    if support != "all":
        low, high = support_of(a, support).values()
        mean = x.double().mean((2, 3), keepdim=True)
        inside = (mean > along_maps(low)) & (mean < along_maps(high))
        assert 0 < inside.sum() < inside.numel()
        expected = torch.where(inside, expected, x.double())
    torch.testing.assert_close(steered.double(), expected, rtol=1e-4, atol=1e-5)


def test_aura_scales_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, x, steered = fitted_on_maps(AurA(), monkeypatch)
    gain = AurA().fit_site(source.mean((2, 3)), target.mean((2, 3)), paired=False).tensors["gain"]
    torch.testing.assert_close(steered.double(), (0.3 + 0.7 * along_maps(gain)) * x, rtol=1e-5, atol=1e-6)
    assert (gain < 1).any()


def test_methods_at_one_site_apply_in_the_order_of_the_plan(model: Toy) -> None:
    site = f"block.{LAYERS - 1}"  # its output is the model's
    x = torch.randn(2, STEPS, WIDTH)
    halve = Plan.build([channels(site, WIDTH, range(WIDTH), 0.5, mode="scale")])
    add = Plan.build([vector(site, torch.arange(WIDTH) + 1.0)])
    erase = Plan.build([vector(site, torch.ones(WIDTH), apply="erase")])
    amount, plain = torch.arange(WIDTH) + 1.0, model.run(x)

    def erased(y: Tensor) -> Tensor:
        return y - y.mean(-1, keepdim=True)

    orders = {
        (halve, add): lambda y: 0.5 * y + amount,
        (add, halve): lambda y: 0.5 * (y + amount),
        (add, halve, erase): lambda y: erased(0.5 * (y + amount)),
        (erase, add, halve): lambda y: 0.5 * (erased(y) + amount),
    }
    for plans, wanted in orders.items():
        plan = sum(plans[1:], start=plans[0])
        with steer(model, plan):
            steered = model.run(x)
        for before, after in zip(plain, steered, strict=True):
            torch.testing.assert_close(after, wanted(before), rtol=1e-5, atol=1e-5)
