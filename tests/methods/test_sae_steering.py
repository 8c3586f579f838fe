"""Edits of latents against encoding, editing and decoding all in fp64; the choice of latents; saved and loaded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from applying import normal
from torch import Tensor

from pysteer.capture import Fitted
from pysteer.capture.fitted import stack_fits
from pysteer.errors import InputError
from pysteer.methods import SAESteering, SiteFit
from pysteer.methods.sae_steering import concept_scores, mean_latents, quantile
from pysteer.models.sae import SparseAutoencoder
from pysteer.steering import SiteParameters, latents
from pysteer.steering.call import Call

LATENTS, WIDTH = 24, 8


def autoencoder(activation: str) -> SparseAutoencoder:
    more: dict[str, Any] = {"k": 5} if "topk" in activation else {"k": None}
    if activation == "jumprelu":
        more["threshold"] = torch.full((LATENTS,), 0.3)
    encoder, decoder = normal(LATENTS, WIDTH, 0), normal(LATENTS, WIDTH, 1)
    encoder[[4, 11, 17]] = 4 * torch.eye(WIDTH)[:3]  # directions of their own
    bias = normal(1, WIDTH, 3)[0]
    return SparseAutoencoder(encoder, normal(LATENTS, 1, 2)[:, 0], decoder, bias, activation, **more)


def encoded(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Dense latents in fp64."""
    pre = (x.double() - sae.bias.double()) @ sae.encoder.double().T + sae.encoder_bias.double()
    if sae.takes_k:
        kept = torch.zeros_like(pre).scatter(-1, pre.topk(sae.k).indices, 1.0)
        return kept * pre.relu()
    return pre * (pre > (0.0 if sae.threshold is None else sae.threshold.double()))


def decoded(sae: SparseAutoencoder, latent: Tensor) -> Tensor:
    return latent @ sae.decoder.double() + sae.bias.double()


def steered(method: SAESteering, fit: SiteFit, x: Tensor, strength: float = 1.0) -> Tensor:
    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in fit.tensors.items()}
    call = Call.make(method.op, banks, fit.options, "tokens", common=fit.shared)
    return call(x, torch.ones(1, len(x), dtype=torch.int32), torch.full((1, len(x)), strength), torch.tensor(0), None)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu", "relu"])
@pytest.mark.parametrize("mode", ["multiply", "add", "set", "ablate"])
@pytest.mark.parametrize("error", ["keep", "drop", "saeuron"])
def test_edits_equal_edited_latents_decoded(activation: str, mode: str, error: str) -> None:
    sae, x = autoencoder(activation), normal(60, WIDTH, 4).view(6, 10, WIDTH)
    method = SAESteering(sae=sae, latents=(3, 7), values=(2.0, -1.0), mode=mode, error=error)
    fit = method.fit_site(x, x)
    before = encoded(sae, x)
    after, values = before.clone(), torch.tensor([2.0, -1.0]).double()
    old = before[..., [3, 7]]
    new = {"multiply": old * values, "add": old + values, "set": values.expand_as(old), "ablate": 0 * old}[mode]
    after[..., [3, 7]] = new if mode == "add" else torch.where(old > 0, new, old)
    missing = x - decoded(sae, before)
    missing = {"keep": missing, "drop": 0 * missing, "saeuron": -missing}[error]
    expected = decoded(sae, after) + missing
    result = steered(method, fit, x)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)
    assert not torch.equal(result, x)
    halfway = steered(method, fit, x, 0.5).double()
    torch.testing.assert_close(halfway, (x + expected) / 2, rtol=1e-5, atol=2e-5)
    assert torch.equal(steered(method, fit, x, 0.0), x)


def test_without_edits_the_published_hook_gives_twice_the_reconstruction() -> None:
    sae, x = autoencoder("topk"), normal(12, WIDTH, 5).view(3, 4, WIDTH)
    method = SAESteering(sae=sae, latents=(0,), error="saeuron")  # times 1
    expected = 2 * decoded(sae, encoded(sae, x)) - x
    torch.testing.assert_close(steered(method, method.given(), x).double(), expected, rtol=1e-5, atol=2e-5)


def concept(latent: int, seed: int) -> Tensor:
    """Tokens in which one latent is much more active than otherwise."""
    sae = autoencoder("topk")
    away = 4 * torch.nn.functional.normalize(sae.encoder[latent], dim=0)
    return (normal(200, WIDTH, seed) + away).view(20, 10, WIDTH)


