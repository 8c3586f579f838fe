"""Folding a plan into weights: the baked model does what the steered one does, or the site is refused by name."""

import pytest
import torch
from tiny_infinity import DEPTH, tiny_pipeline
from tiny_language import IDS, LAYERS, build, out, shift

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.steering import Plan, SiteParameters

EVERYWHERE = {
    "llama": (r"layers.{}.input_layernorm", "layers.{}.post_attention_layernorm", "attn.{}", "mlp.{}",
              "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.gate_proj", "norm"),
    "qwen2": ("layers.{}.input_layernorm", "model.layers.{}.self_attn.v_proj"),
    "gpt2": ("attn.{}", "mlp.{}", "transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.h.{}.mlp.c_fc",
             "norm"),
    "phi": ("attn.{}", "mlp.{}", "model.layers.{}.input_layernorm"),
    "clip": ("attn.{}", "mlp.{}", "norm"),
}  # fmt: skip


def named(model, pattern: str) -> list[str]:
    known = find_family(model).sites(model)
    names = list(dict.fromkeys(pattern.format(i) for i in range(LAYERS)))
    return [name if name in known else f"model.{name}" for name in names]


def plan_for(model, sites: list[str], gain_only: bool = False) -> Plan:
    known = find_family(model).sites(model)
    entries = [shift(site, i, known[site].width) for i, site in enumerate(sites)]
    for entry in entries:
        entry.tensors["bias"] *= 0.0 if gain_only else 0.3
    return Plan.build(entries, rows="both", strength=0.7)


@pytest.mark.parametrize(("name", "pattern"), [(name, pattern) for name, p in EVERYWHERE.items() for pattern in p])
def test_baked_equals_steered(name: str, pattern: str) -> None:
    model = build(name)
    plain, before = out(model), {key: value.clone() for key, value in model.state_dict().items()}
    if pattern == "norm" and name == "llama":  # its shift would have to go into the output layer, which has no bias
        plan = plan_for(model, ["norm"], gain_only=True)
    else:
        plan = plan_for(model, named(model, pattern))
    with pysteer.steer(model, plan, strength=1.5):
        steered = out(model)
    baked = pysteer.bake(model, plan, strength=1.5)
    torch.testing.assert_close(out(baked), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out(baked), plain, atol=1e-3)
    assert torch.equal(out(model), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(baked) is type(model)


def test_gemma_stores_its_gain_less_one() -> None:
    model = build("gemma2")
    sites = [f"model.layers.{i}.{kind}_layernorm" for i in range(LAYERS) for kind in ("post_attention", "input")]
    plan = plan_for(model, sites, gain_only=True)
    with pysteer.steer(model, plan):
        steered = out(model)
    torch.testing.assert_close(out(pysteer.bake(model, plan)), steered, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="post_attention_layernorm cannot be folded"):
        pysteer.bake(model, plan_for(model, ["model.layers.0.post_attention_layernorm"]))


@pytest.mark.parametrize("sites", [["attn.1", "mlp.0"], ["model.layers.0.input_layernorm"]])
def test_a_baked_checkpoint_needs_nothing_of_ours(sites: list[str], tmp_path) -> None:
    model = build("llama")
    plan = plan_for(model, sites)
    with pysteer.steer(model, plan):
        steered = out(model)
    pysteer.bake(model, plan).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(out(again), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, out(model), atol=1e-3)


def test_several_maps_at_one_site_and_in_place() -> None:
    model = build("gpt2")
    plan = plan_for(model, ["mlp.1"]) + plan_for(model, ["mlp.1", "attn.2"])
    with pysteer.steer(model, plan):
        steered = out(model)
    assert pysteer.bake(model, plan, inplace=True) is model
    torch.testing.assert_close(out(model), steered, rtol=1e-4, atol=1e-5)


def test_infinity_is_baked_where_all_rows_are_steered_alike() -> None:
    pipe = tiny_pipeline()
    entries = []
    for place in ("sa", "ca", "ffn"):
        for i in range(DEPTH):
            width = find_family(pipe).sites(pipe)[f"{place}.{i}"].width
            entries.append(shift(f"{place}.{i}", i, width))
    prompts, seen = ["a red circle", "a green star"], []

    def generate(which) -> torch.Tensor:
        seen.clear()
        which(prompts, seeds=3, decode=False, on_scale=lambda i, logits: seen.append(logits.flatten(1)))
        return torch.cat(seen, 1)

    plan = Plan.build(entries, rows="both", strength=0.3)
    plain = generate(pipe)
    with pysteer.steer(pipe, plan):
        steered = generate(pipe)
    baked = pysteer.bake(pipe, plan)
    torch.testing.assert_close(
        generate(baked)[:, : steered.shape[1] // 8], steered[:, : steered.shape[1] // 8], rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(steered, plain, atol=1e-2)
    with pytest.raises(InputError, match="different strengths for cond and uncond"):
        pysteer.bake(pipe, Plan.build(entries[:1], rows="cond"))


@pytest.mark.parametrize(
    ("site", "why"),
    [("block.1", "does not end in one linear layer"), ("embed", "weights shared by"), ("norm", "read by layers")],
)
def test_what_cannot_be_folded_is_named(site: str, why: str) -> None:
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    before = out(model)
    with pytest.raises(InputError, match=rf"site {site} cannot be folded.*{why}"):
        pysteer.bake(model, plan_for(model, [site]))
    assert torch.equal(out(model), before)


def test_only_constant_affine_maps() -> None:
    model = build("llama")
    entry = shift("mlp.0")
    schedule = {"mlp.0": {0: (1.0, 0.0), 1: (0.5, 0.0)}}
    with pytest.raises(InputError, match="change with the step"):
        pysteer.bake(model, Plan([entry], schedule))
    bounded = SiteParameters(
        "mlp.0",
        "affine_shift",
        None,
        {**entry.tensors, "low": entry.tensors["bias"] - 1, "high": entry.tensors["bias"] + 1},
    )
    with pytest.raises(InputError, match="affine_shift with bias with gain with high with low"):
        pysteer.bake(model, Plan.build([bounded]))
    with pytest.raises(InputError, match="for which a Qwen2Config has no bias"):
        pysteer.bake(build("qwen2"), Plan.build([shift("mlp.0")]))
    assert torch.equal(out(model, IDS), out(build("llama"), IDS))
