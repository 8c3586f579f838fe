"""Compiled, hooked, offloaded and adapted denoisers: steered as before, and no new graph for any change."""

import itertools

import accelerate
import pytest
import torch
import torch._dynamo
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from tiny_diffusion import flux, flux_pipeline, out, shift, stable_diffusion, unet
from torch import Tensor
from torch._dynamo.utils import counters

import pysteer
from pysteer.families.diffusers import set_timesteps
from pysteer.steering import Plan

UNET = ["ca.1", "attn.2", "block.0", "resnet.3", "mid.0", "time"]
FLUX = ["block.0", "context.0", "attn.1", "block.2", "context_ff.0"]
SMALL = {"height": 16, "width": 16, "max_sequence_length": 8}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(pipe, **settings) -> Tensor:
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    prompts = ["a red circle", "blue square"]
    settings = {"num_inference_steps": 2, **settings}
    return pipe(prompts, generator=noise, output_type="latent", **settings).images


def plan_for(sites: list[str], seed: int = 0) -> Plan:
    return Plan.build(
        [shift(site, 128 if site == "time" else 32, seed + i) for i, site in enumerate(sites)], strength=0.2
    )


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("sd", "wrapped", marks=pytest.mark.slow),
        ("sd", "in place later"),
        ("flux", "repeated blocks"),
        pytest.param("sd", "repeated blocks", marks=pytest.mark.slow),
        ("flux", "wrapped later"),
        pytest.param("flux", "in place", marks=pytest.mark.slow),
    ],
)
def test_fifty_changes_without_a_new_graph(how: str, name: str) -> None:
    pipe, sites, settings = (stable_diffusion(), UNET, {}) if name == "sd" else (flux_pipeline(), FLUX, SMALL)
    eager = stable_diffusion() if name == "sd" else flux_pipeline()
    part = "unet" if name == "sd" else "transformer"

    def compile_it() -> None:
        if "wrapped" in how:
            setattr(pipe, part, torch.compile(getattr(pipe, part), fullgraph=True, backend="eager"))
        elif "in place" in how:
            getattr(pipe, part).compile(fullgraph=True, backend="eager")
        else:
            getattr(pipe, part).compile_repeated_blocks(fullgraph=True, backend="eager")

    if "later" not in how:
        compile_it()
        plain = generate(pipe, **settings)
    with pysteer.steer(pipe, plan_for(sites)) as handle:
        if "later" in how:
            compile_it()
        seen = [generate(pipe, **settings)]
        with pysteer.steer(eager, plan_for(sites)):
            torch.testing.assert_close(seen[0], generate(eager, **settings), rtol=1e-4, atol=1e-4)
        handle.strength = 0.1
        generate(pipe, **settings)
        graphs = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("fail_on_recompile"):
            for change in range(1, 51):
                if change % 3 == 0:
                    handle.strength = 0.1 + 0.01 * change
                elif change % 3 == 1:
                    handle.strength = {"visual": torch.rand(2, 2)}
                else:
                    handle.update(plan_for(sites, change))
                seen.append(generate(pipe, **settings))
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert not counters["graph_break"]
    assert all(not torch.allclose(one, two) for one, two in itertools.pairwise(seen))
    assert handle.report()[0].steps == (0, 1)
    if "later" not in how:
        assert torch.equal(generate(pipe, **settings), plain)


@pytest.mark.slow
def test_roles_and_steps_in_a_compiled_pipeline() -> None:
    pipe, eager = stable_diffusion(), stable_diffusion()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    for rows, step in (("uncond", 1), ("cond", 0)):
        plan = Plan.build([shift("ca.1", steps=(step,))], rows=rows)
        with pysteer.steer(pipe, plan) as handle, pysteer.steer(eager, plan):
            torch.testing.assert_close(generate(pipe), generate(eager), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(generate(pipe), generate(pipe, guidance_scale=0.0), atol=1e-3)
        assert handle.report()[0].calls == 6


def test_a_compiled_denoiser_alone() -> None:
    model = unet()
    set_timesteps(model, [900, 500, 100])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = out(model, "unet")
    with pysteer.steer(compiled, Plan.build([shift("ca.0", steps=(1,))])):
        changed, same = out(compiled, "unet"), out(compiled, "unet", timestep=torch.tensor(100))
        torch.testing.assert_close(changed, out(model, "unet"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, out(model, "unet", timestep=torch.tensor(100)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


def accelerate_hook(model) -> None:
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    for module in list(model.modules())[1:]:
        if len(list(module.children())) == 0:
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def unhook(model) -> None:
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def group_offload(model) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


@pytest.mark.parametrize("hook", [accelerate_hook, group_offload])
@pytest.mark.parametrize("first", ["hook", "steering"])
def test_foreign_hooks(hook, first: str) -> None:
    for make, name, sites in ((unet, "unet", UNET), (flux, "flux", FLUX)):
        model = make()
        plan = plan_for(sites)
        plain = out(model, name)
        with pysteer.steer(model, plan):
            expected = out(model, name)
        if first == "hook":
            hook(model)
        with pysteer.steer(model, plan) as handle:
            if first != "hook":
                hook(model)
            torch.testing.assert_close(out(model, name), expected, rtol=1e-5, atol=1e-5)
        assert all(entry.calls == 1 for entry in handle.report())
        assert torch.equal(out(model, name), plain)
        assert not torch.allclose(expected, plain, atol=1e-3)
        if hook is accelerate_hook:
            unhook(model)
            assert torch.equal(out(model, name), plain)


def test_adapters() -> None:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    model = unet()
    bare, plan = (
        out(model, "unet"),
        Plan.build([shift("ca.1"), shift("mid_block.attentions.0.transformer_blocks.0.attn1.to_v")]),
    )
    torch.manual_seed(0)
    model.add_adapter(config)
    plain = out(model, "unet")
    assert not torch.allclose(plain, bare, atol=1e-4)
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_v
    seen = []
    with pysteer.steer(model, plan):
        hook = layer.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output.clone())))
        steered = out(model, "unet")
        hook.remove()
    entry = plan.parameters[1].tensors
    gain, bias = entry["gain"][0], entry["bias"][0]
    with torch.no_grad():
        torch.testing.assert_close(seen[0][1], layer(seen[0][0]) * gain + bias, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert torch.equal(out(model, "unet"), plain)
    model.disable_adapters()
    torch.testing.assert_close(out(model, "unet"), bare, rtol=1e-5, atol=1e-5)


def test_attention_processors_may_change() -> None:
    model = unet()
    with pysteer.steer(model, Plan.build([shift("ca.1"), shift("attn.0")])):
        steered = out(model, "unet")
        model.set_attn_processor(AttnProcessor())
        torch.testing.assert_close(out(model, "unet"), steered, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out(model, "unet"), steered, atol=1e-3)
