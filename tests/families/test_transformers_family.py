"""Language models and text encoders of transformers: sites, positions, padding, generation, compiled graphs."""

import itertools

import pytest
import torch
import torch._dynamo
import transformers as tf
from tiny_language import DECODERS, ENCODERS, IDS, LAYERS, LEFT, VOCABULARY, WIDTH, build, out, shift
from torch import Tensor
from torch._dynamo.utils import counters

import pysteer
from pysteer.capture import Recorder
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.methods import MeanDifference
from pysteer.models.language import LanguageModel
from pysteer.steering import Plan, SiteParameters


def hooked(model, path: str, parameters: SiteParameters, chosen, run):
    """The plain way: a forward hook that applies the formula to the chosen tokens."""
    gain, bias = parameters.tensors["gain"][0], parameters.tensors["bias"][0]

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        y = torch.where(chosen(x).unsqueeze(-1), gain * x + bias, x)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


def every(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_short_site_steers_as_the_formula_says(name: str) -> None:
    model = build(name)
    family = find_family(model)
    assert family.name == "transformers"
    sites = family.sites(model)
    short = [f"{kind}.{i}" for i in range(LAYERS) for kind in ("attn", "mlp", "block")] + ["embed", "norm"]
    assert set(short) <= set(sites)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = out(model)
    for i, site in enumerate(short):
        parameters = shift(site, i)
        expected = hooked(model, sites[site].path, parameters, every, lambda: out(model))
        with pysteer.steer(model, Plan.build([parameters])) as handle:
            steered = out(model)
            handle.strength = 0.0
            assert torch.equal(out(model), plain)
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(steered, plain, atol=1e-3), site
        report = handle.report()[0]
        assert (report.calls, report.tokens_touched) == (2, IDS.numel())
    assert torch.equal(out(model), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_left_alone(name: str) -> None:
    model = build(name)
    parameters = shift("block.1")
    places = {"position_ids": (LEFT.cumsum(-1) - 1).clamp_min(0)}
    with Recorder(model, "block.1") as recorder:
        out(model, attention_mask=LEFT, **places)
    plain = recorder.get("block.1")
    with pysteer.steer(model, Plan.build([parameters])) as handle, Recorder(model, "block.1") as recorder:
        padded = out(model, attention_mask=LEFT, **places)
        alone = out(model, IDS[:1, 2:])
    assert recorder.lengths("block.1").tolist() == [3, 5, 3]
    assert handle.report()[0].tokens_touched == 8 + 3
    steered = recorder.get("block.1")
    torch.testing.assert_close(padded[0, 2:], alone[0], rtol=1e-4, atol=1e-4)
    # The recorder puts valid tokens first: behind them lies the padding, which must not have changed.
    assert torch.equal(steered[0, 3:], plain[0, 3:])
    assert not torch.allclose(steered[0, :3], plain[0, :3], atol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_the_model_without_its_head_may_be_called_by_itself(name: str) -> None:
    model = build(name)
    base = model.base_model
    assert base is not model
    parameters, given = shift("block.1"), {"input_ids": IDS, "attention_mask": LEFT}
    path = find_family(model).sites(model)["block.1"].path
    plain = base(**given)[0]
    expected = hooked(model, path, parameters, lambda x: LEFT.bool(), lambda: base(**given)[0])
    with pysteer.steer(model, Plan.build([parameters])) as handle:
        steered = base(**given)[0]
        assert handle.report()[0].tokens_touched == LEFT.sum()  # counted once
        out(model, IDS[:1])  # another number of rows, through the head
        torch.testing.assert_close(base(**given)[0], steered)
        assert handle.report()[0].calls == 3
        compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**given)[0][LEFT.bool()], steered[LEFT.bool()])
    torch.testing.assert_close(steered[LEFT.bool()], expected[LEFT.bool()], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert torch.equal(base(**given)[0], plain)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("last", [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]),
        (slice(1, None), [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]),
        (slice(-2, None), [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]),
        (slice(0, 2), [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]),
        (slice(-4, -1), [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]]),
    ],
)
def test_positions(positions, chosen: list[list[int]]) -> None:
    model = build("llama")
    parameters = shift("attn.1")
    path = find_family(model).sites(model)["attn.1"].path
    mask = torch.tensor(chosen, dtype=torch.bool)
    expected = hooked(model, path, parameters, lambda x: mask, lambda: out(model, attention_mask=LEFT))
    with pysteer.steer(model, Plan.build([parameters]), positions=positions) as handle:
        steered = out(model, attention_mask=LEFT)
    real = LEFT.bool()
    torch.testing.assert_close(steered[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steered[real], out(model, attention_mask=LEFT)[real], atol=1e-3)
    assert handle.report()[0].tokens_touched == mask.sum()


def test_unknown_positions() -> None:
    with pytest.raises(InputError, match="positions: got 'first'"):
        pysteer.steer(build("llama"), Plan.build([shift("mlp.0")]), positions="first")


def generated(model, **settings) -> Tensor:
    return model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False, **settings)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_steered_in_both_phases(name: str, cache: str) -> None:
    model = build(name)
    parameters = shift("mlp.1")
    path = find_family(model).sites(model)["mlp.1"].path
    more = {"cache_implementation": "static"} if cache == "static" else {}

    def chosen(prompt: bool, further: bool):
        return lambda x: (LEFT.bool() & prompt) if x.shape[1] > 1 else torch.full((2, 1), further)

    results = {}
    for key, phases in {"both": (True, True), "prompt": (True, False), "further": (False, True)}.items():
        expected = hooked(model, path, parameters, chosen(*phases), lambda: generated(model))
        schedule = {"mlp.1": {step: (1.0, 0.0) for step, on in enumerate(phases) if on}}
        with pysteer.steer(model, Plan([parameters], schedule)):
            results[key] = generated(model, **more)
        assert torch.equal(results[key], expected), key
    assert not torch.equal(results["both"], generated(model))
    assert len({tuple(result.flatten().tolist()) for result in results.values()}) > 1


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    model = build("llama")
    parameters, given = shift("mlp.1"), {"use_cache": True, "past_key_values": tf.DynamicCache()}
    plain = model(IDS[:, :1]).logits
    with pysteer.steer(model, Plan([parameters], {"mlp.1": {0: (1.0, 0.0)}})):  # the prompt alone
        first = model(IDS[:, :1], **given).logits
        second = model(IDS[:, 1:2], **given).logits
    assert not torch.allclose(first, plain, atol=1e-3)
    with pysteer.steer(model, Plan([parameters], {"mlp.1": {1: (1.0, 0.0)}})):  # further tokens alone
        assert torch.equal(model(IDS[:, :1], use_cache=True, past_key_values=tf.DynamicCache()).logits, plain)
        again = {"use_cache": True, "past_key_values": tf.DynamicCache()}
        model(IDS[:, :1], **again)
        assert not torch.allclose(model(IDS[:, 1:2], **again).logits, second, atol=1e-3)


