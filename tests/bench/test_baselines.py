"""The ways of others, written from their formulas, do the same as pysteer: the comparison is of the same work."""

import json

import pytest
import tiny_infinity
import tiny_language
import torch
from torch import nn

import pysteer
from bench.baselines import hooks
from bench.works import decoding
from bench.works.infinity import _plan
from bench.works.language import _for_older_versions
from pysteer.ops.sae_edit import sae_edit
from pysteer.steering import Plan, SiteParameters

WIDTH, LAYERS = tiny_language.WIDTH, tiny_language.LAYERS
BLOCKS = [f"block.{i}" for i in range(LAYERS)]


def affine(sites, seed=0, gain=True):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in sites:
        g = 1 + 0.3 * torch.randn(WIDTH, generator=generator) if gain else torch.ones(WIDTH)
        found[site] = (g, torch.randn(WIDTH, generator=generator))
    return found


def steered(model, maps, low=None, **given):
    entries = []
    for site, (gain, bias) in maps.items():
        banks = {"gain": gain[None], "bias": bias[None]}
        if low is not None:
            banks |= {"low": torch.full((1, WIDTH), low), "high": torch.full((1, WIDTH), -low)}
        entries.append(SiteParameters(site, "affine_shift", None, banks))
    with pysteer.steer(model, Plan.build(entries), **given):
        return tiny_language.out(model)


