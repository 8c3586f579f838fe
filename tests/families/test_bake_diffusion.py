"""Folding into diffusers models: at every kind of site the baked model does what a hook does, or it is refused."""

import copy
import re

import diffusers as df
import pytest
import tiny_diffusion as tiny
import torch
from diffusers.models import normalization as norms
from tiny_maps import Hooked, moved, parameters
from torch import Tensor, nn

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.steering import Plan, Site
from pysteer.steering.bake import _fold
from pysteer.steering.folding.maps import map_of
from pysteer.steering.folding.places import Places

S = 0.7
# What refuses an affine map, by the end of its path: residual streams, sums of several branches, projections without a
# bias, norms of query and key, and norms whose modulation is shared by all blocks.
REFUSED = {
    "unet": r"resnets\.\d|transformer_blocks\.\d|attentions\.\d|to_[qkv]",
    "sdxl_unet": r"resnets\.\d|transformer_blocks\.\d|attentions\.\d|to_[qkv]",
    "flux": r"(single_)?transformer_blocks\.\d|time_text_embed|norm(_added)?_[qk]",
    "sd3": r"transformer_blocks\.\d|time_text_embed",
    "pixart": r"transformer_blocks\.\d|norm[12]|norm_out",
    "sana": r"transformer_blocks\.\d|norm[12]|norm_out|norm_out\.norm|caption_norm|attn1\.to_[qkv]|ff|conv_point",
    "qwen": r"transformer_blocks\.\d|time_text_embed|txt_norm|norm(_added)?_[qk]",
}


def kinds(model) -> list[Site]:
    """One site of every kind: of a class, under a name, in a class."""
    found = {}
    for site in find_family(model).sites(model).values():
        stem, _, name = site.path.rpartition(".")
        classes = type(model.get_submodule(stem)).__name__, type(model.get_submodule(site.path)).__name__
        found.setdefault((*classes, "i" if name.isdigit() else name, site.element or 0), site)
    return list(found.values())


def baked_or_none(model, entry):
    """The model with `entry` folded in, None where its site is refused by name with what to do."""
    try:
        return pysteer.bake(model, Plan.build([entry], rows="both"), strength=S, inplace=True)
    except InputError as error:
        message = str(error)
    return None if f"site {entry.site} cannot be folded" in message and "fix: " in message else message


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


SWEEPS = [(name, kind) for name in REFUSED for kind in ("affine", "constant", "low_rank") if name != "sdxl_unet"]


@pytest.mark.parametrize(("name", "kind"), [*SWEEPS, ("sdxl_unet", "affine")])
def test_baked_equals_steered_at_every_kind_of_site(name: str, kind: str) -> None:
    model = tiny.DENOISERS[name]()
    twin, plain, changed = tiny.DENOISERS[name](), tiny.out(model, name), 0
    for site in kinds(model):
        entry = parameters(kind, site.name, site.width)
        refused = bool(re.search(rf"(^|\.)({REFUSED[name]})$", site.path))
        twin.load_state_dict(model.state_dict())
        baked = baked_or_none(twin, entry)
        if baked is None:
            assert torch.equal(tiny.out(twin, name), plain)
            assert kind == "low_rank" or refused, site
            continue
        assert kind != "affine" or not refused, site
        with Hooked(model.get_submodule(site.path), entry, site, S) as hooked:
            steered = tiny.out(model, name)
        assert hooked.calls > 0, site
        close(tiny.out(baked, name), steered)
        changed += int((steered - plain).abs().max() > 1e-5)
    assert changed > 10


def test_steer_and_bake_agree_on_several_sites_at_once() -> None:
    model = tiny.flux()
    known = find_family(model).sites(model)
    names = ["attn.0", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.norm1", "ff.0",
             "transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm2", "attn.1", "proj_out"]  # fmt: skip
    makes = ["affine", "low_rank", "affine", "low_rank", "affine", "affine", "low_rank", "affine"]
    entries = [
        parameters(kind, name, known[name].width, i) for i, (name, kind) in enumerate(zip(names, makes, strict=True))
    ]
    plan = Plan.build(entries, rows="both", strength=0.5) + Plan.build([entries[0]], rows="both", strength=0.2)
    plain = tiny.out(model, "flux")
    with pysteer.steer(model, plan, strength=1.5):
        steered = tiny.out(model, "flux")
    close(tiny.out(pysteer.bake(model, plan, strength=1.5), "flux"), steered)
    assert not torch.allclose(steered, plain, atol=1e-2)


