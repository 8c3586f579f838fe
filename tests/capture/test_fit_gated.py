"""Gates fitted and applied in a language model: rows from texts of different lengths, stored, sequential, decoding."""

import pytest
import torch
from tiny_language import build

import pysteer
from pysteer.capture import Recorder, capture, fit, fit_stored
from pysteer.methods import AffineTransport, Gated, LinearAcT, MeanDifference, NormPreserving, RowGate
from pysteer.models.language import LanguageModel
from pysteer.zoo.shapes.captions import build_text_tokenizer

SITE = "block.1"
SOURCE = ["a red circle", "a small green circle on a black background", "a circle at the left", "a large circle"] * 2
TARGET = ["a blue square on a white background", "a square", "a pink square at the top", "a small square"] * 2


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(build("llama"), build_text_tokenizer())


def by_hand(lm: LanguageModel, prompts: list[str], site: str) -> list[torch.Tensor]:
    found = []
    for prompt in prompts:
        with Recorder(lm, [site]) as recorder:
            lm.read([prompt])
        found.append(recorder.get(site)[0])
    return found


def pooled(lm: LanguageModel, prompts: list[str]) -> torch.Tensor:
    return torch.stack([x.mean(0) for x in by_hand(lm, prompts, SITE)])


def test_rows_gate_while_tokens_are_fitted(lm: LanguageModel, tmp_path) -> None:
    method = Gated(MeanDifference())
    fitted = fit(lm, method, SOURCE, TARGET, sites=SITE, paired=False).parameters[0]
    gate = RowGate.fit(pooled(lm, SOURCE), pooled(lm, TARGET))
    torch.testing.assert_close(fitted.tensors["gate.weight"][0], gate.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.tensors["gate.bias"][0], gate.bias, rtol=1e-3, atol=1e-3)
    tokens = torch.cat(by_hand(lm, TARGET, SITE)).mean(0) - torch.cat(by_hand(lm, SOURCE, SITE)).mean(0)
    torch.testing.assert_close(fitted.tensors["bias"][0], tokens, rtol=1e-3, atol=1e-5)
    stores = [capture(lm, prompts, tmp_path / str(i), sites=[SITE]) for i, prompts in enumerate((SOURCE, TARGET))]
    stored = fit_stored(method, *stores).parameters[0]
    for name, tensor in fitted.tensors.items():
        torch.testing.assert_close(stored.tensors[name], tensor, rtol=1e-3, atol=1e-3)


def test_tokens_gate_while_rows_are_fitted(lm: LanguageModel) -> None:
    method = Gated(LinearAcT(support="all"), per_token=True, gate="ood")
    fitted = fit(lm, method, SOURCE, TARGET, sites=SITE, paired=False).parameters[0]
    plain = LinearAcT(support="all").fit_site(pooled(lm, SOURCE), pooled(lm, TARGET), paired=False)
    torch.testing.assert_close(fitted.tensors["gain"][0], plain.tensors["gain"], rtol=1e-2, atol=1e-3)
    tokens = torch.cat(by_hand(lm, SOURCE, SITE)).mean(0)
    torch.testing.assert_close(fitted.tensors["gate.weight"][0, 0], tokens, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_only_the_source_is_steered(lm: LanguageModel, sequential: bool) -> None:
    method = Gated(NormPreserving(AffineTransport(rank=2)))
    sites = ["block.0", "block.1"]
    fitted = fit(lm, method, SOURCE, TARGET, sites=sites, paired=False, sequential=sequential, batch_size=3)
    plain = lm.read(SOURCE + TARGET).logits
    with pysteer.steer(lm, fitted.plan()) as handle:
        steered = lm.read(SOURCE + TARGET).logits
        assert len(lm.generate(SOURCE[:2], max_new_tokens=3)) == 2
    assert [entry.calls for entry in handle.report()] == [4, 4]  # one prompt run, then one and two more tokens
    changed = (steered != plain).flatten(1).any(1)
    assert changed[: len(SOURCE)].float().mean() >= 0.75
    assert changed[len(SOURCE) :].float().mean() <= 0.25
    assert torch.equal(steered[~changed], plain[~changed])
