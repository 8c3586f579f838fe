"""Mean difference, the random-direction control and the row gate."""

import json

import pytest
import torch

from pysteer.errors import InputError
from pysteer.files import write_safetensors
from pysteer.methods import MeanDifference, Prototype, RowGate, random_direction


def test_mean_difference_is_the_difference_of_means():
    source = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0)).half()
    target = torch.randn(15, 3, 6, generator=torch.Generator().manual_seed(1))
    fit = MeanDifference().fit_site(source, target, paired=False)
    expected = target.double().mean((0, 1)) - source.double().mean((0, 1))
    assert torch.allclose(fit.tensors["bias"].double(), expected, atol=1e-6)
    assert torch.equal(fit.tensors["gain"], torch.ones(6))
    with pytest.raises(InputError, match="negatives"):
        MeanDifference().fit_site(source, target, negatives=source, paired=False)


def test_random_direction_keeps_every_norm_and_no_direction():
    source = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    target = source + torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).abs()
    fit = Prototype(clusters=8).fit_site(source, target)
    control = random_direction("prototype_shift", fit.tensors, fit.options, seed=2)
    before, after = fit.tensors["delta"], control.tensors["delta"]
    assert torch.allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-5)
    assert (torch.nn.functional.cosine_similarity(before, after).abs() < 0.5).all()
    assert torch.equal(control.tensors["weight"], fit.tensors["weight"])
    again = random_direction("prototype_shift", fit.tensors, fit.options, seed=2)
    assert torch.equal(after, again.tensors["delta"])
    assert not torch.equal(after, random_direction("prototype_shift", fit.tensors, fit.options, 3).tensors["delta"])

    mean = MeanDifference().fit_site(source, target)
    bias = random_direction("affine_shift", mean.tensors, {}).tensors["bias"]
    assert float(bias.norm()) == pytest.approx(float(mean.tensors["bias"].norm()), rel=1e-5)


def test_random_direction_refuses_what_it_cannot_keep():
    with pytest.raises(InputError, match="gain"):
        random_direction("affine_shift", {"gain": torch.full((3,), 2.0), "bias": torch.ones(3)}, {})
    pulled = Prototype(clusters=2, direction="toward").fit_site(torch.randn(9, 3), torch.randn(9, 3))
    with pytest.raises(InputError, match="pull"):
        random_direction("prototype_shift", pulled.tensors, pulled.options)


def gaussian(mean: torch.Tensor, mixing: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    return mean + torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)) @ mixing


def test_row_gate_is_the_linear_discriminant():
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    means = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) * 3 + 20
    rows = [gaussian(mean, mixing, 400, seed) for seed, mean in enumerate(means)]
    gate = RowGate.fit(rows[0], rows[1:])
    residuals = torch.cat([r.double() - r.double().mean(0) for r in rows])
    cov = residuals.T @ residuals / (len(residuals) - 1)
    inverse = torch.linalg.inv(cov + cov.trace() / (len(residuals) - 1) * torch.eye(6, dtype=torch.float64))
    x = torch.cat([gaussian(mean, mixing, 100, 50 + seed) for seed, mean in enumerate(means)])
    centres = torch.stack([r.double().mean(0) for r in rows])
    difference = x.double()[:, None] - centres
    slow = (-torch.einsum("nki,ij,nkj->nk", difference, inverse, difference) / 2).softmax(1)[:, 0]
    assert torch.allclose(gate.probability(x).double(), slow, atol=1e-4)
    opened = gate(x)
    assert opened.dtype == torch.float32
    assert opened[:100].mean() > 0.9
    assert opened[100:].mean() < 0.05


def test_row_gate_threshold_and_token_means():
    source, others = torch.randn(40, 5, 3) + 1, torch.randn(40, 5, 3) - 1
    loose, strict = (RowGate.fit(source, others, threshold=t) for t in (0.01, 0.99))
    x = torch.randn(200, 5, 3) * 0.5
    torch.testing.assert_close(loose.probability(x), loose.probability(x.mean(1)))
    assert loose(x).sum() > strict(x).sum()
    with pytest.raises(InputError, match="between 0 and 1"):
        RowGate.fit(source, others, threshold=1.0)
    with pytest.raises(InputError, match="got 4; allowed: 3"):
        loose.probability(torch.randn(2, 4))


def test_row_gate_saved_is_the_gate_loaded(tmp_path):
    gate = RowGate.fit(torch.randn(30, 4) + 1, [torch.randn(30, 4), torch.randn(30, 4) - 2], threshold=0.3)
    loaded = RowGate.from_pretrained(gate.save_pretrained(tmp_path / "gate"))
    assert torch.equal(loaded.weight, gate.weight)
    assert torch.equal(loaded.bias, gate.bias)
    assert loaded.threshold == 0.3
    write_safetensors(tmp_path / "gate" / "gate.safetensors", {"weight": gate.weight, "bias": gate.bias[:2]})
    with pytest.raises(InputError, match="bias"):
        RowGate.from_pretrained(tmp_path / "gate")
    (tmp_path / "gate" / "gate.json").write_text(json.dumps({"threshold": 7}))
    with pytest.raises(InputError, match="between 0 and 1"):
        RowGate.from_pretrained(tmp_path / "gate")