MODULATED = {
    "AdaLayerNorm": (lambda: norms.AdaLayerNorm(8, output_dim=16, chunk_dim=1), ("temb",), (0,)),
    "AdaLayerNorm of a table": (lambda: norms.AdaLayerNorm(8, num_embeddings=4), ("timestep",), (0,)),
    "AdaGroupNorm": (lambda: norms.AdaGroupNorm(8, 8, 2), ("emb",), (0,)),
    "AdaLayerNormContinuous": (lambda: norms.AdaLayerNormContinuous(8, 8, elementwise_affine=False), ("",), (0,)),
    "AdaLayerNormZero": (lambda: norms.AdaLayerNormZero(8), ("emb",), (0,)),
    "AdaLayerNormZeroSingle": (lambda: norms.AdaLayerNormZeroSingle(8), ("emb",), (0,)),
    "SD35AdaLayerNormZeroX": (lambda: norms.SD35AdaLayerNormZeroX(8), ("emb",), (0, 5)),
    "CogVideoXLayerNormZero": (lambda: norms.CogVideoXLayerNormZero(8, 8), ("context", ""), (0, 1)),
    "CogView3Plus": (lambda: norms.CogView3PlusAdaLayerNormZeroTextImage(8, 8), ("context", ""), (0, 5)),
    "LuminaRMSNormZero": (lambda: norms.LuminaRMSNormZero(8, 1e-5, True), ("emb",), (0,)),
}


def run_norm(norm: nn.Module, needs: tuple[str, ...]) -> tuple[Tensor, ...]:
    shape = (2, 8, 3, 3) if isinstance(norm, norms.AdaGroupNorm) else (2, 5, 8)
    generator = torch.Generator().manual_seed(1)
    x, context, emb = (torch.randn(size, generator=generator) for size in (shape, (2, 4, 8), (2, 8)))
    values = {"context": context, "": emb, "timestep": torch.tensor(2)}
    unnamed = [values[name] for name in needs if name in ("context", "")]
    named = {name: values.get(name, emb) for name in needs if name not in ("context", "")}
    with torch.no_grad():
        result = norm(x, *unnamed, **named)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", MODULATED)
def test_chunks_of_modulated_norms(name: str, inside: bool) -> None:
    """Behind the modulation, and behind the norm in it."""
    torch.manual_seed(3)
    make, needs, elements = MODULATED[name]
    norm = make()
    if inside and (name == "CogView3Plus" or not hasattr(norm, "norm")):
        return
    kind = "gain" if name == "LuminaRMSNormZero" else "affine"
    layout = "channels" if name == "AdaGroupNorm" else "tokens"
    for element in (0,) if inside else elements:
        root = nn.ModuleDict({"block": nn.ModuleDict({"norm": make()})})
        root["block"]["norm"].load_state_dict(norm.state_dict())
        path = "block.norm.norm" if inside else "block.norm"
        site, entry = Site("here", path, "visual", element, layout, 8), parameters(kind, "here", 8)
        plain = run_norm(norm, needs)
        with Hooked(norm.norm if inside else norm, entry, site, S):
            steered = run_norm(norm, needs)
        with torch.no_grad():
            _fold(root, Places(root).edits(site, map_of(Plan.build([entry], rows="both").entries[0], 1, S, True)))
        for actual, expected in zip(run_norm(root["block"]["norm"], needs), steered, strict=True):
            close(actual, expected)
        assert not torch.allclose(plain[element], steered[element], atol=1e-2)


def test_dual_attention_and_class_conditions() -> None:
    """Blocks that the tiny models do not have: SD3.5's two attentions, DiT's `BasicTransformerBlock`."""
    torch.manual_seed(4)
    sd35 = df.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip
    dit = df.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
        out_channels=8, norm_num_groups=4,
    ).eval()  # fmt: skip
    latents = torch.randn(2, 4, 8, 8)
    labels = {"timestep": torch.tensor([5, 5]), "class_labels": torch.tensor([1, 2])}
    runs = {
        sd35: lambda model: tiny.out(model, "sd3"),
        dit: lambda model: model(latents, **labels, return_dict=False)[0].detach(),
    }
    sites = {
        sd35: ["norm1", "norm1.norm", "norm2", "attn2", "ff"],
        dit: ["norm1", "norm1.norm", "norm3", "attn1", "ff"],
    }
    for model, run in runs.items():
        known = find_family(model).sites(model)
        plain = run(model)
        for name in sites[model]:
            site = known[f"transformer_blocks.0.{name}"]
            for kind in ("affine", "low_rank") if name in ("attn1", "attn2", "ff") else ("affine",):
                entry = parameters(kind, site.name, site.width)
                with Hooked(model.get_submodule(site.path), entry, site, S):
                    steered = run(model)
                close(run(pysteer.bake(model, Plan.build([entry], rows="both"), strength=S)), steered)
                assert not torch.allclose(steered, plain, atol=1e-4)


def test_gated_activations_go_into_the_layer_that_reads_them() -> None:
    model = tiny.unet()
    path = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
    width = model.get_submodule(path).proj.out_features // 2
    for kind in ("affine", "low_rank"):
        site, entry = Site("act", path, "visual", None, "tokens", width), parameters(kind, "act", width)
        with Hooked(model.get_submodule(path), entry, site, S):
            steered = tiny.out(model, "unet")
        baked = tiny.unet()
        with torch.no_grad():
            _fold(baked, Places(baked).edits(site, map_of(Plan.build([entry], rows="both").entries[0], 1, S, True)))
        close(tiny.out(baked, "unet"), steered)
        assert not torch.allclose(steered, tiny.out(model, "unet"), atol=1e-3)


