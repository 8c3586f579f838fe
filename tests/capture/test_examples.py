"""Examples that run once for many fits: every fit equals one of its own, and no prompt runs without need."""

import pytest
import torch
from tiny_infinity import tiny_pipeline
from tiny_language import build

from pysteer import Examples, fit
from pysteer.errors import InputError
from pysteer.methods import AffineTransport, GaussianTransport, LinearAcT, MeanDifference, Prototype
from pysteer.models.language import LanguageModel
from pysteer.zoo.shapes.captions import build_text_tokenizer

BACKGROUNDS = ("black", "white", "gray", "red", "blue")
SOURCE = [f"a {size} circle on a {colour} background" for colour in BACKGROUNDS for size in ("small", "large")]
TARGET = [prompt.replace("circle", "square") for prompt in SOURCE]
OTHERS = [prompt.replace("circle", "star") for prompt in SOURCE[:4]]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(build("llama"), build_text_tokenizer())


@pytest.fixture
def ran(pipe, monkeypatch) -> list[str]:
    """Prompts that the pipeline was given, in order."""
    found: list[str] = []
    generate = type(pipe).__call__

    def counted(self, prompts, **settings):
        found.extend(prompts)
        return generate(self, prompts, **settings)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    return found


def agree(first, second, tolerance: float = 1e-3) -> None:
    """Equal but for the rounding of batches of other sizes, which a sequential fit carries from site to site."""
    assert [entry.site for entry in first.parameters] == [entry.site for entry in second.parameters]
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert a.steps == b.steps
        assert any(float(tensor.abs().max()) > 0 for tensor in a.tensors.values())
        for name, tensor in a.tensors.items():
            torch.testing.assert_close(tensor, b.tensors[name], rtol=tolerance, atol=tolerance)
    assert first.meta == second.meta


METHODS = [Prototype(clusters=3), MeanDifference(), LinearAcT(pooled=False), AffineTransport(rank=2)]


def test_methods_share_one_run_of_every_prompt(pipe, ran):
    examples = Examples(pipe, SOURCE, TARGET, sites=["ca_block", "pooled"], steps=[1, 2], seeds=7, batch_size=8)
    fits = [examples.fit(method) for method in METHODS]
    assert sorted(ran) == sorted([*SOURCE, *TARGET])
    for method, fitted in zip(METHODS, fits, strict=True):
        alone = fit(pipe, method, SOURCE, TARGET, sites=["ca_block", "pooled"], steps=[1, 2], seeds=7)
        agree(fitted, alone)


def test_fewer_examples_and_shuffled_labels_run_nothing_more(pipe, ran):
    examples = Examples(pipe, SOURCE, TARGET, sites="ca", seeds=3, negatives=OTHERS)
    few = examples.fit(Prototype(clusters=3), first=4)
    assert sorted(ran) == sorted([*SOURCE[:4], *TARGET[:4], *OTHERS])
    every = examples.fit(Prototype(clusters=3))
    assert len(ran) == 24
    shuffled = examples.fit(Prototype(clusters=3), control="shuffled", fit_seed=2)
    fewer = examples.fit(Prototype(clusters=3), control="shuffled", fit_seed=2, first=5)
    assert len(ran) == 24
    # The noise of the negatives follows that of all pairs: theirs is the same whatever the number of pairs.
    for fitted, count, control in (
        (few, 4, None),
        (every, 10, None),
        (shuffled, 10, "shuffled"),
        (fewer, 5, "shuffled"),
    ):
        own = Examples(pipe, SOURCE, TARGET, sites="ca", seeds=3, negatives=OTHERS, batch_size=24)
        agree(fitted, own.fit(Prototype(clusters=3), first=count, control=control, fit_seed=2 if control else 0))
    options = {"sites": "ca", "seeds": 3, "negatives": OTHERS}
    agree(every, fit(pipe, Prototype(clusters=3), SOURCE, TARGET, **options))
    agree(shuffled, fit(pipe, Prototype(clusters=3), SOURCE, TARGET, control="shuffled", fit_seed=2, **options))
    assert not torch.allclose(every.parameters[0].tensors["delta"], few.parameters[0].tensors["delta"], atol=1e-3)


def test_fewer_pairs_equal_a_fit_of_these_alone(pipe, ran):
    examples = Examples(pipe, SOURCE, TARGET, sites="ca", seeds=3)
    for count in (5, 3):
        for control in (None, "shuffled"):
            options = {"control": control, "fit_seed": 2}
            alone = fit(pipe, MeanDifference(), SOURCE[:count], TARGET[:count], sites="ca", seeds=3, **options)
            ran.clear()
            agree(examples.fit(MeanDifference(), first=count, **options), alone)
            assert len(ran) == (10 if (count, control) == (5, None) else 0)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.name)
