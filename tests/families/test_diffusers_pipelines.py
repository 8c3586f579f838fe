"""Steering inside pipelines: which rows, which steps, text encoders, autoencoder, and what pipelines can do besides."""

import diffusers as df
import pytest
import torch
from tiny_diffusion import (
    WIDTH,
    Plain,
    flux_pipeline,
    pixart_pipeline,
    sd3_pipeline,
    sdxl_pipeline,
    shift,
    stable_diffusion,
)
from torch import Tensor

import pysteer
from pysteer.capture import Recorder
from pysteer.capture.taps import choose_sites
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.steering import Plan

PROMPTS = ["a red circle", "blue square"]
SMALL = {"height": 16, "width": 16}
FLUX = {**SMALL, "max_sequence_length": 8}
MAKERS = {
    "sd": (stable_diffusion, {}, "ca.1"),
    "sdxl": (sdxl_pipeline, {}, "ca.1"),
    "flux": (flux_pipeline, FLUX, "block.1"),
    "sd3": (sd3_pipeline, SMALL, "block.0"),
    "pixart": (pixart_pipeline, {**FLUX, "use_resolution_binning": False, "clean_caption": False}, "ca.0"),
}


def generate(pipe, prompts=PROMPTS, steps: int = 2, **settings) -> Tensor:
    count = len(prompts) * settings.get("num_images_per_prompt", 1)
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    settings = {"output_type": "latent", **settings}
    return pipe(list(prompts), num_inference_steps=steps, generator=noise, **settings).images


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def hooked(pipe, parameters, chosen, run) -> Tensor:
    where = find_family(pipe).sites(pipe)[parameters.site]
    module = denoiser(pipe).get_submodule(where.path)
    with Plain(module, parameters, where.element, where.layout, chosen):
        return run()


