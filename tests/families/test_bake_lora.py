"""LoRAs of a plan: written, loaded by plain peft and diffusers, and the output is that of the steered model."""

import pytest
import tiny_diffusion as tiny
import torch
from tiny_language import WIDTH, build, out
from tiny_maps import parameters
from torch import Tensor

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.steering import Plan, SiteParameters

peft = pytest.importorskip("peft")


def plan_of(model, sites: dict[str, str], strength: float = 0.5) -> Plan:
    known = find_family(model).sites(model)
    entries = [parameters(kind, name, known[name].width, i) for i, (name, kind) in enumerate(sites.items())]
    return Plan.build(entries, rows="both", strength=strength)


def sparse(site: str, width: int, seed: int = 0) -> SiteParameters:
    """A map that scales three channels and shifts all."""
    entry = parameters("constant", site, width, seed)
    entry.tensors["gain"][:, [1, 5, 8]] = torch.tensor([0.2, 1.9, -1.0])
    return entry


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("llama", {"attn.1": "low_rank", "mlp.0": "constant", "block.2": "constant",
                   "model.layers.1.input_layernorm": "low_rank",
                   "model.layers.0.post_attention_layernorm": "constant"}),
        ("gpt2", {"mlp.1": "low_rank", "transformer.h.0.ln_1": "low_rank", "attn.0": "constant"}),
        ("clip", {"mlp.1": "low_rank", "encoder.layers.0.layer_norm2": "constant"}),
        ("qwen2", {"mlp.1": "low_rank", "attn.0": "low_rank"}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:.*fan_in_fan_out.*")
def test_peft_loads_it(name: str, sites: dict[str, str], tmp_path) -> None:
    model = build(name)
    plan = plan_of(model, sites)
    plan = plan + Plan.build([sparse("mlp.0", WIDTH)], strength=0.5)
    plain = out(model)
    with pysteer.steer(model, plan, strength=1.2):
        steered = out(model)
    lora = pysteer.bake_lora(model, plan, strength=1.2)
    assert not lora.errors
    lora.save_pretrained(tmp_path)
    assert torch.equal(out(model), plain)
    loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    torch.testing.assert_close(out(loaded), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-2)
    again = build(name)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(out(again.eval()), steered, rtol=1e-4, atol=1e-5)


def test_factors_are_as_thin_as_the_map() -> None:
    model = build("gpt2")
    plan = plan_of(model, {"mlp.1": "low_rank", "attn.0": "constant"})
    layers = pysteer.bake_lora(model, plan).layers[""]
    assert {path: layer.rank for path, layer in layers.items()} == {
        "transformer.h.1.mlp.c_proj": 2,
        "transformer.h.0.attn.c_proj": 1,
    }
    thin = pysteer.bake_lora(model, Plan.build([sparse("mlp.1", WIDTH)])).layers[""]["transformer.h.1.mlp.c_proj"]
    assert thin.rank == 3
    old = model.transformer.h[1].mlp.c_proj
    baked = pysteer.bake(model, Plan.build([sparse("mlp.1", WIDTH)])).transformer.h[1].mlp.c_proj
    torch.testing.assert_close(thin.up @ thin.down, (baked.weight - old.weight).T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(thin.bias, baked.bias - old.bias)


def test_gains_of_all_channels_need_a_rank_that_the_user_gives(tmp_path) -> None:
    model = build("gpt2")
    plan = plan_of(model, {"mlp.1": "affine"}, 1.0)
    with pytest.raises(InputError, match=r"site mlp.1 cannot be folded.*rank 32 of 32 x 128.*rank=\.\.\."):
        pysteer.bake_lora(model, plan)
    path = "transformer.h.1.mlp.c_proj"
    change = (pysteer.bake(model, plan).get_submodule(path).weight - model.get_submodule(path).weight).T.detach()
    errors = []
    for rank in (4, 16, 31):
        lora = pysteer.bake_lora(model, plan, rank=rank)
        layer = lora.layers[""][path]
        assert layer.rank == rank
        left = torch.linalg.norm(change - layer.up @ layer.down) / torch.linalg.norm(change)
        assert lora.errors == {path: pytest.approx(float(left), rel=1e-3)}
        errors.append(float(left))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 < errors[0]
    assert not pysteer.bake_lora(model, plan, rank=64).errors  # no more than it needs
    with pytest.raises(InputError, match="rank of a LoRA"):
        pysteer.bake_lora(model, plan, rank=0)


@pytest.mark.parametrize(
    ("site", "kind", "why"),
    [
        ("norm", "constant", "a LoRA cannot hold"),
        ("embed", "constant", "a LoRA cannot hold"),
        ("block.1", "low_rank", "residual stream"),
    ],
)
def test_what_a_lora_cannot_hold_is_named(site: str, kind: str, why: str) -> None:
    model = build("llama")
    with pytest.raises(InputError, match=f"site {site} cannot be folded.*{why}"):
        pysteer.bake_lora(model, plan_of(model, {site: kind}))


def test_a_plan_of_strength_zero_is_no_lora() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="changes nothing"):
        pysteer.bake_lora(model, plan_of(model, {"mlp.1": "low_rank"}), strength=0.0)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
DENOISERS = {
    "unet": {"ff.1": "low_rank", "attn.0": "constant", f"{BLOCK}.attn1.to_q": "low_rank", f"{BLOCK}.norm1": "low_rank",
             f"{BLOCK}.norm3": "constant", "down.0.0": "constant", "resnet.1": "constant", "conv_in": "low_rank"},
    "flux": {"attn.0": "low_rank", "context_attn.0": "constant", "transformer_blocks.0.norm1": "constant",
             "attn.1": "low_rank",
             "proj_out": "low_rank", "single_transformer_blocks.0.norm": "low_rank"},
    "sd3": {"attn.0": "low_rank", "ff.1": "low_rank", "transformer_blocks.1.norm1": "constant"},
    "sana": {"attn.0": "low_rank", "ca.1": "constant", "time_embed.linear": "low_rank"},
    "qwen": {"context_attn.0": "low_rank", "ff.1": "constant", "transformer_blocks.0.img_mod.1": "low_rank"},
}  # fmt: skip


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_denoisers_of_diffusers_load_it(name: str, tmp_path) -> None:
    model = tiny.DENOISERS[name]()
    plan = plan_of(model, DENOISERS[name])
    plain = tiny.out(model, name)
    with pysteer.steer(model, plan):
        steered = tiny.out(model, name)
    lora = pysteer.bake_lora(model, plan)
    lora.save_pretrained(tmp_path)
    again = tiny.DENOISERS[name]()
    (part,) = lora.layers
    again.load_lora_adapter(str(tmp_path), prefix=part, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(tiny.out(again, name), steered, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-2)


def latents(pipe) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe(["a red circle", "a blue square"], generator=generator, **given).images


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (tiny.stable_diffusion, {"ff.1": "low_rank", "mid.0": "constant", "text.mlp.0": "low_rank",
                                 "text.block.1": "constant"}),
        (tiny.flux_pipeline, {"attn.0": "low_rank", "ff.0": "constant", "text.attn.1": "low_rank"}),
        (tiny.sdxl_pipeline, {"ff.1": "low_rank", "text.mlp.0": "constant", "text_2.mlp.1": "low_rank"}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_pipelines_load_it(make, sites: dict[str, str], tmp_path) -> None:
    pipe = make()
    plan = plan_of(pipe, sites, 0.3)
    plain = latents(pipe)
    with pysteer.steer(pipe, plan):
        steered = latents(pipe)
    pysteer.bake_lora(pipe, plan).save_pretrained(tmp_path)
    again = make()
    again.load_lora_weights(str(tmp_path))
    assert (latents(again) - steered).abs().max() < 1e-4 * steered.abs().max()
    assert not torch.allclose(steered, plain, atol=1e-2)


def test_parts_that_the_loader_of_a_pipeline_leaves_out() -> None:
    pipe = tiny.stable_diffusion()
    with pytest.raises(InputError, match="the vae of a StableDiffusionPipeline, whose loader takes unet"):
        pysteer.bake_lora(pipe, plan_of(pipe, {"vae.decoder.conv_out": "low_rank"}))
    alone = tiny.pixart()
    with pytest.raises(InputError, match="a PixArtTransformer2DModel, which has no loader for a LoRA"):
        pysteer.bake_lora(alone, plan_of(alone, {"attn.0": "low_rank"}))
