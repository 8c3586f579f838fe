"""Generation of the Infinity port: cache against teacher forcing, random streams, guidance, compilation, folders."""

import pytest
import torch

from pysteer.errors import InputError
from pysteer.models.infinity.bsq import MultiScaleBSQ
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.generate import generate
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.models.infinity.sampling import row_uniform, sample_bits
from pysteer.models.infinity.transformer import Infinity, TextCondition

SCALES = ((1, 1), (2, 2), (4, 4))


def small_model(**changes) -> Infinity:
    torch.manual_seed(0)
    settings = {"depth": 4, "dim": 32, "heads": 2, "bits": 8, "scales": SCALES, "text_dim": 128, "text_maxlen": 12}
    model = Infinity(InfinityConfig(**{**settings, "mlp_ratio": 8, "chunks": 2, **changes})).eval()
    with torch.no_grad():  # zero-initialised parts would hide their own mistakes
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return model


def some_text(rows: int = 3) -> TextCondition:
    torch.manual_seed(1)
    return TextCondition(torch.randn(rows, 7, 128), torch.tensor([7, 3, 5, 6][:rows]))


def seeds(rows: int = 3, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + rows)


def test_cached_generation_equals_teacher_forced_forward():
    model, text = small_model(), some_text()
    seen: dict[int, torch.Tensor] = {}
    out = generate(model, text, seeds=seeds(), cfg=1.0, tau=1.0, on_scale=lambda i, logits: seen.setdefault(i, logits))
    quantiser, summed, inputs = MultiScaleBSQ(8, SCALES), None, []
    for i, bits in enumerate(out.bits[:-1]):
        summed = quantiser.accumulate(summed, bits, i)
        inputs.append(quantiser.next_input(summed, i + 1))
    with torch.no_grad():
        logits = model(text, torch.cat(inputs, 1))
    torch.testing.assert_close(torch.cat([seen[i] for i in range(3)], 1), logits, rtol=1e-5, atol=1e-5)


def test_padding_of_the_text_is_never_read():
    model, text = small_model(), some_text()
    poisoned = TextCondition(text.hidden.clone(), text.lengths)
    poisoned.hidden[1, 3:] = 1e4
    a = generate(model, text, seeds=seeds(), cfg=1.0)
    b = generate(model, poisoned, seeds=seeds(), cfg=1.0)
    assert torch.equal(a.features, b.features)


def test_a_row_does_not_depend_on_its_batch_mates():
    model, text = small_model(), some_text()
    together = generate(model, text, seeds=seeds(), cfg=2.0)
    alone = generate(model, TextCondition(text.hidden[1:2], text.lengths[1:2]), seeds=seeds()[1:2], cfg=2.0)
    for a, b in zip(together.bits, alone.bits, strict=True):
        assert torch.equal(a[1:2], b)
    other = generate(model, text, seeds=seeds(first=50), cfg=2.0)
    assert any(not torch.equal(a, b) for a, b in zip(together.bits, other.bits, strict=True))


def test_streams_are_uniform_and_distinct():
    u = row_uniform(torch.tensor([1, 2, 2**40]), 3, 20000)
    assert ((u >= 0) & (u < 1)).all()
    assert (u.mean(1) - 0.5).abs().max() < 0.01
    assert (u.var(1) - 1 / 12).abs().max() < 0.01
    assert torch.corrcoef(u).fill_diagonal_(0).abs().max() < 0.03
    assert not torch.equal(row_uniform(torch.tensor([1]), 2, 8), row_uniform(torch.tensor([1]), 3, 8))


def test_sampled_rates_follow_the_logits_and_top_p_cuts_the_unlikely_value():
    logits = torch.tensor([0.0, 1.0]).repeat(1, 1, 4000)
    uniform = row_uniform(torch.tensor([5]), 0, 4000)
    rate = sample_bits(logits, uniform, 1.0).float().mean()
    assert abs(rate - torch.sigmoid(torch.tensor(1.0))) < 0.03
    assert sample_bits(logits, uniform, 0.7).all()  # the likelier value has 0.73 >= 0.7 on its own


def test_guidance_one_everywhere_has_no_unconditional_rows():
    model, rows = small_model(), []
    model.row_listeners.append(lambda part, cond, uncond, lengths: rows.append((part, cond, uncond)))
    generate(model, some_text(), seeds=seeds(), cfg=1.0)
    generate(model, some_text(), seeds=seeds(), cfg=[1.0, 3.0, 1.0])
    assert rows == [("visual", 3, 0), ("visual", 3, 3)]
    assert model.clock.item() == 2


def test_guidance_and_negative_text_change_the_image():
    model, text = small_model(), some_text()
    base = generate(model, text, seeds=seeds(), cfg=3.0, tau=1.0)
    for changed in (
        generate(model, text, seeds=seeds(), cfg=1.0, tau=1.0),
        generate(model, text, seeds=seeds(), cfg=3.0, tau=1.0, cfg_insertion_layer=(-2,)),
        generate(model, text, seeds=seeds(), cfg=3.0, tau=1.0, negative=some_text(3)),
    ):
        assert not torch.equal(changed.features, base.features)


def test_forced_bits_are_taken():
    model, text = small_model(), some_text()
    forced = [torch.ones(3, 1, 8, dtype=torch.int64), torch.zeros(3, 4, 8, dtype=torch.int64)]
    out = generate(model, text, seeds=seeds(), forced_bits=forced)
    assert torch.equal(out.bits[0], forced[0])
    assert torch.equal(out.bits[1], forced[1])


