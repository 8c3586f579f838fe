"""Gates and kept lengths around any op: against the formula, per row, per token, compiled, in many plans at once."""

import json
from typing import Any

import pytest
import torch
from steering_toy import LAYERS, STEPS, WIDTH, Toy, counter, shift
from torch import Tensor

from pysteer.capture import Fitted
from pysteer.errors import InputError
from pysteer.methods import Gated, MeanDifference, NormPreserving, Prototype
from pysteer.steering import Plan, SiteParameters, steer

SITE = f"block.{LAYERS - 1}"  # its output is the model's


def gated(bias: float, value: float = 1.0, site: str = SITE, **options: Any) -> SiteParameters:
    """A shift behind a sigmoid of channel 0: the gate is P = sigmoid(4 x_0 + bias)."""
    entry = shift(site, value)
    weight = torch.zeros(1, 1, WIDTH)
    weight[..., 0] = 4.0
    entry.tensors |= {"gate.weight": weight, "gate.bias": torch.full((1, 1), bias)}
    entry.options |= {"gate.kind": "gda", "gate.threshold": 0.5, "gate.per_token": False, **options}
    return entry


def probability(x: Tensor, bias: float, per_token: bool) -> Tensor:
    """The gate of `x` `[R, L, D]` in fp64, to be multiplied with it."""
    seen = x.double() if per_token else x.double().mean(1, keepdim=True)
    return torch.sigmoid(4 * seen[..., :1] + bias)


def run(model: Toy, plan: Plan | list[Plan], x: Tensor, compiled: bool = False, **more: Any) -> list[Tensor]:
    with steer(model, plan, **more):
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else None
        return model.run(x, model=forward)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("threshold", [0.5, None])