def test_rows_are_settings_of_their_own() -> None:
    model = build("qwen2")
    plan = Plan.build([shift("attn.0"), shift("block.2", 1)])
    strengths = torch.tensor([0.0, 0.5, 1.0, -1.0])
    ids = IDS[:1].expand(4, -1)
    with pysteer.steer(model, plan, strength=strengths) as handle:
        together = out(model, ids)
        with pytest.raises(InputError, match="entries of strength"):
            out(model, IDS)
        handle.strength = 1.0
        whole = out(model, IDS)
    assert torch.allclose(together[0], out(model, ids)[0], atol=1e-6)
    for row, strength in enumerate(strengths):
        with pysteer.steer(model, plan, strength=float(strength)):
            torch.testing.assert_close(together[row : row + 1], out(model, ids[:1]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, out(model, IDS), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "clip"])
def test_fifty_changes_without_a_new_graph(name: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plan = Plan.build([shift(f"{kind}.{i}") for i in range(LAYERS) for kind in ("attn", "mlp", "block")], strength=0.1)
    with pysteer.steer(compiled, plan) as handle:
        seen = [out(compiled, attention_mask=LEFT)]
        torch.testing.assert_close(seen[0], out(model, attention_mask=LEFT), rtol=1e-5, atol=1e-5)
        handle.strength = 0.1
        out(compiled, attention_mask=LEFT)
        graphs = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("fail_on_recompile"):
            for change in range(1, 51):
                if change % 3 == 0:
                    handle.strength = 0.1 + 0.01 * change
                elif change % 3 == 1:
                    handle.strength = torch.rand(2)
                else:
                    names = [entry.site for entry in plan.parameters]
                    handle.update(Plan.build([shift(site, change) for site in names], strength=0.1))
                seen.append(out(compiled, attention_mask=LEFT))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(seen))
    torch._dynamo.reset()
    assert torch.equal(out(model), out(build(name)))