def test_unlearning_scores_selects_and_gates() -> None:
    sae = autoencoder("topk")
    source, target, others = concept(4, 6), concept(11, 7), concept(17, 8)[:10]
    method = SAESteering(sae=sae, mode="unlearn", values=(-2.0,), percentile=90.0)
    fit = method.fit_site(source, target, negatives=others)
    means = torch.stack([encoded(sae, x).mean((0, 1)) for x in (source, target, others)])
    pooled = (200 * means[1] + 100 * means[2]) / 300
    scores = means[0] / (means[0].sum() + 1e-8) - pooled / (pooled.sum() + 1e-8)
    chosen = (scores > torch.quantile(scores, 0.9)).nonzero()[:, 0]
    assert 4 in chosen
    assert fit.tensors["latent"].tolist() == chosen.tolist()
    floor, factor = means.mean(0)[chosen], -2.0 * means[0][chosen]
    latent = encoded(sae, source)
    old = latent[..., chosen]
    latent[..., chosen] = torch.where(old > floor, factor * old, old)
    expected = decoded(sae, latent) + source - decoded(sae, encoded(sae, source))
    torch.testing.assert_close(steered(method, fit, source).double(), expected, rtol=1e-4, atol=1e-4)
    found = encoded(sae, steered(method, fit, source))[..., 4].mean()
    assert found < 0.2 * means[0, 4]
    untouched = (steered(method, fit, target) == target).all(-1).float().mean()
    assert untouched > 0.5
    none = replace(method, percentile=100.0).fit_site(source, target)
    assert torch.equal(steered(method, none, source), source)


def test_the_fit_chooses_latents() -> None:
    sae = autoencoder("topk")
    source, target = concept(4, 9), concept(11, 10)
    add = SAESteering(sae=sae, mode="add", count=1).fit_site(source, target)
    assert add.tensors["latent"].tolist() == [11]
    mean = encoded(sae, target)[..., 11].mean()
    assert float(add.tensors["add"][0]) == pytest.approx(float(mean), rel=1e-4)
    assert SAESteering(sae=sae, mode="ablate", count=1).fit_site(source, target).tensors["latent"].tolist() == [4]
    both = torch.stack([mean_latents(sae, source.flatten(0, 1)), mean_latents(sae, target.flatten(0, 1))])
    torch.testing.assert_close(both[0], encoded(sae, source).mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert int(concept_scores(both, torch.ones(2), 0).argmax()) == 4
    values = normal(1, 31, 11)[0].double()
    assert float(quantile(values, 0.37)) == pytest.approx(float(torch.quantile(values, 0.37)))


@pytest.mark.parametrize("error", ["keep", "saeuron"])
def test_saved_and_loaded_equals_fitted(error: str, tmp_path) -> None:
    sae = autoencoder("topk")
    sae.save_pretrained(tmp_path / "sae")
    method = SAESteering(sae=str(tmp_path / "sae"), mode="unlearn", percentile=80.0, error=error)
    fits = {step: method.fit_site(concept(4 + step, 12), concept(11, 13)) for step in range(2)}
    entry = stack_fits("mid", method.op, {0: fits[0], 1: fits[1]})
    Fitted(method, [entry]).save_pretrained(tmp_path / "fitted")
    loaded = Fitted.from_pretrained(tmp_path / "fitted")
    again = loaded.parameters[0]
    assert loaded.method == method
    assert again.options == entry.options
    for name, tensor in (entry.tensors | entry.shared).items():
        assert torch.equal((again.tensors | again.shared)[name], tensor)
    in_memory = Fitted(SAESteering(sae=sae, latents=(1,)), [latents("mid", sae, 1, 2.0, mode="multiply")])
    in_memory.save_pretrained(tmp_path / "other")
    assert Fitted.from_pretrained(tmp_path / "other").parameters[0].tensors["scale"].tolist() == [[2.0]]


def test_bad_input() -> None:
    sae = autoencoder("topk")
    entry: SiteParameters = latents("mid", sae, [1, 2], [1.0, 2.0], steps=(0, 3))
    entry.check()
    assert entry.tensors["encoder"].shape == (2, 2, WIDTH)
    with pytest.raises(InputError, match="0 to 23"):
        latents("mid", sae, 24)
    with pytest.raises(InputError, match="normalise none"):
        SAESteering(sae=replace(sae, normalise="unit_norm"), latents=(1,)).given()
    with pytest.raises(InputError, match="folder of one"):
        SAESteering(latents=(1,)).given()
    with pytest.raises(InputError, match="as the SAE"):
        SAESteering(sae=sae).fit_site(torch.ones(2, 3), torch.ones(2, 3))