def second_half(rows: int, call: int) -> Tensor:
    return (torch.arange(rows) >= rows // 2).float()


def first_half(rows: int, call: int) -> Tensor:
    return 1 - second_half(rows, call)


@pytest.mark.parametrize("name", MAKERS)
def test_conditional_rows_are_steered_and_no_others(name: str) -> None:
    make, settings, site = MAKERS[name]
    pipe = make()
    kind = type(pipe)
    plain, parameters = generate(pipe, **settings), shift(site)
    guided = name != "flux"
    choices = {"cond": second_half if guided else None, "uncond": first_half, "both": None}
    for rows, chosen in choices.items():
        if rows == "uncond" and not guided:
            continue
        expected = hooked(pipe, parameters, chosen, lambda: generate(pipe, **settings))
        with pysteer.steer(pipe, Plan.build([parameters], rows=rows)) as handle:
            steered = generate(pipe, **settings)
            handle.strength = 0.0
            assert torch.equal(generate(pipe, **settings), plain)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(steered, plain, atol=1e-3)
        entry = handle.report()[0]
        assert (entry.calls, entry.steps) == (4, (0, 1))
        assert type(pipe) is kind
    assert torch.equal(generate(pipe, **settings), plain)


def test_only_planned_rows_change_at_the_site() -> None:
    pipe = stable_diffusion()
    seen = {}
    for rows in ("none", "cond", "uncond"):
        plan = Plan.build([shift("ca.1", steps=(0,))], rows="cond" if rows == "none" else rows)
        with (
            pysteer.steer(pipe, plan, strength=0.0 if rows == "none" else 1.0),
            Recorder(pipe, "ca.1", steps=[0], rows="all") as recorder,
        ):
            generate(pipe, steps=1)
        seen[rows] = recorder.get("ca.1", 0)
    assert torch.equal(seen["cond"][:2], seen["none"][:2])
    assert torch.equal(seen["uncond"][2:], seen["none"][2:])
    assert not torch.allclose(seen["cond"][2:], seen["none"][2:], atol=1e-3)
    assert not torch.allclose(seen["uncond"][:2], seen["none"][:2], atol=1e-3)


def test_true_guidance_runs_twice_a_step() -> None:
    pipe = flux_pipeline()
    settings = {**FLUX, "true_cfg_scale": 3.0, "negative_prompt": ["ugly", "blurry"]}
    plain, parameters = generate(pipe, **settings), shift("block.1")
    for rows, turn in (("cond", 0), ("uncond", 1)):
        chosen = lambda n, call, turn=turn: torch.full((n,), float(call % 2 == turn))  # noqa: E731
        expected = hooked(pipe, parameters, chosen, lambda: generate(pipe, **settings))
        with pysteer.steer(pipe, Plan.build([parameters], rows=rows)):
            steered = generate(pipe, **settings)
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(steered, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_without_and_with_distilled_guidance_all_rows_are_conditional(name: str) -> None:
    pipe = stable_diffusion() if name == "sd" else flux_pipeline(guided=True)
    settings = {"guidance_scale": 0.0} if name == "sd" else {**FLUX, "guidance_scale": 3.5}
    parameters = shift(MAKERS[name][2])
    plain = generate(pipe, **settings)
    expected = hooked(pipe, parameters, None, lambda: generate(pipe, **settings))
    with pysteer.steer(pipe, Plan.build([parameters])):
        steered = generate(pipe, **settings)
        with_guidance = generate(pipe) if name == "sd" else None
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-3)
    if with_guidance is not None:
        torch.testing.assert_close(
            with_guidance, hooked(pipe, parameters, second_half, lambda: generate(pipe)), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_images_are_settings_of_their_own(name: str) -> None:
    make, settings, site = MAKERS[name]
    pipe, parameters = make(), shift(site)
    strength = torch.tensor([0.0, 1.0, -0.5, 2.0])
    many = {**settings, "num_images_per_prompt": 2}
    chosen = lambda n, call: torch.cat((torch.zeros(4), strength))  # noqa: E731
    expected = hooked(pipe, parameters, chosen, lambda: generate(pipe, **many))
    with pysteer.steer(pipe, Plan.build([parameters]), strength={"visual": strength}) as handle:
        together = generate(pipe, **many)
        assert torch.allclose(together[0], generate(pipe, **many)[0])
        with pytest.raises(InputError, match="entries of strength"):
            generate(pipe, **settings)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = generate(pipe, **many)
    torch.testing.assert_close(together[0], plain[0], rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert all(not torch.allclose(together[i], plain[i], atol=1e-3) for i in (1, 2, 3))
    assert handle.report()[0].tokens_touched % 3 == 0


SCHEDULERS = {
    "ddim": lambda: None,
    "euler": lambda: df.EulerDiscreteScheduler(steps_offset=1),
    "heun": lambda: df.HeunDiscreteScheduler(steps_offset=1),
    "pndm": lambda: df.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "dpm": lambda: df.DPMSolverMultistepScheduler(steps_offset=1),
}


@pytest.mark.parametrize("name", [*SCHEDULERS, "flux", "sd3"])
def test_the_effect_begins_exactly_at_its_step(name: str) -> None:
    if name in SCHEDULERS:
        pipe, settings, site = stable_diffusion(SCHEDULERS[name]()), {}, "ca.0"
    else:
        make, settings, site = MAKERS[name]
        pipe = make()
    steps, begin = 5, 2
    latents = {}

    def run(key: str) -> None:
        latents[key] = []

        def keep(pipe, i, t, tensors):
            latents[key].append((float(t), tensors["latents"].clone()))
            return {}

        generate(pipe, steps=steps, callback_on_step_end=keep, **settings)

    run("plain")
    plan = Plan([shift(site)], {site: dict.fromkeys(range(begin, steps), (1.0, 0.0))})
    with pysteer.steer(pipe, plan) as handle:
        run("steered")
    distinct = list(dict.fromkeys(t for t, _ in latents["plain"]))
    assert len(distinct) == steps
    for (t, before), (_, after) in zip(latents["plain"], latents["steered"], strict=True):
        assert torch.equal(before, after) == (distinct.index(t) < begin), t
    assert handle.report()[0].steps == tuple(range(steps))


def test_more_steps_than_there_was_room_for() -> None:
    pipe = stable_diffusion()
    with pysteer.steer(pipe, Plan.build([shift("ca.0", steps=(1, 60))])) as handle:
        short = generate(pipe, steps=2)
        generate(pipe, prompts=PROMPTS[:1], steps=70, guidance_scale=0.0)
        assert torch.equal(generate(pipe, steps=2), short)
        handle.strength = torch.rand(2, 2)
        generate(pipe, steps=2)
        with pytest.raises(InputError, match="steps of strength"):
            generate(pipe, steps=3)
    assert not torch.equal(generate(pipe, steps=2), short)
    assert max(handle.report()[0].steps) == 69


@pytest.mark.parametrize("part", ["text", "text_2", "text_3"])
def test_text_encoders(part: str) -> None:
    pipe = {"text": stable_diffusion, "text_2": sdxl_pipeline, "text_3": flux_pipeline}[part]()
    part, site, settings = ("text_2", "text_2.output", FLUX) if part == "text_3" else (part, f"{part}.output", {})
    plain = generate(pipe, **settings)
    sites = find_family(pipe).sites(pipe)
    encoder = pipe.text_encoder if part == "text" else pipe.text_encoder_2
    where, parameters = sites[site], shift(site)
    first = lambda n, call: torch.full((n,), float(call == 0))  # noqa: E731  (the second is the negative prompt)
    with Plain(encoder.get_submodule(where.path), parameters, where.element, "tokens", first, replace=True):
        expected = generate(pipe, **settings)
    with pysteer.steer(pipe, Plan.build([parameters])) as handle:
        steered = generate(pipe, **settings)
    size = expected.abs().max()  # hundreds, of which single numbers are small differences
    torch.testing.assert_close(steered / size, expected / size, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert handle.report()[0].tokens_touched == 2 * (8 if settings else 16)
    assert torch.equal(generate(pipe, **settings), plain)


def test_padding_that_is_masked_is_left_alone() -> None:
    make, settings, _ = MAKERS["pixart"]
    pipe = make()
    with pysteer.steer(pipe, Plan.build([shift("text.block.0")])) as handle:
        generate(pipe, **settings)
    assert handle.report()[0].tokens_touched == 4 + 3  # words and the end of both prompts


def test_autoencoder_of_a_pipeline() -> None:
    pipe = stable_diffusion()
    plain = generate(pipe, output_type="pt")
    with pysteer.steer(pipe, Plan.build([shift("vae.decoder.resnet.1", 16)])) as handle:
        steered = generate(pipe, output_type="pt")
    assert not torch.allclose(plain, steered, atol=1e-3)
    assert handle.report()[0].calls == 1
    assert torch.equal(generate(pipe, output_type="pt"), plain)


def test_patterns_over_all_parts() -> None:
    pipe = stable_diffusion()
    family = find_family(pipe)
    paths = {site.path for site in choose_sites(family, pipe, r".*attn2")}
    assert paths == {path for path, _ in pipe.unet.named_modules() if path.endswith("attn2")}
    assert {site.part for site in choose_sites(family, pipe, r".*norm.*")} == {"visual", "text", "vae"}
    assert len(choose_sites(family, pipe, "ca")) == 4
    with pytest.raises(InputError, match="unknown site"):
        choose_sites(family, pipe, ".*nothing")


def test_settings_of_a_pipeline_keep_working() -> None:
    pipe = stable_diffusion()
    settings = {"guidance_rescale": 0.5}
    plain = generate(pipe, **settings)
    order = []
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    first = module.register_forward_hook(lambda *a: order.append("before"))
    parameters = shift("ca.1")
    seen = []
    with pysteer.steer(pipe, Plan.build([parameters])):
        second = module.register_forward_hook(lambda m, args, output: seen.append(output.clone()))
        steered = generate(pipe, **settings)
    first.remove()
    second.remove()
    expected = hooked(pipe, parameters, second_half, lambda: generate(pipe, **settings))
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-3)
    assert len(order) == len(seen) == 2
    for form in (torch.channels_last, torch.contiguous_format):
        pipe.unet.to(memory_format=form)
        with pysteer.steer(pipe, Plan.build([parameters, shift("resnet.2"), shift("mid.0")])):
            results = generate(pipe, **settings)
        pipe.unet.to(memory_format=torch.contiguous_format)
        with pysteer.steer(pipe, Plan.build([parameters, shift("resnet.2"), shift("mid.0")])):
            torch.testing.assert_close(generate(pipe, **settings), results, rtol=1e-3, atol=1e-3)


def test_encoded_prompts_and_negative_ones() -> None:
    pipe = stable_diffusion()
    cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["ugly", "ugly"])
    parameters = shift("ca.0")

    def run(**more):
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(prompt_embeds=cond, generator=noise, num_inference_steps=2, output_type="latent", **more).images

    expected = hooked(pipe, parameters, second_half, lambda: run(negative_prompt_embeds=uncond))
    with pysteer.steer(pipe, Plan.build([parameters])):
        torch.testing.assert_close(run(negative_prompt_embeds=uncond), expected, rtol=1e-4, atol=1e-4)
    with pysteer.steer(pipe, Plan.build([shift("text.output")], rows="cond")):
        same = run(negative_prompt=["ugly", "ugly"])
    torch.testing.assert_close(same, run(negative_prompt_embeds=uncond), rtol=1e-5, atol=1e-5)
    with pysteer.steer(pipe, Plan.build([shift("text.output")], rows="uncond")):
        assert not torch.allclose(run(negative_prompt=["ugly", "ugly"]), same, atol=1e-3)


def test_twenty_times_on_and_off_and_saving_in_between(tmp_path) -> None:
    pipe = stable_diffusion()
    plain, kind = generate(pipe, steps=1), type(pipe)
    state = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    types = [type(module) for module in pipe.unet.modules()]
    plan = Plan.build([shift("ca.0"), shift("mid.0"), shift("text.output"), shift("resnet.0")])
    for _ in range(20):
        with pysteer.steer(pipe, plan, strength=0.5):
            assert set(pipe.unet.state_dict()) == set(state)
    with pysteer.steer(pipe, plan):
        steered = generate(pipe, steps=1)
        pipe.save_pretrained(tmp_path)
    assert type(pipe) is kind
    assert [type(module) for module in pipe.unet.modules()] == types
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (*pipe.unet.modules(), *pipe.vae.modules()))
    assert hooks == 0
    assert all(torch.equal(value, state[key]) for key, value in pipe.unet.state_dict().items())
    assert torch.equal(generate(pipe, steps=1), plain)
    again = df.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert not torch.allclose(steered, plain, atol=1e-3)


def test_a_loop_of_the_users_own() -> None:
    pipe = stable_diffusion()
    pipe.scheduler.set_timesteps(4)
    text = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    strength = torch.tensor([0.0, 0.0, 1.0, 1.0])
    with torch.no_grad(), pysteer.steer(pipe, Plan.build([shift("ca.0", steps=(2,))]), strength=strength) as handle:
        outs = [pipe.unet(x, t, encoder_hidden_states=text).sample for t in pipe.scheduler.timesteps]
        handle.strength = 0.0
        plain = [pipe.unet(x, t, encoder_hidden_states=text).sample for t in pipe.scheduler.timesteps]
    for step, (a, b) in enumerate(zip(outs, plain, strict=True)):
        assert torch.equal(a[:2], b[:2])
        assert torch.equal(a[2:], b[2:]) == (step != 2)


def test_guidance_of_more_than_two_kinds_is_refused() -> None:
    pipe = stable_diffusion()
    pag = df.StableDiffusionPAGPipeline(**{**pipe.components, "feature_extractor": None}, pag_applied_layers=["mid"],
                                        requires_safety_checker=False)  # fmt: skip
    pag.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="rows of the denoiser"), pysteer.steer(pag, Plan.build([shift("ca.0")])):
        generate(pag, steps=1)