def test_the_gate_decides(model: Toy, per_token: bool, threshold: float | None, compiled: bool) -> None:
    x = torch.randn(6, STEPS, WIDTH)
    plain = model.run(x)
    entry = gated(0.3, 2.0, **{"gate.per_token": per_token, "gate.threshold": threshold})
    steered = run(model, Plan.build([entry], rows="both"), x, compiled)
    for before, after in zip(plain, steered, strict=True):
        gate = probability(before, 0.3, per_token)
        gate = gate if threshold is None else (gate >= threshold).double()
        torch.testing.assert_close(after.double(), before + gate * 2.0, rtol=1e-5, atol=1e-5)
        shut = (gate == 0).expand_as(after)
        assert torch.equal(after[shut], before[shut])
        assert (after != before).any()
        assert threshold is None or shut.any()
    assert all(torch.equal(a, b) for a, b in zip(model.run(x), plain, strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_with_gates_of_their_own_equal_single_runs(model: Toy, per_token: bool) -> None:
    x = torch.randn(4, STEPS, WIDTH)
    options = {"gate.per_token": per_token, "gate.threshold": None}
    plans = [Plan.build([gated(bias, value, **options)]) for bias, value in ((-2.0, 1.0), (0.0, -1.0), (2.0, 3.0))]
    together = run(model, [*plans, Plan.build([shift("ffn.0", 0.0)])], x)
    compiled = run(model, [*plans, Plan.build([shift("ffn.0", 0.0)])], x, compiled=True)
    plain = model.run(x)
    for row, plan in enumerate(plans):
        alone = run(model, plan, x[row : row + 1])
        for step in range(STEPS):
            torch.testing.assert_close(together[step][row], alone[step][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled[step][row], alone[step][0], rtol=1e-5, atol=1e-5)
            assert not torch.equal(alone[step][0], plain[step][row])
    assert all(torch.equal(together[step][3], plain[step][3]) for step in range(STEPS))


@pytest.mark.parametrize("options", [{}, {"gate.threshold": None, "gate.per_token": True}, {"keep_norm": True}])
def test_strength_zero_and_other_rows_are_bit_exact(model: Toy, options: dict[str, Any]) -> None:
    x = torch.randn(3, STEPS, WIDTH)
    x[2] = torch.nan
    plain = model.run(x)
    strength = torch.tensor([1.0, 0.0, 0.0])
    steered = run(model, Plan.build([gated(9.0, **options)]), x, strength=strength)
    for before, after in zip(plain, steered, strict=True):
        assert torch.equal(after[1:].view(torch.int32), before[1:].view(torch.int32))
        assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_keep_their_length(model: Toy, dtype: torch.dtype, compiled: bool) -> None:
    model, x = model.to(dtype), torch.randn(4, STEPS, WIDTH, dtype=dtype)
    plain = model.run(x)
    entry = shift(SITE, torch.arange(WIDTH) - 2.0)
    entry.options["keep_norm"] = True
    steered = run(model, Plan.build([entry]), x, compiled, strength=torch.tensor([1.0, 0.5, -2.0, 0.0]))
    for before, after in zip(plain, steered, strict=True):
        moved = before.double() + torch.tensor([1.0, 0.5, -2.0, 0.0])[:, None, None] * (torch.arange(WIDTH) - 2.0)
        wanted = moved * before.double().norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        close = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(after.double(), wanted, rtol=close, atol=close)
        assert torch.equal(after[3], before[3])
        assert (after[:3] != before[:3]).any()


def test_padding_and_masks_do_not_count(model: Toy) -> None:
    x = torch.randn(2, 3, WIDTH)
    x[0, 2] = 1e3 * torch.ones(WIDTH)
    lengths = torch.tensor([2, 3])
    entry = gated(0.0, 2.0, **{"gate.threshold": None})
    for mask in (None, torch.tensor([[True, False, True], [False, True, True]])):
        with steer(model, Plan.build([entry]), positions="all" if mask is None else mask):
            model.announce(2, 0, lengths)
            steered = model(x)
        plain = model(x)
        for row in range(2):
            counted = torch.arange(3) < lengths[row]
            counted = counted if mask is None else counted & mask[row]
            mean = plain[row, counted].double().mean(0)
            expected = plain[row, counted].double() + torch.sigmoid(4 * mean[0]) * 2.0
            torch.testing.assert_close(steered[row, counted].double(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(steered[row, ~counted], plain[row, ~counted])


def test_updates_need_no_new_graph(model: Toy) -> None:
    x = torch.randn(4, STEPS, WIDTH)
    backend, graphs = counter()
    plain = model.run(x)
    with steer(model, Plan.build([gated(-1e3)])) as handle:
        forward = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        assert all(torch.equal(a, b) for a, b in zip(model.run(x, model=forward), plain, strict=True))
        model.run(x, model=forward)
        before = len(graphs)
        handle.update(Plan.build([gated(1e3)]))
        opened = model.run(x, model=forward)
        assert len(graphs) == before
        with pytest.raises(InputError, match="steer again"):
            handle.update(Plan.build([gated(0.0, **{"gate.threshold": 0.7})]))
        with pytest.raises(InputError, match="plans of a gate"):
            handle.update([Plan.build([entry]) for entry in [gated(0.0)] for _ in range(4)])
    for a, b in zip(opened, plain, strict=True):
        torch.testing.assert_close(a, b + 1.0)


def test_gradients_pass_the_gate(model: Toy) -> None:
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    entry = gated(0.0, 2.0, **{"gate.per_token": True})
    entry.tensors["gain"] = torch.full((1, WIDTH), 3.0)
    with steer(model, Plan.build([entry])):
        model.announce(2)
        (steered,) = torch.autograd.grad(model(x).sum(), x)
    y = model(x)
    gate = (probability(y, 0.0, True) >= 0.5).detach()
    (expected,) = torch.autograd.grad((y * (1 + 2 * gate)).sum(), x)
    assert 0 < gate.sum() < gate.numel()
    torch.testing.assert_close(steered.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_parameters_that_do_not_fit() -> None:
    entry = gated(0.0)
    del entry.tensors["gate.bias"]
    with pytest.raises(InputError, match=r"gate.weight'; allowed: gate.weight, gate.bias"):
        entry.check()
    with pytest.raises(InputError, match="allowed: none without gate"):
        SiteParameters("a", "affine_shift", None, gated(0.0).tensors).check()
    with pytest.raises(InputError, match="allowed: gda, ood, min_max"):
        gated(0.0, **{"gate.kind": "knn"}).check()


SOURCE = torch.randn(40, 5, WIDTH, generator=torch.Generator().manual_seed(1)) + 4
OTHERS = torch.randn(40, 5, WIDTH, generator=torch.Generator().manual_seed(2)) - 4


@pytest.mark.parametrize("kind", ["gda", "ood", "min_max"])
@pytest.mark.parametrize("per_token", [False, True])
def test_fitted_gates_open_for_the_source_alone(kind: str, per_token: bool, tmp_path) -> None:
    method = Gated(MeanDifference(), gate=kind, per_token=per_token)
    fit = method.fit_site(SOURCE, SOURCE + 1, negatives=OTHERS)
    if kind == "gda":  # the target is a class too
        fit = method.fit_site(SOURCE, OTHERS - 1, negatives=OTHERS)
    parameters = SiteParameters("pool", method.op, None, {n: t[None] for n, t in fit.tensors.items()}, fit.options)
    Fitted(method, [parameters]).save_pretrained(tmp_path)
    loaded = Fitted.from_pretrained(tmp_path)
    assert loaded.method == method
    assert loaded.parameters[0].options == fit.options
    assert json.loads((tmp_path / "config.json").read_text())["method_config"]["method"] == "mean_difference"
    opened = [touched(loaded.parameters[0], x).float().mean() for x in (SOURCE, OTHERS)]
    assert opened[0] > 0.9
    assert opened[1] == 0


def touched(parameters: SiteParameters, x: Tensor) -> Tensor:
    """Which tokens of `x` the parameters change, `[R, L]`."""
    from pysteer.steering.call import Call

    banks = {name: torch.cat((torch.zeros_like(t), t)) for name, t in parameters.tensors.items()}
    call = Call.make(parameters.op, banks, parameters.options, "tokens")
    slot = torch.ones(1, len(x), dtype=torch.int32)
    y = call(x, slot, torch.ones(1, len(x)), torch.tensor(0), None)
    assert torch.equal(y[(y == x).all(-1)], x[(y == x).all(-1)])
    return (y != x).any(-1)


def test_wrappers_take_methods_by_name_and_nest() -> None:
    method = Gated("prototype", options={"clusters": 3}, gate="ood")
    assert method == Gated(Prototype(clusters=3), gate="ood")
    assert (method.op, method.pooled, method.needs_rows) == ("prototype_shift", False, True)
    inner = NormPreserving(MeanDifference(pooled=True))
    both = Gated(inner, per_token=True)
    assert (both.needs_rows, both.pooled) == (True, False)
    fit = both.fit_site(SOURCE, OTHERS, paired=False)
    assert fit.options["keep_norm"]
    assert set(fit.tensors) == set(both.shapes)
    with pytest.raises(InputError, match="no gate yet"):
        Gated(NormPreserving(Gated("mean_difference")))
    with pytest.raises(InputError, match="given beside a method"):
        NormPreserving(MeanDifference(), options={"pooled": True})
    for bad in ({"gate": "lda"}, {"threshold": 1.0}, {"quantile": 0.5}, {"negatives": "none"}):
        with pytest.raises(InputError):
            Gated("mean_difference", **bad)