@pytest.mark.parametrize("control", [None, "shuffled"])
def test_a_sequential_fit_runs_its_source_again_and_nothing_else(pipe, ran, method, control):
    options = {"sites": ["ffn.0", "ca_block.1"], "steps": (0, 2), "seeds": 3}
    examples = Examples(pipe, SOURCE, TARGET, **options)
    examples.fit(method)
    ran.clear()
    fitted = examples.fit(method, sequential=True, control=control)
    assert len(ran) == len(SOURCE)
    agree(fitted, fit(pipe, method, SOURCE, TARGET, sequential=True, control=control, **options), 5e-3)
    at_once = examples.fit(method, control=control)
    name = "delta" if method.name == "prototype" else "bias"
    assert not torch.allclose(fitted.parameters[1].tensors[name], at_once.parameters[1].tensors[name], atol=1e-2)


def test_pooled_methods_need_one_vector_per_prompt(pipe):
    options = {"sites": ["ca", "text.output"], "seeds": 3}
    means = Examples(pipe, SOURCE, TARGET, pool="mean", **options)
    tokens = Examples(pipe, SOURCE, TARGET, **options)
    method = MeanDifference(pooled=True)
    agree(means.fit(method), tokens.fit(method))
    agree(means.fit(method), fit(pipe, method, SOURCE, TARGET, **options))
    assert means.fit(method, shared=True).parameters[-1].steps is None
    agree(means.fit(method, shared=True), tokens.fit(method, shared=True))
    with pytest.raises(InputError, match="tokens, which prototype is fitted from"):
        means.fit(Prototype(clusters=3))
    with pytest.raises(InputError, match="tokens, which a sequential fit is fitted from"):
        means.fit(method, sequential=True)


def test_shared_steps_and_texts_of_a_pair(pipe):
    options = {"sites": ["text.output", "ca"], "seeds": 3}
    examples = Examples(pipe, SOURCE, TARGET, **options)
    method = GaussianTransport(pooled=False)
    agree(examples.fit(method, shared=True), fit(pipe, method, SOURCE, TARGET, shared=True, **options))
    agree(examples.fit(method, first=6), fit(pipe, method, SOURCE[:6], TARGET[:6], **options))


@pytest.mark.parametrize("sequential", [False, True])
def test_texts_of_a_language_model(lm, sequential):
    about, plain = [f"{text} at the top" for text in TARGET[:6]], SOURCE
    options = {"sites": "block", "paired": False, "positions": slice(1, None), "batch_size": 4}
    examples = Examples(lm, plain, about, **options)
    for method in (MeanDifference(), LinearAcT(support="all")):
        agree(
            examples.fit(method, sequential=sequential),
            fit(lm, method, plain, about, sequential=sequential, **options),
            5e-3,
        )


def test_a_run_that_fails_leaves_no_half_of_a_batch(pipe):
    calls = []

    def generate(prompts, seeds):
        calls.append(len(prompts))
        pipe(prompts, seeds=seeds, decode=False)
        if len(calls) == 2:
            raise KeyboardInterrupt

    examples = Examples(pipe, SOURCE, TARGET, sites="ca", batch_size=10, generate=generate)
    with pytest.raises(KeyboardInterrupt):
        examples.fit(MeanDifference())
    agree(examples.fit(MeanDifference()), fit(pipe, MeanDifference(), SOURCE, TARGET, sites="ca"))
    assert calls == [10, 10, 10, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 0}, "examples per side: got 0; allowed: 1 to 10"),
        ({"first": 11}, "1 to 10"),
        ({"first": True}, "1 to 10"),
        ({"control": "shuffle"}, "did you mean shuffled"),
        ({"rows": "all"}, "cond, uncond, both"),
        ({"sequential": True, "shared": True}, "one of the two"),
        ({"pool": "max"}, "tokens, mean"),
        ({"batch_size": 0}, "above 0"),
    ],
)
def test_bad_requests_are_named(pipe, change, message):
    own = {name: change[name] for name in change if name in ("pool", "batch_size")}
    with pytest.raises(InputError, match=message):
        Examples(pipe, SOURCE, TARGET, sites="ca", **own).fit(
            MeanDifference(), **{name: value for name, value in change.items() if name not in own}
        )
