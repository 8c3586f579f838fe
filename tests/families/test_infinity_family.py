"""Every site of the Infinity family steers, only where it should; also on a model that is not ours."""

import pytest
import torch
from tiny_infinity import DEPTH, SCALES, TEXT_WIDTH, WIDTH, Published, tiny_pipeline

import pysteer
from pysteer.capture import Recorder
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.families.infinity import LOCATIONS
from pysteer.steering import Plan, SiteParameters

PROMPTS = ["a red circle", "a large green star on a blue background", "a cross"]
VISUAL = [f"{location}.{i}" for location in LOCATIONS for i in range(DEPTH)]
ALL = [*VISUAL, "pooled", "text.block.0", "text.block.1", "text.output"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def shift(site: str, steps: tuple[int, ...] | None, size: float = 1.0) -> SiteParameters:
    width = TEXT_WIDTH if site.startswith("text") else WIDTH
    sets = 1 if steps is None else len(steps)
    bias = size * torch.randn(sets, width, generator=torch.Generator().manual_seed(1))
    return SiteParameters(site, "affine_shift", steps, {"gain": torch.ones(sets, width), "bias": bias})


def test_sites_name_existing_modules_of_the_stated_width(pipe):
    family = find_family(pipe)
    assert family.name == "infinity"
    sites = family.sites(pipe)
    assert list(sites) == ALL
    with Recorder(pipe, ALL) as recorder:
        pipe(PROMPTS)
    for name, site in sites.items():
        x = recorder.get(name)
        assert x.shape[0] == len(PROMPTS)
        assert x.shape[-1] == site.width
    assert (family.steps(pipe, "visual"), family.steps(pipe, "text")) == (len(SCALES), 1)
    assert (family.layers(pipe), family.text_layers(pipe)) == (DEPTH, 2)
    assert torch.equal(recorder.lengths("text.output"), torch.tensor([4, 9, 3]))


@pytest.mark.parametrize("site", ALL)
def test_every_site_changes_the_image(pipe, site):
    before = pipe(PROMPTS, seeds=3)
    with pysteer.steer(pipe, Plan.build([shift(site, None, 3.0)])) as handle:
        during = pipe(PROMPTS, seeds=3)
        assert handle.report()[0].calls == (len(SCALES) if site in VISUAL else 1)
    after = pipe(PROMPTS, seeds=3)
    assert not torch.equal(before.features, during.features)
    assert torch.equal(before.features, after.features)


@pytest.mark.parametrize("site", ALL)
def test_strength_zero_is_bit_identical(pipe, site):
    before = pipe(PROMPTS, seeds=3)
    with pysteer.steer(pipe, Plan.build([shift(site, None)]), strength=0.0):
        during = pipe(PROMPTS, seeds=3)
    assert torch.equal(before.features, during.features)
    assert torch.equal(before.images, during.images)


@pytest.mark.parametrize("site", ["sa.1", "ca.0", "ffn.2", "ca_block.1", "pooled"])
@pytest.mark.parametrize("rows", ["cond", "uncond", "both"])
def test_only_the_planned_rows_and_steps_change_at_the_site(pipe, site, rows):
    step = 0 if site == "pooled" else 1
    bits = pipe(PROMPTS, seeds=2).bits
    text = pipe.encode_text(PROMPTS)
    with Recorder(pipe, [site], rows="all") as plain:
        pipe(text, seeds=2, forced_bits=bits)
    parameters = shift(site, (step,))
    with pysteer.steer(pipe, Plan.build([parameters], rows=rows)), Recorder(pipe, [site], rows="all") as steered:
        pipe(text, seeds=2, forced_bits=bits)
    moved = steered.get(site, step) - plain.get(site, step)
    half = len(PROMPTS)
    planned = {"cond": [True, False], "uncond": [False, True], "both": [True, True]}[rows]
    for chosen, part in zip(planned, (moved[:half], moved[half:]), strict=True):
        if chosen:
            assert torch.allclose(part, parameters.tensors["bias"][0].expand_as(part), atol=1e-5)
        else:
            assert part.abs().max() == 0
    if step:
        assert torch.equal(steered.get(site, 0), plain.get(site, 0))


def test_a_row_without_strength_keeps_its_image(pipe):
    before = pipe(PROMPTS, seeds=1)
    plan = Plan.build([shift("ca_block.0", None, 3.0), shift("text.output", None, 3.0)])
    with pysteer.steer(pipe, plan, strength=torch.tensor([1.0, 0.0, 1.0])):
        during = pipe(PROMPTS, seeds=1)
    same = (before.features == during.features).flatten(1).all(1)
    assert same.tolist() == [False, True, False]


def test_text_steering_leaves_padding_and_negative_prompts_alone(pipe):
    parameters = shift("text.output", None)
    with pysteer.steer(pipe, Plan.build([parameters])):
        steered = pipe.encode_text(PROMPTS)
        negative = pipe.encode_text(PROMPTS, kind="uncond")
    plain = pipe.encode_text(PROMPTS)
    moved = steered.hidden - plain.hidden
    for row, length in enumerate(plain.lengths.tolist()):
        assert torch.allclose(moved[row, :length], parameters.tensors["bias"].expand(length, -1), atol=1e-5)
        assert moved[row, length:].abs().sum() == 0
    assert torch.equal(negative.hidden, plain.hidden)


def test_without_guidance_all_rows_are_conditional(pipe):
    with pysteer.steer(pipe, Plan.build([shift("ffn.0", None)], rows="uncond")):
        during = pipe(PROMPTS, seeds=1, cfg=1.0)
    assert torch.equal(during.features, pipe(PROMPTS, seeds=1, cfg=1.0).features)
    with pysteer.steer(pipe, Plan.build([shift("ffn.0", None, 3.0)], rows="cond")):
        during = pipe(PROMPTS, seeds=1, cfg=1.0)
    assert not torch.equal(during.features, pipe(PROMPTS, seeds=1, cfg=1.0).features)


def test_listeners_are_gone_afterwards(pipe):
    with pysteer.steer(pipe, Plan.build([shift("ffn.0", None)])):
        assert len(pipe.transformer.row_listeners) == 1
        pipe(PROMPTS)
    assert pipe.transformer.row_listeners == []
    assert pipe.text_row_listeners == []


def test_unknown_site_is_named(pipe):
    with pytest.raises(InputError, match=r"did you mean ffn\.2"):
        pysteer.steer(pipe, Plan.build([shift("ffn_2", None)])).__enter__()
    with pytest.raises(InputError, match="text"):
        find_family(pipe).root(pipe.transformer, "text")


@pytest.fixture
def published(pipe):
    from copy import deepcopy

    return Published(deepcopy(pipe.transformer))


def run_published(model, text, cfg=(2.0, 2.0, 2.0)):
    schedule = [(1, *scale) for scale in SCALES]
    return model.autoregressive_infer_cfg(None, schedule, text, B=len(text.lengths), cfg_list=list(cfg))


@pytest.mark.parametrize("site", [*VISUAL, "pooled"])
@pytest.mark.parametrize("guided", [True, False])
def test_published_model_is_steered_through_the_same_sites(pipe, published, site, guided):
    text = pipe.encode_text(PROMPTS)
    cfg = (1.0, 2.0, 1.0) if guided else (1.0, 1.0, 1.0)
    before = run_published(published, text, cfg)
    steps = (0,) if site == "pooled" else (1, 2)
    with pysteer.steer(published, Plan.build([shift(site, steps, 2.0)])) as handle:
        during = run_published(published, text, cfg)
        assert handle.report()[0].steps == ((0,) if site == "pooled" else (0, 1, 2))
    assert "autoregressive_infer_cfg" not in published.__dict__
    half = len(PROMPTS)
    assert len(before[0]) == (2 * half if guided else half)
    first = 0 if site == "pooled" else 1
    for scale, (a, b) in enumerate(zip(before, during, strict=True)):
        assert torch.equal(a[half:], b[half:])
        assert torch.equal(a[:half], b[:half]) == (scale < first)
    assert all(torch.equal(a, b) for a, b in zip(before, run_published(published, text, cfg), strict=True))


def test_published_model_may_have_a_wrapper_of_its_own(pipe, published):
    text = pipe.encode_text(PROMPTS)
    original = published.autoregressive_infer_cfg
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    published.autoregressive_infer_cfg = own
    before = run_published(published, text)
    with pysteer.steer(published, Plan.build([shift("ffn.0", None, 2.0)])):
        with pysteer.steer(published, Plan.build([shift("ffn.1", None, 2.0)])):
            both = run_published(published, text)
        one = run_published(published, text)
    assert published.autoregressive_infer_cfg is own
    assert len(calls) == 3
    assert not torch.equal(before[0], one[0])
    assert not torch.equal(both[0], one[0])


def test_text_encoder_alone(pipe):
    encoder = pipe.text_encoder
    ids = pipe.text_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    parameters = shift("text.output", None)
    with torch.no_grad():
        before = encoder(**ids).last_hidden_state
        with pysteer.steer(encoder, Plan.build([parameters])):
            during = encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state
        after = encoder(**ids).last_hidden_state
    moved = during - before
    valid = ids["attention_mask"].bool()
    assert torch.allclose(moved[valid], parameters.tensors["bias"].expand(int(valid.sum()), -1), atol=1e-5)
    assert moved[~valid].abs().sum() == 0
    assert torch.equal(before, after)
    assert len(encoder._forward_pre_hooks) == 0
