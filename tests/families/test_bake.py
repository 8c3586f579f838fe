"""Folding a plan into weights: the baked model does what the steered one does, or the site is refused by name."""

import pytest
import torch
import transformers as tf
from tiny_infinity import DEPTH, tiny_pipeline
from tiny_language import LAYERS, WIDTH, build, out, shift
from tiny_maps import Hooked, moved, parameters

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.methods import Prototype
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


LOW_RANK = {
    "llama": ("attn.1", "mlp.1", "model.layers.1.input_layernorm", "model.layers.0.post_attention_layernorm", "embed",
              "model.layers.1.self_attn.k_proj"),
    "mistral": ("model.layers.0.mlp.up_proj",),
    "gpt2": ("attn.0", "mlp.1", "transformer.h.0.ln_1", "transformer.h.1.ln_2", "transformer.h.0.attn.c_attn"),
    "phi": ("attn.0", "model.layers.1.input_layernorm", "mlp.0"),
    "clip": ("attn.0", "mlp.1", "encoder.layers.1.layer_norm1", "encoder.layers.0.layer_norm2"),
}  # fmt: skip


def check(model, entry: SiteParameters, s: float = 0.8) -> None:
    """What is baked equals a hook that computes the formula."""
    site = find_family(model).sites(model)[entry.site]
    plain = out(model)
    with Hooked(model.get_submodule(site.path), entry, site, s):
        steered = out(model)
    torch.testing.assert_close(out(pysteer.bake(model, Plan.build([entry]), strength=s)), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, steered, atol=1e-4)


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in LOW_RANK.items() for site in sites])
def test_maps_of_low_rank(name: str, site: str) -> None:
    model = build(name)
    if name == "llama" and "proj" not in site:
        model.config.attention_bias, model.config.mlp_bias = True, True
        model = type(model)(model.config).eval()
    entry = parameters("low_rank", site, find_family(model).sites(model)[site].width)
    if name == "mistral":
        entry.tensors["bias"] *= 0.0
    check(model, entry)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "clip"])
def test_a_residual_stream_takes_a_constant_alone(name: str) -> None:
    model = build(name)
    check(model, parameters("constant", "block.1", WIDTH))
    with pytest.raises(InputError, match=r"site block.1 cannot be folded.*residual stream"):
        pysteer.bake(model, Plan.build([parameters("affine", "block.1", WIDTH)]))


@pytest.mark.parametrize("site", ["attn.1", "mlp.0", "encoder.block.0.layer.0.layer_norm", "text.output"])
def test_t5_without_shifts(site: str) -> None:
    """T5 has no bias anywhere: gains fold, shifts are refused."""
    model = build("t5")
    check(model, parameters("gain", site, WIDTH))
    with pytest.raises(InputError, match="cannot be folded"):
        pysteer.bake(model, Plan.build([parameters("affine", site, WIDTH)]))


def test_an_edit_of_latents_without_a_gate() -> None:
    model, generator = build("gpt2"), torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(1, *shape, generator=generator)  # noqa: E731
    banks = {
        "encoder": draw(2, WIDTH),
        "encoder_bias": draw(2),
        "decoder": draw(2, WIDTH),
        "scale": draw(2),
        "add": draw(2),
    }
    edit = SiteParameters("mlp.1", "sae_edit", None, banks, {"gate": "none"})
    plain = out(model)
    with pysteer.steer(model, Plan.build([edit]), strength=0.1):
        steered = out(model)
    baked = pysteer.bake(model, Plan.build([edit]), strength=0.1)
    torch.testing.assert_close(out(baked), steered, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, steered, atol=1e-2)
    with pytest.raises(InputError, match="sae_edit: a gate decides"):
        pysteer.bake(model, Plan.build([SiteParameters("mlp.1", "sae_edit", None, banks, {"gate": "relu"})]))


def test_maps_that_meet_in_one_weight() -> None:
    """Two at a norm without a bias, a module and its last layer out of order, a norm and what reads it."""
    model = build("llama")
    norm, layer = "model.layers.1.input_layernorm", "model.layers.1.self_attn"
    names = ["attn.1", norm, f"{layer}.o_proj", f"{layer}.q_proj", norm, "attn.1"]
    entries = [shift(name, i, WIDTH) for i, name in enumerate(names)]
    plan = Plan.build(entries, strength=0.5)
    with pysteer.steer(model, plan):
        steered = out(model)
    torch.testing.assert_close(out(pysteer.bake(model, plan)), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, out(model), atol=1e-2)


def test_baking_twice_adds_up() -> None:
    model, first, second = build("llama"), parameters("affine", "mlp.1", WIDTH), parameters("low_rank", "attn.0", WIDTH)
    once = pysteer.bake(model, Plan.build([first]))
    twice = pysteer.bake(once, Plan.build([second, first]))
    both = pysteer.bake(model, Plan.build([first]) + Plan.build([second, first]))
    torch.testing.assert_close(out(twice), out(both), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out(once), out(twice), atol=1e-3)


