"""Every site of the denoisers and the autoencoder steers as the formula says, and leaves the model as it was."""

import pytest
import torch
from tiny_diffusion import DENOISERS, SIDE, Plain, out, shift, tokens, vae

import pysteer
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.families.diffusers import set_timesteps
from pysteer.families.diffusion_sites import streams
from pysteer.steering import Plan

KINDS = {
    "unet": ("time", "resnet", "attn", "ca", "ff", "block", "down.0.0", "mid.0", "up.1.1"),
    "sdxl_unet": ("resnet", "ca", "block", "mid.0"),
    "flux": ("time", "attn", "context_attn", "ff", "context_ff", "block", "context"),
    "sd3": ("time", "attn", "context_attn", "ff", "context_ff", "block", "context"),
    "pixart": ("time", "attn", "ca", "ff", "block"),
    "sana": ("time", "attn", "ca", "ff", "block"),
    "qwen": ("time", "attn", "context_attn", "ff", "context_ff", "block", "context"),
}
PATHS = {
    "unet": ("conv_in", "down_blocks.0.resnets.0.time_emb_proj", "mid_block.attentions.0.norm", "conv_norm_out",
             "down_blocks.0.attentions.0.transformer_blocks.0.norm2", "up_blocks.1.attentions.1.proj_in"),
    "sdxl_unet": ("add_embedding", "mid_block.attentions.0.proj_out"),
    "flux": ("transformer_blocks.0:0", "transformer_blocks.0:1", "transformer_blocks.0.norm1", "norm_out",
             "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.0.norm.linear", "x_embedder"),
    "sd3": ("transformer_blocks.0.attn.to_q", "pos_embed.proj"),
    "pixart": ("adaln_single.linear", "caption_projection.linear_2"),
    "sana": ("transformer_blocks.1.ff.conv_inverted", "caption_norm", "transformer_blocks.0.norm2"),
    "qwen": ("transformer_blocks.0.img_mod.1", "txt_norm"),
}  # fmt: skip


def chosen_sites(name: str, model) -> list[str]:
    """One or two of each kind, and some by path."""
    known = find_family(model).sites(model)
    found = [*PATHS[name]]
    for kind in KINDS[name]:
        numbered = [site for site in known if site.rpartition(".")[0] == kind and site.rpartition(".")[2].isdigit()]
        found += [kind] if not numbered else dict.fromkeys((numbered[0], numbered[-1]))
    return found


