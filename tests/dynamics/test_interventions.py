"""Nudges: exact formulas, caps and signs, only the chosen channels, the optimizer, undo, schedules, revival."""

import pytest
import torch
from torch import nn

import pysteer
from pysteer.dynamics import Add, Classifier, Monitor, Nudger, Reinitialise, Reset, Scale, When, nudge_plan
from pysteer.dynamics.classify import DeadChannels, DeadLayer
from pysteer.errors import InputError

from .tiny_vae import PLANTED, pictures, plant, tiny_vae


def _dead(name: str, channels: list[int], width: int) -> DeadChannels:
    index = torch.tensor(channels)
    return DeadChannels(1, {name: DeadLayer(index, torch.zeros(len(channels)), index * 0, 1.0, "std", width)})


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Scale(1.5, 1.0), [0.0, 0.15, -0.75, 1.0, 3.0, -1.0]),
        (Add(0.1, 1.0), [0.1, 0.2, -0.6, 1.0, 3.0, -1.0]),
        (Reset(0.5), [0.5] * 6),
        (Reinitialise(), [1.0] * 6),
    ],
)
def test_the_new_scales(operation, expected):
    old = torch.tensor([0.0, 0.1, -0.5, 0.95, 3.0, -0.95])
    torch.testing.assert_close(operation.scales(old), torch.tensor(expected))


@pytest.mark.parametrize("operation", [Scale(1.5), Add(0.1), Reset(0.7), Reinitialise()])
def test_only_dead_channels_change_and_undo_restores_every_bit(operation):
    model = nn.Sequential(nn.GroupNorm(2, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(6) + 0.1)
        model[0].bias.copy_(torch.rand(6) + 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 6, 4, 4)).sigmoid().square().sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    nudger = Nudger(model, operation, optimizer=optimizer, state="all")
    assert nudger.apply(_dead("0.output", [1, 4], 6), 7) == 2
    changed = model[0].weight != before[0]
    assert changed.tolist() == [False, True, False, False, True, False]
    held = optimizer.state[model[0].weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(held[key] == 0, changed)
        assert torch.equal(held[key][~changed], state[key][~changed])
    assert {(row["step"], row["channel"]) for row in nudger.rows() if row["parameter"] == "0.weight"} == {
        (7, 1),
        (7, 4),
    }
    again = Nudger(model, operation, optimizer=optimizer)
    again.load_state_dict(nudger.state_dict())
    again.undo(len(again.log))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(held[key], state[key]) for key in state)
    assert again.rows() == []


def test_the_first_moment_alone_is_dropped_by_default():
    model = nn.Sequential(nn.GroupNorm(1, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 2, 3, 3)).exp().sum().backward()
    optimizer.step()
    second = optimizer.state[model[0].weight]["exp_avg_sq"].clone()
    Nudger(model, Scale(), optimizer=optimizer).apply(_dead("0.output", [0], 2))
    held = optimizer.state[model[0].weight]
    assert held["exp_avg"][0] == 0
    assert held["exp_avg"][1] != 0
    assert torch.equal(held["exp_avg_sq"], second)


def test_filters_are_drawn_anew_and_the_same_seed_gives_the_same():
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        before = model[0].weight.detach().clone()
        Nudger(model, Reinitialise(5)).apply(_dead("0.output", [2], 4), 10)
        assert (model[0].weight != before).flatten(1).any(1).tolist() == [False, False, True, False]
        assert model[0].weight[2].abs().max() <= 1 / 27**0.5
        assert model[0].bias[2] == 0
        made.append(model[0].weight.detach())
    assert torch.equal(*made)


def test_a_schedule():
    when = When(every=10, start=30, stop=50)
    assert [step for step in range(1, 80) if when.due(step)] == [30, 40, 50]
    model = nn.Sequential(nn.GroupNorm(1, 2))
    nudger = Nudger(model, Reset(3.0), when)
    dead = _dead("0.output", [0], 2)
    assert [nudger.step(step, dead) for step in (10, 30, 31)] == [0, 1, 0]
    assert model[0].weight.tolist() == [3.0, 1.0]


def test_planted_channels_come_back_within_the_stated_steps():
    """Scale 0 grows by 0.02 at each of every 2 steps: above the threshold of 0.05 after 3 nudges, 6 steps."""
    model = tiny_vae()
    names = plant(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    classifier = Classifier("gamma", 0.05, model=model)
    nudger = Nudger(model, Add(0.02), When(every=2), optimizer)
    counts = []
    with Monitor(model, list(PLANTED), every=2) as monitor:
        for step in range(1, 9):
            loss = (model.decode(model.encode(pictures()).latent_dist.mode()).sample - pictures()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for window in monitor.step(step):
                dead = classifier.classify(window)
                counts.append((step, dead.count))
                if step == 2:
                    assert sorted(dead.names()) == sorted(names)
                nudger.step(step, dead)
    assert counts[0] == (2, 3)
    assert counts[-1] == (8, 0)
    assert {row["parameter"].removesuffix(".weight") for row in nudger.rows()} == set(PLANTED)


@pytest.mark.parametrize("operation", [Scale(3.0, 10.0), Add(0.3), Reset(0.6)])
def test_the_same_operation_on_activations(operation):
    model = tiny_vae().eval()
    path = "decoder.up_blocks.1.resnets.0.norm1"
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.GroupNorm)):
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.1)
            norm.bias.copy_(torch.randn_like(norm.bias))
    dead = _dead(f"{path}.output", [1, 5], model.get_submodule(path).num_channels)
    latents = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        plain = model.decode(latents).sample
        with pysteer.steer(model, nudge_plan(model, dead, operation)) as handle:
            steered = model.decode(latents).sample
            handle.strength = 0.0
            off = model.decode(latents).sample
        Nudger(model, operation).apply(dead)
        nudged = model.decode(latents).sample
    assert torch.equal(off, plain)
    assert not torch.allclose(steered, plain, atol=1e-4)
    torch.testing.assert_close(steered, nudged, rtol=1e-4, atol=1e-5)


def test_a_scale_of_zero_cannot_be_nudged_at_inference():
    model = tiny_vae()
    plant(model)
    dead = _dead("encoder.down_blocks.0.resnets.0.norm1.output", [3], 8)
    with pytest.raises(InputError, match=r"Nudger\(model, Add"):
        nudge_plan(model, dead, Scale())
    with pytest.raises(InputError, match="at least one"):
        nudge_plan(model, DeadChannels(1, {}), Scale())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scale(float("nan")), "finite"),
        (lambda: Scale(1.1, 0.0), "above 0"),
        (lambda: When(every=0), "from 1"),
        (lambda: Nudger(nn.Identity(), Scale(), state="some"), "keep, momentum, all"),
        (lambda: Nudger(nn.Sequential(nn.Conv2d(1, 2, 1)), Scale()).apply(_dead("0.output", [0], 2)), "norms"),
    ],
)
def test_what_does_not_fit_is_said(make, says):
    with pytest.raises(InputError) as caught:
        make()
    assert says in str(caught.value)