@pytest.mark.parametrize("kind", ["affine", "constant", "low_rank"])
def test_autoencoders(kind: str) -> None:
    model = tiny.vae()
    twin, latents, folded = tiny.vae(), torch.randn(2, 4, 8, 8), set()

    def run(vae) -> Tensor:
        with torch.no_grad():
            return vae.decode(vae.encode(vae.decode(latents).sample).latent_dist.mode()).sample

    for site in kinds(model):
        entry = parameters(kind, site.name, site.width)
        twin.load_state_dict(model.state_dict())
        baked = baked_or_none(twin, entry)
        if baked is None:
            continue
        with Hooked(model.get_submodule(site.path), entry, site, S):
            steered = run(model)
        close(run(baked), steered)
        folded.add(type(model.get_submodule(site.path)).__name__)
    wanted = {"Conv2d", "Linear"} | ({"GroupNorm"} if kind != "low_rank" else set())
    assert folded >= wanted | ({"ResnetBlock2D", "Attention"} if kind == "constant" else set())


PROMPTS = ["a red circle", "a blue square"]


def images(pipe) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.as_tensor(
        pipe(PROMPTS, generator=generator, num_inference_steps=2, height=16, width=16, output_type="np").images
    )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tiny.stable_diffusion, ["ff.1", "mid.0", "text.mlp.0", "text.block.1", "vae.decoder.conv_out"]),
        (tiny.flux_pipeline, ["attn.0", "transformer_blocks.0.norm2", "text.norm", "vae.decoder.resnet.0"]),
    ],
)
def test_a_baked_pipeline_needs_nothing_of_ours(make, names: list[str], tmp_path) -> None:
    pipe = make()
    pipe.vae.register_to_config(shift_factor=0.0)
    known = find_family(pipe).sites(pipe)
    residual = ("mid.0", "text.block.1", "vae.decoder.resnet.0")
    entries = [parameters("constant" if name in residual else "affine", name, known[name].width, i)
               for i, name in enumerate(names)]  # fmt: skip
    plan = Plan.build(entries, rows="both", strength=0.3)
    plain = images(pipe)
    with pysteer.steer(pipe, plan):
        steered = images(pipe)
    baked = pysteer.bake(pipe, plan)
    baked.save_pretrained(tmp_path)
    again = tiny.quiet(type(pipe).from_pretrained(tmp_path))
    torch.testing.assert_close(images(again), steered, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-2)
    assert torch.equal(images(pipe), plain)


def test_in_bf16_only_the_weights_are_rounded() -> None:
    model = tiny.unet().bfloat16()
    site = find_family(model).sites(model)["ff.1"]
    for kind in ("affine", "low_rank"):
        entry = parameters(kind, site.name, site.width)
        baked = pysteer.bake(model, Plan.build([entry], rows="both"), strength=S)
        layer, old = baked.get_submodule(f"{site.path}.net.2"), model.get_submodule(f"{site.path}.net.2")
        x = torch.randn(64, old.in_features, dtype=torch.bfloat16)
        expected = moved(copy.deepcopy(old).double()(x.double()), entry, S)
        # One rounding of each weight (2^-9) in a sum of rounded products: far inside 1e-2 of the size of the output.
        assert (layer(x).double() - expected).abs().max() < 1e-2 * (1 + expected.abs().max())


def test_what_diffusers_refuses_is_named() -> None:
    model = tiny.unet()
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(InputError, match=r"to_q cannot be folded.*no bias.*bake_lora"):
        pysteer.bake(model, Plan.build([parameters("affine", f"{attention}.to_q", 32)], rows="both"))
    with pytest.raises(InputError, match="different strengths for cond and uncond rows"):
        pysteer.bake(model, Plan.build([parameters("affine", "ff.0", 32)], rows="cond"))
    with pytest.raises(InputError, match=r"resnet.0 cannot be folded.*residual stream"):
        pysteer.bake(model, Plan.build([parameters("affine", "resnet.0", 32)], rows="both"))
    grouped = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=2)})
    change = map_of(Plan.build([parameters("low_rank", "conv", 8)]).entries[0], 1, S, False)
    with pytest.raises(InputError, match="grouped convolution"):
        Places(grouped).edits(Site("conv", "conv", "visual", None, "channels", 8), change)
    unknown = tiny.unet()
    unknown.set_attn_processor(type("Foreign", (df.models.attention_processor.AttnProcessor2_0,), {})())
    with pytest.raises(InputError, match=r"attn.0 cannot be folded.*does not end in one linear layer"):
        pysteer.bake(unknown, Plan.build([parameters("affine", "attn.0", 32)], rows="both"))
    fused = tiny.flux()
    fused.fuse_qkv_projections()
    with pytest.raises(InputError, match=r"to_q cannot be folded.*unfuse"):
        pysteer.bake(fused, Plan.build([parameters("affine", "transformer_blocks.0.attn.to_q", 32)], rows="both"))