@pytest.mark.parametrize("name", DENOISERS)
def test_sites_steer_as_the_formula_says(name: str) -> None:
    model = DENOISERS[name]()
    known = find_family(model).sites(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    plain = out(model, name)
    for i, site in enumerate(chosen_sites(name, model)):
        where = known[site]
        parameters = shift(site, where.width, i)
        with Plain(model.get_submodule(where.path), parameters, where.element, where.layout):
            expected = out(model, name)
        with pysteer.steer(model, Plan.build([parameters])) as handle:
            steered = out(model, name)
            handle.strength = 0.0
            assert torch.equal(out(model, name), plain)
        torch.testing.assert_close(
            steered, expected, rtol=1e-5, atol=1e-5, msg=lambda text, site=site: f"{site} {text}"
        )
        assert not torch.allclose(steered, plain, atol=1e-5), site
        assert handle.report()[0].calls == 2
    assert torch.equal(out(model, name), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == types
    assert not model._forward_pre_hooks


def test_numbers_follow_the_order_of_execution() -> None:
    model = DENOISERS["unet"]()
    sites = find_family(model).sites(model)
    for kind in ("resnet", "ca"):
        ran = []
        paths = {model.get_submodule(site.path): name for name, site in sites.items() if name.startswith(f"{kind}.")}
        hooks = [m.register_forward_hook(lambda m, *rest, paths=paths, ran=ran: ran.append(paths[m])) for m in paths]
        out(model, "unet")
        for hook in hooks:
            hook.remove()
        assert ran == list(paths.values()) == [f"{kind}.{i}" for i in range(len(paths))]
        assert len(ran) > 3


def test_tokens_touched_and_rows_of_their_own() -> None:
    model = DENOISERS["flux"]()
    strength = torch.tensor([0.0, 1.0, -0.5])
    with pysteer.steer(model, Plan.build([shift("block.0"), shift("context.0", seed=1)]), strength=strength) as handle:
        together = out(model, "flux", 3)
    assert [entry.tokens_touched for entry in handle.report()] == [2 * 16, 2 * 5]
    plain = out(model, "flux", 3)
    torch.testing.assert_close(together[0], plain[0], rtol=1e-6, atol=1e-6)
    with pysteer.steer(model, Plan.build([shift("block.0"), shift("context.0", seed=1)]), strength=-0.5):
        alone = out(model, "flux", 3)
    torch.testing.assert_close(together[2], alone[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1:], plain[1:], atol=1e-3)


@pytest.mark.parametrize("direction", ["encoder", "decoder"])
def test_autoencoder(direction: str) -> None:
    model = vae()
    family = find_family(model)
    assert (family.name, family.steps(model, "vae")) == ("diffusers", 1)
    known = family.sites(model)
    x = tokens(2, 3 if direction == "encoder" else 4, SIDE * SIDE, 1).view(2, -1, SIDE, SIDE)

    @torch.no_grad()
    def run():
        return model.encode(x).latent_dist.mean if direction == "encoder" else model.decode(x).sample

    plain = run()
    conv = "vae.quant_conv" if direction == "encoder" else "vae.post_quant_conv"
    names = [
        f"vae.{direction}.resnet.0",
        f"vae.{direction}.attn.0",
        f"vae.{direction}.mid_block.attentions.0.to_q",
        conv,
    ]
    for site in names:
        parameters, where = shift(site, known[site].width), known[site]
        with Plain(model.get_submodule(where.path), parameters, where.element, where.layout):
            expected = run()
        with pysteer.steer(model, Plan.build([parameters])):
            steered = run()
        torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(steered, plain, atol=1e-4)
    assert torch.equal(run(), plain)


def test_a_denoiser_alone_has_the_steps_it_is_told() -> None:
    model = DENOISERS["unet"]()
    family = find_family(model)
    assert family.steps(model, "visual") == 1
    with pytest.raises(InputError, match=r"step of site ca.0: got 2; allowed: 0..0"):
        pysteer.steer(model, Plan.build([shift("ca.0", steps=(2,))]))
    set_timesteps(model, [900, 600, 300])
    assert family.steps(model, "visual") == 3
    plain = out(model, "unet", timestep=300)
    with pysteer.steer(model, Plan.build([shift("ca.0", steps=(2,))])) as handle:
        same, changed = out(model, "unet", timestep=torch.tensor([600, 600])), out(model, "unet", timestep=300)
    assert torch.equal(same, out(model, "unet", timestep=600))
    assert not torch.allclose(changed, plain, atol=1e-4)
    assert handle.report()[0].steps == (1, 2)
    with pytest.raises(InputError, match="timesteps"):
        set_timesteps(model, [])


def test_divided_and_doubled_timesteps_are_found() -> None:
    model = DENOISERS["flux"]()
    set_timesteps(model, torch.tensor([1000.0, 750.0, 750.0, 500.0, 1.0]))
    clock = find_family(model).clock(model, "visual")
    seen = []
    with pysteer.steer(model, Plan.build([shift("block.0")])):
        for timestep in (1000.0, 750.0, 500.0, 1.0):
            for dtype in (torch.float32, torch.bfloat16):
                out(model, "flux", timestep=torch.full((2,), timestep).to(dtype) / 1000)
                seen.append(int(clock))
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]


def test_streams_are_read_from_the_code() -> None:
    model = DENOISERS["flux"]()
    assert streams(type(model.transformer_blocks[0])) == (1, 0)
    assert streams(type(model.single_transformer_blocks[0])) == (1, 0)
    assert streams(type(DENOISERS["pixart"]().transformer_blocks[0])) == (None, None)


def test_bad_input() -> None:
    model = DENOISERS["unet"]()
    with pytest.raises(InputError, match=r"unknown site.*resnet\.0\.\.7.*did you mean down_blocks"):
        pysteer.steer(model, Plan.build([shift("down_blocks.0")]))
    with (
        pytest.raises(InputError, match=r"ca\.0 \(width 32\) do not fit"),
        pysteer.steer(model, Plan.build([shift("ca.0", 16)])),
    ):
        pass
    with pytest.raises(InputError, match="part of"):
        find_family(model).root(model, "text")
    model.fuse_qkv_projections()
    with (
        pytest.raises(InputError, match="fused"),
        pysteer.steer(model, Plan.build([shift("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v")])),
    ):
        pass
