"""Training of autoencoders: planted dictionaries are found again, and an interrupted training ends the same."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pysteer.dream import train as module
from pysteer.dream.evaluate import evaluate_sae
from pysteer.dream.objective import (
    Weights,
    _Jump,
    drop_parallel,
    geometric_median,
    jump_loss,
    keep_unit,
    top_loss,
    unexplained,
)
from pysteer.dream.sources import TensorTokens
from pysteer.dream.train import TrainConfig, Trainer, train_sae
from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder


def planted(tokens: int = 6000, width: int = 24, directions: int = 32, active: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize(torch.randn(directions, width, generator=generator), dim=1)
    chosen = torch.rand(tokens, directions, generator=generator).topk(active).indices
    code = torch.zeros(tokens, directions).scatter_(1, chosen, torch.rand(tokens, active, generator=generator) + 0.5)
    return atoms, 5 * code @ atoms + 2.0


SMALL = {"latents": 96, "k": 4, "batch_tokens": 500, "epochs": 18, "learning_rate": 1e-2, "dead_after": 20_000}


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_planted_directions_are_found(tmp_path, activation):
    atoms, x = planted()
    sae, history = train_sae(TrainConfig(activation=activation, **SMALL), TensorTokens(x), tmp_path)
    found = (atoms @ sae.decoder.T).amax(1)
    assert (found > 0.9).float().mean() > 0.9
    quality = evaluate_sae(sae, TensorTokens(planted(seed=0)[1]))
    assert quality.fvu < 0.15
    assert history[-1]["fvu"] < 0.3 * history[0]["fvu"]
    assert quality.l0 == pytest.approx(4, rel=0.2)  # for batch_topk by the running threshold


def test_jumprelu_learns_thresholds_that_reach_the_number_of_latents(tmp_path):
    _, x = planted()
    config = TrainConfig(activation="jumprelu", **{**SMALL, "epochs": 40}, penalty=2.0, threshold=0.1, bandwidth=0.2)
    sae, history = train_sae(config, TensorTokens(x), tmp_path)
    assert sae.activation == "jumprelu"
    assert sae.threshold.std() > 0
    quality = evaluate_sae(sae, TensorTokens(x))
    assert quality.l0 == pytest.approx(history[-1]["l0"], rel=0.2)
    assert quality.l0 < 8
    assert quality.fvu < 0.3


@pytest.mark.parametrize("activation", module.KINDS)
def test_an_interrupted_training_ends_bit_for_bit_the_same(tmp_path, activation, monkeypatch):
    _, x = planted(3000)
    multi = activation != "jumprelu"
    config = TrainConfig(activation=activation, **{**SMALL, "epochs": 3}, multi_topk=multi, save_every=4)
    whole, curve = train_sae(config, TensorTokens(x), tmp_path / "whole", log_every=3)

    advance = Trainer.advance

    def dies(self, tokens):
        if self.step == 7:
            raise KeyboardInterrupt
        return advance(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", dies)
        with pytest.raises(KeyboardInterrupt):
            train_sae(config, TensorTokens(x), tmp_path / "cut", log_every=3)
    again, second = train_sae(config, TensorTokens(x), tmp_path / "cut", log_every=3)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert [row["step"] for row in second] == [row["step"] for row in curve]
    other = TrainConfig(activation=activation, **{**SMALL, "epochs": 4})
    with pytest.raises(InputError, match="another training"):
        train_sae(other, TensorTokens(x), tmp_path / "cut")


def dense_topk_loss(weights, x, k):
    """The loss as the paper writes it, on dense matrices."""
    a = (x - weights.bias) @ weights.encoder.T + weights.encoder_bias
    kept = a.topk(k).indices
    z = torch.zeros_like(a).scatter(1, kept, a.gather(1, kept).relu())
    return unexplained(x, z @ weights.decoder + weights.bias)


def some_weights(latents=20, width=6, threshold=None):
    torch.manual_seed(3)
    tensors = [torch.randn(latents, width), 0.1 * torch.randn(latents), torch.randn(latents, width), torch.randn(width)]
    keep_unit(tensors[2])
    found = Weights(*tensors, None if threshold is None else torch.full((latents,), math.log(threshold)))
    for tensor in found.named().values():
        tensor.requires_grad_(True)
    return found


def test_the_sparse_loss_is_the_dense_one_with_its_gradients():
    x = torch.randn(50, 6)
    mine, plain = some_weights(), some_weights()
    nobody = torch.zeros(20, dtype=torch.bool)
    outcome = top_loss(mine, x, nobody, k=3, mode="topk", multi=True, alpha=1 / 32, most=3)
    loss = dense_topk_loss(plain, x, 3) + dense_topk_loss(plain, x, 12) / 8
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-5, atol=1e-6)
    outcome.loss.backward()
    loss.backward()
    for name, tensor in mine.named().items():
        torch.testing.assert_close(tensor.grad, plain.named()[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dead_latents_learn_from_the_error_alone():
    x = torch.randn(50, 6)
    weights = some_weights()
    dead = torch.zeros(20, dtype=torch.bool)
    dead[:5] = True
    with torch.no_grad():
        weights.encoder_bias[:5] = -100.0  # never among the largest
    outcome = top_loss(weights, x, dead, k=3, mode="topk", multi=False, alpha=1.0, most=2)
    assert outcome.aux > 0
    assert not outcome.fired[:5].any()
    outcome.loss.backward()
    # relu of -100 gives nothing back, as it must be: they live again through values above 0.
    with torch.no_grad():
        weights.encoder_bias[:5] = 1.0
        weights.encoder[:5] = 0.0
    for tensor in weights.named().values():
        tensor.grad = None
    top_loss(weights, x, dead, k=3, mode="topk", multi=False, alpha=1.0, most=2).loss.backward()
    assert weights.decoder.grad[:5].abs().sum() > 0


def test_gradients_of_thresholds_follow_the_rectangle():
    z = torch.tensor([[0.30, 0.52, 0.90]])
    threshold = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    f, active = _Jump.apply(z, threshold, 0.1)
    assert f.tolist() == [[0.0, pytest.approx(0.52), pytest.approx(0.9)]]
    (2 * f + 3 * active).sum().backward()
    # Only the second is within 0.05 of its threshold: -(theta 2 + 3) / 0.1.
    assert threshold.grad.tolist() == [0.0, pytest.approx(-40.0), 0.0]


def test_jumprelu_pays_for_too_many_latents():
    x = torch.randn(50, 6)
    nobody, given = torch.zeros(20, dtype=torch.bool), {"k": 3, "penalty": 1.0, "bandwidth": 0.1, "alpha": 0, "most": 0}
    few = jump_loss(some_weights(threshold=5.0), x, nobody, **given)
    many = jump_loss(some_weights(threshold=1e-3), x, nobody, **given)
    assert few.l0 < 3 < many.l0
    assert float(many.loss - many.fvu) == pytest.approx(float((many.l0 / 3 - 1) ** 2), rel=1e-4)


def test_median_unit_directions_and_their_gradient():
    points = torch.cat((torch.zeros(9, 3), torch.full((4, 3), 100.0)))
    assert geometric_median(points).norm() < 1.0 < points.mean(0).norm()
    decoder = torch.randn(5, 4)
    keep_unit(decoder)
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(5))
    decoder.grad = torch.randn(5, 4)
    drop_parallel(decoder)
    assert (decoder.grad * decoder).sum(1).abs().max() < 1e-6


def test_the_scale_of_the_training_is_undone(tmp_path):
    _, x = planted(2000)
    config = TrainConfig(activation="topk", **{**SMALL, "epochs": 8})
    small, _ = train_sae(config, TensorTokens(x), tmp_path / "a")
    large, _ = train_sae(config, TensorTokens(1000 * x), tmp_path / "b")
    y, z = small.reconstruct(x), large.reconstruct(1000 * x) / 1000
    assert unexplained(x, z) == pytest.approx(float(unexplained(x, y)), abs=0.01)
    torch.testing.assert_close(small.decoder.norm(dim=1), torch.ones(96), rtol=1e-5, atol=1e-5)


def test_quality_is_that_of_the_formula():
    torch.manual_seed(0)
    sae = SparseAutoencoder(torch.randn(12, 5), torch.zeros(12), torch.randn(12, 5), torch.zeros(5), "topk", 2)
    x = torch.randn(300, 5)
    found = evaluate_sae(sae, TensorTokens(x))
    assert found.fvu == pytest.approx(float(unexplained(x, sae.reconstruct(x))), rel=1e-4)
    assert found.tokens == 300


@pytest.mark.parametrize(
    ("given", "message"),
    [({"activation": "gelu"}, "topk, batch_topk, jumprelu"), ({"activation": "topk", "export": "threshold"}, "export"),
     ({"k": 0}, "k of the training"), ({"momentum": 1.0}, "momentum")],
)  # fmt: skip
def test_settings_that_cannot_be(given, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**given)
    with pytest.raises(InputError, match="1 to 4"):
        TrainConfig(latents=4, k=5).size(8)