def test_compiled_batches_beyond_the_capacity_are_refused() -> None:
    torch._dynamo.reset()
    model = build("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with (
        pysteer.steer(compiled, Plan.build([shift("mlp.0")]), capacity=2),
        pytest.raises(Exception, match=r"rows of the batch"),
    ):
        out(compiled, IDS[:1].expand(3, -1))


class Words:
    """A tokenizer of single words, with what LanguageModel asks of one."""

    pad_token_id, eos_token, pad_token, padding_side = 0, "end", "end", "right"

    def __call__(self, prompts, padding=False, return_tensors=None):
        rows = [[3 + sum(map(ord, word)) % (VOCABULARY - 3) for word in prompt.split()] for prompt in prompts]
        if not padding:
            return {"input_ids": rows}
        longest = max(map(len, rows))
        pads = [longest - len(row) for row in rows]
        ids = [
            [0] * pad + row if self.padding_side == "left" else row + [0] * pad
            for row, pad in zip(rows, pads, strict=True)
        ]
        mask = [
            [0] * p + [1] * len(r) if self.padding_side == "left" else [1] * len(r) + [0] * p
            for r, p in zip(rows, pads, strict=True)
        ]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in ids]


SOURCE = ["the sky is grey today", "we ate soup", "a car went by very fast"]
TARGET = ["a giraffe eats leaves", "two tall giraffes", "the giraffe ran over the plain"]


@pytest.mark.parametrize("sequential", [False, True])
def test_fit_and_steer_by_pattern(sequential: bool) -> None:
    lm = LanguageModel(build("llama"), Words())
    assert lm.tokenizer.padding_side == "left"
    fitted = pysteer.fit(
        lm, MeanDifference(), SOURCE, TARGET, sites=r".*layernorm", paired=False, sequential=sequential,
        positions=slice(1, None),
    )  # fmt: skip
    assert [entry.site for entry in fitted.parameters][:2] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    assert len(fitted.parameters) == 2 * LAYERS
    assert all(entry.steps is None for entry in fitted.parameters)
    with Recorder(lm, "model.layers.0.input_layernorm", positions=slice(1, None)) as recorder:
        lm.read([*SOURCE, *TARGET])
    x, lengths = recorder.get("model.layers.0.input_layernorm"), recorder.lengths("model.layers.0.input_layernorm")
    means = [torch.cat([x[i, : lengths[i]] for i in rows]).mean(0) for rows in (range(3), range(3, 6))]
    torch.testing.assert_close(fitted.parameters[0].tensors["bias"][0], means[1] - means[0], rtol=1e-4, atol=1e-5)
    plain = lm.generate(SOURCE, max_new_tokens=5)
    with pysteer.steer(lm, fitted.plan(), strength=3.0):
        steered = lm.generate(SOURCE, max_new_tokens=5)
    assert steered != plain
    assert lm.generate(SOURCE, max_new_tokens=5) == plain


def test_likelihood_ignores_padding() -> None:
    lm = LanguageModel(build("llama"), Words())
    together = lm.negative_log_likelihood(SOURCE)
    for text, value in zip(SOURCE, together, strict=True):
        torch.testing.assert_close(lm.negative_log_likelihood([text])[0], value, rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    lm = LanguageModel(build("llama"), Words())
    with pytest.raises(InputError, match="unknown site"):
        pysteer.fit(lm, MeanDifference(), SOURCE, TARGET, sites=".*layernom.*", paired=False)
    with pytest.raises(InputError, match="pattern of sites"):
        pysteer.fit(lm, MeanDifference(), SOURCE, TARGET, sites="(", paired=False)
    with pytest.raises(InputError, match="do not fit"), pysteer.steer(lm, Plan.build([shift("mlp.0", width=16)])):
        pass
    with pytest.raises(InputError, match="prompts"):
        lm.read("one text")
    both = tf.T5Model(tf.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(InputError, match="encoder-decoder"):
        pysteer.steer(both, Plan.build([shift("block.0")]))
