"""Streaming capture: what is on disk is what the model did; interruption, pooling, moments, fits from them, batches."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_infinity import tiny_pipeline
from tiny_language import build

import pysteer
from pysteer.capture import ActivationStore, Moments, Recorder, capture, capture_moments, fit, fit_stored
from pysteer.errors import InputError
from pysteer.methods import AurA, GaussianTransport, LinearAcT, MeanDifference, Prototype
from pysteer.models.language import LanguageModel
from pysteer.ops.channel_moments import ChannelMoments
from pysteer.zoo.shapes.captions import build_text_tokenizer

SOURCE = ["a red circle", "a small green circle on a black background", "a circle at the left", "a large circle"] * 2
TARGET = ["a blue square on a white background", "a square", "a pink square at the top", "a small square"] * 2
SITES = ["block.1", "mlp.2"]


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


@pytest.mark.parametrize("pool", ["tokens", "mean", "max", "min", "last"])
def test_what_is_stored_is_what_every_prompt_does_alone(lm: LanguageModel, tmp_path: Path, pool: str) -> None:
    store = capture(lm, SOURCE, tmp_path, sites=SITES, pool=pool, batch_size=3)
    assert store.complete
    reduce: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "tokens": lambda x: x, "mean": lambda x: x.mean(0, keepdim=True), "max": lambda x: x.amax(0, keepdim=True),
        "min": lambda x: x.amin(0, keepdim=True), "last": lambda x: x[-1:],
    }  # fmt: skip
    for site in SITES:
        expected = [reduce[pool](x) for x in by_hand(lm, SOURCE, site)]
        rows = list(store.rows(site))
        assert [prompt for prompt, _ in rows] == list(range(len(SOURCE)))
        for (_, got), want in zip(rows, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(store.tokens(site), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_an_interrupted_capture_goes_on_without_running_anything_twice(lm: LanguageModel, tmp_path: Path) -> None:
    whole = capture(lm, SOURCE, tmp_path / "whole", sites=SITES, batch_size=2)
    ran: list[str] = []

    def run(stop: int) -> Callable[[list[str], list[int]], object]:
        def generate(prompts: list[str], seeds: list[int]) -> object:
            if len(ran) >= stop:
                raise KeyboardInterrupt
            ran.extend(prompts)
            return lm.read(prompts)

        return generate

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        capture(lm, SOURCE, out, sites=SITES, batch_size=2, shard_bytes=1, generate=run(4))
    half = ActivationStore.open(out)
    assert not half.complete
    assert ran == SOURCE[:4]
    again = capture(lm, SOURCE, out, sites=SITES, batch_size=2, shard_bytes=1, generate=run(99))
    assert ran == SOURCE
    assert again.complete
    assert len(list(out.glob("*.safetensors"))) == 4
    for site in SITES:
        assert torch.equal(again.tokens(site), whole.tokens(site))
    capture(lm, SOURCE, out, sites=SITES, batch_size=2, generate=run(0))  # nothing is left to do


def test_a_batch_that_breaks_off_in_the_middle_leaves_nothing_behind(lm: LanguageModel, tmp_path: Path) -> None:
    calls = 0

    def generate(prompts: list[str], seeds: list[int]) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            hook = lm.model.model.layers[2].register_forward_pre_hook(_fail)
            try:
                return lm.read(prompts)
            finally:
                hook.remove()
        return lm.read(prompts)

    with pytest.raises(ZeroDivisionError):
        capture(lm, SOURCE, tmp_path, sites=SITES, batch_size=3, generate=generate)
    store = ActivationStore.open(tmp_path)
    assert {piece.prompt for pieces in store.pieces.values() for piece in pieces} == {0, 1, 2}
    assert capture(lm, SOURCE, tmp_path, sites=SITES, batch_size=3).complete


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_another_capture_in_the_folder_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    capture(lm, SOURCE, tmp_path, sites=SITES)
    for other in ({"sites": ["block.0"]}, {"pool": "mean"}, {"seeds": 5}, {"labels": ["x"] * len(SOURCE)}):
        with pytest.raises(InputError, match="another capture"):
            capture(lm, SOURCE, tmp_path, **{"sites": SITES, **other})
    changed = LanguageModel(build("llama"), build_text_tokenizer())
    with torch.no_grad():
        changed.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="another capture"):
        capture(changed, SOURCE, tmp_path, sites=SITES)
    for bad in ({"pool": "median"}, {"rows": "both"}, {"batch_size": 0}, {"dtype": "int8"}, {"labels": ["x"]}):
        with pytest.raises(InputError):
            capture(lm, SOURCE, tmp_path / "new", **{"sites": SITES, **bad})


def test_damaged_stores_are_named(lm: LanguageModel, tmp_path: Path) -> None:
    store = capture(lm, SOURCE, tmp_path, sites=SITES)
    shard, index = tmp_path / "shard-00000.safetensors", tmp_path / "shard-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="shard"):
        store.tokens("block.1")
    shard.write_bytes(whole)
    index.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="index"):
        ActivationStore.open(tmp_path)
    (tmp_path / "capture.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="format"):
        ActivationStore.open(tmp_path)
    with pytest.raises(InputError, match="not captured"):
        store.tokens("block.9")


@pytest.mark.parametrize(
    "method",
    [MeanDifference(), LinearAcT(), AurA(), Prototype(clusters=2), GaussianTransport(pooled=False)],
    ids=lambda method: method.name,
)
def test_a_fit_from_disk_equals_a_fit_from_the_model(lm: LanguageModel, tmp_path: Path, method) -> None:
    labels = ["circle"] * len(SOURCE) + ["square"] * len(TARGET)
    store = capture(lm, SOURCE + TARGET, tmp_path, sites=SITES, labels=labels, batch_size=5)
    stored = fit_stored(method, store.where("circle"), store.where("square"))
    direct = fit(lm, method, SOURCE, TARGET, sites=SITES, paired=False, batch_size=16)
    assert [e.site for e in stored.parameters] == [e.site for e in direct.parameters]
    for a, b in zip(stored.parameters, direct.parameters, strict=True):
        assert a.steps == b.steps
        for name, tensor in a.tensors.items():
            torch.testing.assert_close(tensor, b.tensors[name], rtol=2e-3, atol=2e-4)
    plain = lm.read(SOURCE[:1]).logits
    with pysteer.steer(lm, stored.plan()):
        assert not torch.equal(lm.read(SOURCE[:1]).logits, plain)


@pytest.mark.parametrize(
    "method",
    [MeanDifference(pooled=True), GaussianTransport(), GaussianTransport(only_mean=True, support="0-100")],
    ids=["mean", "gaussian", "mean transport"],
)
def test_a_fit_from_moments_equals_a_fit_from_activations(lm: LanguageModel, tmp_path: Path, method) -> None:
    moments = [
        capture_moments(lm, prompts[:5], sites=SITES, batch_size=2).merge(
            capture_moments(lm, prompts[5:], sites=SITES, batch_size=3)
        )
        for prompts in (SOURCE, TARGET)
    ]
    moments[0].save_pretrained(tmp_path)
    moments[0] = Moments.from_pretrained(tmp_path)
    found = fit_stored(method, *moments)
    direct = fit(lm, method, SOURCE, TARGET, sites=SITES, paired=False)
    for a, b in zip(found.parameters, direct.parameters, strict=True):
        assert (a.site, a.steps) == (b.site, b.steps)
        for name, tensor in a.tensors.items():
            torch.testing.assert_close(tensor, b.tensors[name], rtol=2e-3, atol=2e-4)
    with pytest.raises(InputError, match="moments"):
        fit_stored(LinearAcT(), *moments)
    with pytest.raises(InputError, match="support"):
        fit_stored(GaussianTransport(support="1-99"), *moments)
    with pytest.raises(InputError, match="same kind"):
        fit_stored(method, moments[0], capture(lm, TARGET, tmp_path / "store", sites=SITES))


def test_moments_of_tokens_and_their_covariance(lm: LanguageModel) -> None:
    moments = capture_moments(lm, SOURCE, sites=SITES, pool="tokens", gram=True, batch_size=3)
    for site in SITES:
        tokens = torch.cat(by_hand(lm, SOURCE, site)).double()
        found: ChannelMoments = moments.of(site)
        torch.testing.assert_close(found.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.variance(), tokens.var(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(moments.grams[site, 0].covariance(), tokens.T.cov(), rtol=1e-3, atol=1e-5)
    more = moments.merge(moments)
    assert float(more.of("block.1").count[0]) == 2 * float(moments.of("block.1").count[0])


@pytest.mark.parametrize("method", [MeanDifference(), LinearAcT(support="all")], ids=lambda method: method.name)
def test_a_sequential_fit_in_batches_equals_one_in_a_single_batch(lm: LanguageModel, method) -> None:
    settings = {"sites": "block", "sequential": True, "paired": False}
    whole = fit(lm, method, SOURCE, TARGET, batch_size=64, **settings)
    runs = []

    def generate(prompts: list[str], seeds: list[int]) -> object:
        runs.append(len(prompts))
        return lm.read(prompts)

    parts = fit(lm, method, SOURCE, TARGET, batch_size=5, generate=generate, **settings)
    alone = fit(lm, method, SOURCE, TARGET, sites="block", paired=False)
    assert runs == [5, 5, 5, 1]  # every prompt ran once, whatever the number of sites
    assert not torch.allclose(whole.parameters[1].tensors["bias"], alone.parameters[1].tensors["bias"], atol=1e-4)
    for a, b in zip(parts.parameters, whole.parameters, strict=True):
        for name, tensor in a.tensors.items():
            torch.testing.assert_close(tensor, b.tensors[name], rtol=2e-3, atol=2e-4)


def test_a_batch_that_fails_ends_the_others(lm: LanguageModel) -> None:
    runs = 0

    def generate(prompts: list[str], seeds: list[int]) -> object:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise ZeroDivisionError
        return lm.read(prompts)

    settings = {"sites": "block", "sequential": True, "paired": False, "batch_size": 4}
    plain = lm.read(SOURCE[:1]).logits
    with pytest.raises(ZeroDivisionError):
        fit(lm, MeanDifference(), SOURCE, TARGET, generate=generate, **settings)
    assert torch.equal(lm.read(SOURCE[:1]).logits, plain)
    fitted = fit(lm, MeanDifference(), SOURCE, TARGET, sites="block", paired=False)
    with pysteer.steer(lm, fitted.plan()), pytest.raises(InputError, match="being steered"):
        fit(lm, MeanDifference(), SOURCE, TARGET, **settings)


def test_an_image_generator_is_captured_by_step(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    prompts = [f"a {colour} circle on a black background" for colour in ("red", "green", "blue")]
    sites = ["ca.1", "pooled", "text.output"]
    store = capture(pipe, prompts, tmp_path, sites=sites, steps=[1, 2], seeds=4, batch_size=2)
    assert store.steps("ca.1") == (1, 2)
    assert store.steps("pooled") == store.steps("text.output") == (0,)
    with Recorder(pipe, sites) as recorder:
        pipe(prompts, seeds=[4, 5, 6], decode=False)
    for site, step in (("ca.1", 2), ("pooled", 0)):
        torch.testing.assert_close(
            store.tokens(site, step), recorder.get(site, step).flatten(0, 1), rtol=1e-4, atol=1e-4
        )
    lengths = recorder.lengths("text.output").tolist()
    assert [len(row) for _, row in store.rows("text.output")] == lengths