def hooked(model, maps, make):
    sites = {f"block.{i}": model.model.layers[i] for i in range(LAYERS)}
    handles = [sites[name].register_forward_hook(make(*given)) for name, given in maps.items()]
    try:
        return tiny_language.out(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("low", [-1e6, -0.7])
def test_linear_act_is_a_bounded_affine_shift(low):
    model, maps = tiny_language.build("llama"), affine(BLOCKS)
    plain = tiny_language.out(model)
    bounds = torch.full((WIDTH,), low), torch.full((WIDTH,), -low)
    theirs = hooked(model, maps, lambda g, b: hooks.linear_act(g, b, *bounds, [0.6]))
    ours = steered(model, maps, low, strength=0.6)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1
    if low == -1e6:
        again = hooked(model, maps, lambda g, b: hooks.gaussian_act(g, b, *bounds, [0.6]))
        torch.testing.assert_close(again, ours, rtol=1e-4, atol=1e-4)
        affine_too = hooked(model, maps, lambda g, b: hooks.affine(g, b, [0.6]))
        torch.testing.assert_close(affine_too, ours, rtol=1e-4, atol=1e-4)


def test_gaussian_act_leaves_dead_units():
    gain, bias = torch.ones(4), torch.ones(4)
    gain[2] = 0.0  # a target without spread
    hook = hooks.gaussian_act(gain, bias, torch.full((4,), -1e6), torch.full((4,), 1e6), [1.0])
    out = hook(nn.Identity(), (), torch.zeros(1, 1, 4))
    assert out.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("mask", [None, tiny_language.LEFT])
def test_repengs_blocks_add_a_vector_and_leave_padding(mask):
    model, maps = tiny_language.build("llama"), affine(BLOCKS, gain=False)
    given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    plain = tiny_language.out(model, **given)
    entries = [
        SiteParameters(site, "affine_shift", None, {"gain": g[None], "bias": b[None]}) for site, (g, b) in maps.items()
    ]
    with pysteer.steer(model, Plan.build(entries), strength=0.5):
        ours = tiny_language.out(model, **given)
    for i, (_, bias) in enumerate(maps.values()):
        model.model.layers[i] = hooks.RepengBlock(model.model.layers[i], bias, [0.5])
    if mask is None:
        given["position_ids"] = torch.arange(tiny_language.IDS.shape[1]).expand(len(tiny_language.IDS), -1)
    theirs = tiny_language.out(model, **given)
    kept = torch.ones_like(tiny_language.IDS, dtype=torch.bool) if mask is None else mask.bool()
    last = kept.cumsum(1) > (1 if mask is not None else 0)  # two padding tokens of the row count as position 0 too
    torch.testing.assert_close(theirs[last & kept], ours[last & kept], rtol=1e-4, atol=1e-4)
    assert (ours - plain)[kept].abs().max() > 0.1


def test_repengs_normalisation_keeps_the_length():
    block = hooks.RepengBlock(nn.Identity(), torch.ones(4), [2.0], normalize=True)
    x = torch.randn(2, 3, 4)
    out = block(x)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert not torch.equal(out, x)


def test_the_infinity_wrapper_shifts_both_halves_at_every_scale():
    pipe = tiny_infinity.tiny_pipeline()
    shifts = torch.randn(len(tiny_infinity.SCALES), tiny_infinity.DEPTH, tiny_infinity.WIDTH)
    bits = [torch.randint(0, 2, (2, h * w, 4)) for h, w in tiny_infinity.SCALES]

    def logits(state):
        seen = []

        def on_scale(scale, values):
            state["step"] = scale + 1
            seen.append(values.clone())

        state["step"] = 0
        pipe(["a red circle", "a blue star"], seeds=0, decode=False, forced_bits=bits, on_scale=on_scale)
        return torch.cat(seen, dim=1)

    plain = logits({})
    with pysteer.steer(pipe, _plan(shifts)):
        ours = logits({})
    state, lever = {"step": 0}, [1.0]
    steps, layers = shifts.shape[:2]
    vectors = {(s, layer): shifts[s, layer] for s in range(steps) for layer in range(layers)}
    for i, block in enumerate(pipe.transformer.blocks):
        schedule = {str(s): [0, 1, 2] for s in range(steps)}
        block.ffn = hooks.InfinityWrapper(block.ffn, i, state, schedule, vectors, lever)
    torch.testing.assert_close(logits(state), ours, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1
    lever[0] = 0.0
    assert torch.equal(logits(state), plain)


def test_saeurons_hook_is_an_edit_of_three_latents():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, generator=generator)
    encoder, decoder = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    bias, chosen = 0.1 * torch.randn(64, generator=generator), torch.tensor([3, 10, 20])
    scale, level = torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([0.0, 0.2, 0.1])
    theirs = hooks.SaeuronEdit(encoder, bias, decoder, 12, chosen, scale, level, [1.0])(nn.Identity(), (), x)
    ours = sae_edit(
        x, encoder[chosen][None].expand(2, -1, -1), bias[chosen][None].expand(2, -1),
        decoder[chosen][None].expand(2, -1, -1), scale[None].expand(2, -1), torch.zeros(2, 3),
        slot=torch.ones(1, 2, dtype=torch.int32), strength=torch.ones(1, 2), clock=torch.zeros((), dtype=torch.int64),
        level=level[None].expand(2, -1), full_encoder=encoder, full_bias=bias,
        latent=chosen.to(torch.int32)[None].expand(2, -1), gate="topk", k=12,
    )  # fmt: skip
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    changed = (ours != x).any(-1)
    assert 0 < int(changed.sum()) < changed.numel()  # only tokens where an edited latent is among the k largest


@pytest.fixture
def short_ids(monkeypatch):
    """The tiny model has fewer tokens than the works use."""
    real = decoding.token_ids
    monkeypatch.setattr(decoding, "token_ids", lambda work: real(work) % tiny_language.VOCABULARY)


def test_a_sweep_in_one_batch_is_the_sweep_one_by_one(short_ids):
    work = decoding.Work(1, prompt=4, new=3, strengths=3)
    swept, bias = decoding.levels(3), torch.randn(WIDTH)
    assert swept == pytest.approx([1 / 3, 2 / 3, 1])
    model, lever = tiny_language.build("llama"), [0.0]
    handle = model.model.layers[1].register_forward_hook(hooks.add(bias, lever))

    def set_strength(value):
        lever[0] = value

    with torch.no_grad():
        alone = decoding.one_by_one(decoding.Decoder(model, work), set_strength, swept)
        handle.remove()
        plan = Plan.build([SiteParameters("block.1", "affine_shift", None,
                                          {"gain": torch.ones(1, WIDTH), "bias": bias[None]})])  # fmt: skip
        with pysteer.steer(model, plan, strength=torch.tensor(swept)):
            batch = decoding.Decoder(model, work, rows=3)
            batch.setup()
            together = batch.run()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (alone[0] - alone[2]).abs().max() > 1e-2


def test_works_are_found_by_name_and_tokens_are_the_same_for_all():
    assert decoding.find("decode,-batch-8").batch == 8
    assert torch.equal(decoding.token_ids(decoding.Work(2, 4, 3)), decoding.token_ids(decoding.Work(2, 4, 3)))
    with pytest.raises(KeyError):
        decoding.find("decode,-batch-9")


def test_older_versions_find_the_base_of_the_rotary_embedding(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"rope_parameters": {"rope_theta": 100000.0}, "hidden_size": 8}', encoding="utf-8")
    _for_older_versions(path)
    assert json.loads(path.read_text(encoding="utf-8"))["rope_theta"] == 100000.0
    path.write_text('{"hidden_size": 8}', encoding="utf-8")
    _for_older_versions(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"hidden_size": 8}