def test_in_bf16_only_the_weights_are_rounded() -> None:
    model = build("gpt2").bfloat16()
    entry = parameters("affine", "mlp.1", WIDTH)
    old = model.transformer.h[1].mlp.c_proj
    layer = pysteer.bake(model, Plan.build([entry])).transformer.h[1].mlp.c_proj
    assert layer.weight.dtype == torch.bfloat16
    x = torch.randn(32, 4 * WIDTH)
    expected = moved(x @ old.weight.float() + old.bias.float(), entry, 1.0)
    # A weight is rounded once, by 2^-9 at most.
    assert (x @ layer.weight.float() + layer.bias.float() - expected).abs().max() < 1e-2 * expected.abs().max()


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
    [("block.1", "a residual stream"), ("embed", "weights shared by"), ("norm", "read by layers")],
)
def test_what_cannot_be_folded_is_named(site: str, why: str) -> None:
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    before = out(model)
    with pytest.raises(InputError, match=rf"site {site} cannot be folded.*{why}"):
        pysteer.bake(model, plan_for(model, [site]))
    assert torch.equal(out(model), before)


def with_options(op: str = "affine_shift", more: dict | None = None, **options) -> Plan:
    tensors = {"gain": torch.full((1, WIDTH), 1.5), "bias": torch.ones(1, WIDTH), **(more or {})}
    return Plan.build([SiteParameters("mlp.0", op, None, tensors, options)])


EDGE = torch.full((1, WIDTH), 3.0)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (with_options(more={"low": -EDGE, "high": EDGE}), "within a support .*fit with support 'all'"),
        (with_options(of_mean=True), "mean of a map.*of_mean=False"),
        (with_options(keep_norm=True), "keeps its length"),
        (
            with_options(more={"gate.weight": torch.stack((EDGE, -EDGE), 2)}, **{"gate.kind": "min_max"}),
            "a gate decides",
        ),
        (Plan([shift("mlp.0")], {"mlp.0": {0: (1.0, 0.0), 1: (0.5, 0.0)}}), "change with the step"),
        (Plan([shift("mlp.0")], {"mlp.0": {1: (1.0, 0.0)}}), "change with the step"),
    ],
)
def test_only_one_affine_map_for_all_tokens(plan: Plan, why: str) -> None:
    model = build("llama")
    with pytest.raises(InputError, match=rf"site mlp.0 cannot be folded.*{why}"):
        pysteer.bake(model, plan)


def test_prototypes_are_refused() -> None:
    source, target = torch.randn(40, WIDTH), torch.randn(40, WIDTH)
    method = Prototype(clusters=2)
    fit = method.fit_site(source, target)
    tensors = {name: tensor[None] for name, tensor in fit.tensors.items()}
    plan = Plan.build([SiteParameters("mlp.0", method.op, None, tensors, fit.options)])
    with pytest.raises(InputError, match="prototypes shift every token by its own"):
        pysteer.bake(build("llama"), plan)


def test_rows_and_tokens_cannot_differ() -> None:
    model, plan = build("llama"), Plan.build([shift("mlp.0")])
    with pytest.raises(InputError, match="strength of a baked plan"):
        pysteer.bake(model, plan, strength=torch.ones(2))
    with pytest.raises(InputError, match="positions of a baked plan"):
        pysteer.bake(model, plan, positions=slice(1, None))
    with pytest.raises(InputError, match="width 16"):
        pysteer.bake(model, Plan.build([shift("mlp.0", width=16)]))


def test_weights_that_cannot_be_changed() -> None:
    with pytest.raises(InputError, match="for which a Qwen2Config has no bias"):
        pysteer.bake(build("qwen2"), Plan.build([shift("mlp.0")]))
    quantised = build("gpt2")
    quantised.transformer.h[0].mlp.c_proj.weight.data = torch.zeros(4 * WIDTH, WIDTH, dtype=torch.float8_e4m3fn)
    with pytest.raises(InputError, match="quantised weights"):
        pysteer.bake(quantised, Plan.build([shift("mlp.0")]))
    away = build("gpt2").to("meta")
    with pytest.raises(InputError, match="not in memory"):
        pysteer.bake(away, Plan.build([shift("mlp.0")]))
    parametrized = build("llama")
    torch.nn.utils.parametrizations.weight_norm(parametrized.model.layers[0].mlp.down_proj)
    with pytest.raises(InputError, match=r"mlp\.0 cannot be folded"):
        pysteer.bake(parametrized, Plan.build([shift("mlp.0")]))
    # The norm of Cohere is read by attention and MLP at once, unlike its namesake in Llama.
    config = tf.CohereConfig(vocab_size=64, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
    with pytest.raises(InputError, match="read by layers that are not known"):
        pysteer.bake(tf.CohereForCausalLM(config).eval(), Plan.build([shift("model.layers.0.input_layernorm")]))