def test_patchified_codes_have_twice_the_grid():
    model = small_model(patchify=True)
    out = generate(model, some_text(), seeds=seeds())
    assert out.features.shape == (3, 2, 8, 8)
    assert out.bits[-1].shape == (3, 16, 8)


def test_rope_restart_differs_only_after_the_first_scale():
    fixed, restart = small_model(), small_model(rope_restart=True)
    logits: list[list[torch.Tensor]] = [[], []]
    bits = generate(fixed, some_text(), seeds=seeds(), cfg=1.0).bits
    for store, model in zip(logits, (fixed, restart), strict=True):
        generate(
            model, some_text(), seeds=seeds(), cfg=1.0, forced_bits=bits, on_scale=lambda i, x, s=store: s.append(x)
        )
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.allclose(logits[0][1], logits[1][1])


def test_all_scales_compile_to_a_bounded_number_of_graphs_without_breaks():
    import torch._dynamo
    from torch._dynamo.utils import counters

    model, text = small_model(scales=((1, 1), (2, 2), (4, 4), (6, 6), (8, 8))), some_text()
    plain = generate(model, text, seeds=seeds(), greedy=True)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(model.scale_step, fullgraph=True, backend="eager")
    compiled = generate(model, text, seeds=seeds(), greedy=True, step=step)
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 4
    generate(model, text, seeds=seeds(first=9), greedy=True, step=step)
    assert counters["stats"]["unique_graphs"] == graphs
    for a, b in zip(plain.bits, compiled.bits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"cfg": [1.0, 2.0]}, "cfg"),
        ({"tau": [0.5] * 4}, "tau"),
        ({"cfg_insertion_layer": (-9,)}, "cfg_insertion_layer"),
    ],
)
def test_bad_settings_name_themselves(settings, named):
    with pytest.raises(InputError, match=named):
        generate(small_model(), some_text(), seeds=seeds(), **settings)


@pytest.fixture
def small_pipeline() -> InfinityPipeline:
    pytest.importorskip("transformers")
    from transformers import T5Config, T5EncoderModel

    from pysteer.zoo.shapes.captions import build_text_tokenizer, vocabulary
    from pysteer.zoo.shapes.tokenizer import ShapeTokenizer, ShapeTokenizerConfig

    torch.manual_seed(2)
    config = T5Config(vocab_size=len(vocabulary()), d_model=128, d_kv=32, d_ff=64, num_layers=1, num_heads=4)
    tokenizer = ShapeTokenizer(ShapeTokenizerConfig(dim=8, scales=SCALES))
    return InfinityPipeline(small_model(), tokenizer, T5EncoderModel(config), build_text_tokenizer(), {"cfg": 2.0})


def test_pipeline_round_trip_and_inputs(small_pipeline, tmp_path):
    prompts = ["a red circle", "a small blue star at the left on a white background"]
    first = small_pipeline(prompts, seeds=[4, 9])
    assert first.images.shape == (2, 32, 32, 3)
    assert first.images.dtype == torch.uint8
    small_pipeline.save_pretrained(tmp_path)
    second = InfinityPipeline.from_pretrained(tmp_path)(prompts, seeds=[4, 9])
    assert torch.equal(first.images, second.images)
    assert torch.equal(small_pipeline(prompts[1], seeds=9).images[0], first.images[1])
    steered = small_pipeline(prompts, seeds=[4, 9], negative_prompts="a green square")
    assert not torch.equal(steered.features, first.features)
    with pytest.raises(InputError, match="seeds"):
        small_pipeline(prompts, seeds=[1, 2, 3])
    with pytest.raises(InputError, match="prompts"):
        small_pipeline([])


def test_an_empty_negative_prompt_is_the_learned_unconditional_text(small_pipeline):
    prompts = ["a red circle", "a small blue star"]
    plain = small_pipeline(prompts, seeds=[4, 9])
    assert torch.equal(small_pipeline(prompts, seeds=[4, 9], negative_prompts="").features, plain.features)
    mixed = small_pipeline(prompts, seeds=[4, 9], negative_prompts=["", "a green square"])
    both = small_pipeline(prompts, seeds=[4, 9], negative_prompts="a green square")
    assert torch.equal(mixed.features[0], plain.features[0])
    assert torch.equal(mixed.features[1], both.features[1])
    assert not torch.equal(mixed.features[1], plain.features[1])


def test_bf16_weights_give_nearly_the_same_logits(small_pipeline, tmp_path):
    small_pipeline.save_pretrained(tmp_path, dtype=torch.bfloat16)
    logits: dict[torch.dtype, list[torch.Tensor]] = {}
    bits = None
    for dtype in (torch.float32, torch.bfloat16):
        pipe, seen = InfinityPipeline.from_pretrained(tmp_path, dtype=dtype), logits.setdefault(dtype, [])
        out = pipe(["a red circle"], forced_bits=bits, on_scale=lambda i, x, s=seen: s.append(x))
        bits = bits or out.bits
    for exact, rounded in zip(*logits.values(), strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_truncated_and_nan_weights_are_named(small_pipeline, tmp_path):
    small_pipeline.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="Infinity weights"):
        InfinityPipeline.from_pretrained(tmp_path)
    with torch.no_grad():
        small_pipeline.transformer.head.weight[0, 0] = float("nan")
    small_pipeline.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"head\.weight"):
        InfinityPipeline.from_pretrained(tmp_path)
