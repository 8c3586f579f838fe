"""ImageGenerator: prompts to images, and fitting, recording and locating with a pipeline of diffusers."""

import pytest
import torch
from tiny_diffusion import flux_pipeline, pixart_pipeline, stable_diffusion

import pysteer
from pysteer.capture import Recorder
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.methods import LinearAcT, MeanDifference
from pysteer.models.diffusion import ImageGenerator

RED, BLUE = ["a red circle", "the red square"], ["a blue circle", "the blue square"]
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    return ImageGenerator(stable_diffusion())


def test_an_image_does_not_depend_on_its_batch(generator: ImageGenerator) -> None:
    out = generator(RED + BLUE, seeds=[3, 4, 5, 4], **FAST)
    assert (out.images.shape, out.images.dtype) == ((4, 8, 8, 3), torch.uint8)
    assert out.latents.shape == (4, 4, 8, 8)
    parts = generator(RED + BLUE, seeds=[3, 4, 5, 4], batch_size=3, **FAST)
    torch.testing.assert_close(parts.latents, out.latents, rtol=1e-4, atol=1e-4)
    alone = generator(RED[1], seeds=4, decode=False, **FAST)
    assert alone.images is None
    torch.testing.assert_close(alone.latents, out.latents[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out.latents[0], out.latents[1], atol=1e-2)
    negative = generator(RED, negative_prompts="ugly", decode=False, **FAST)
    assert not torch.allclose(negative.latents, generator(RED, decode=False, **FAST).latents, atol=1e-4)


def test_a_callback_of_the_users_own_is_called_first(generator: ImageGenerator) -> None:
    seen = []

    def double(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": 2 * tensors["latents"]}

    plain = generator(RED, **FAST)
    out = generator(RED, callback_on_step_end=double, **FAST)
    assert seen == [0, 1]
    assert not torch.allclose(out.latents, plain.latents, atol=1e-3)
    assert torch.equal(out.latents, generator(RED, decode=False, callback_on_step_end=double, **FAST).latents)


@pytest.mark.parametrize("shared", [False, True])
def test_fit_and_steer(generator: ImageGenerator, shared: bool) -> None:
    fitted = pysteer.fit(
        generator, MeanDifference(), RED, BLUE, sites=["ca", "time", "text.output"], shared=shared, batch_size=4,
        settings=FAST,
    )  # fmt: skip
    assert fitted.parameters[0].site == "text.output"
    by_site = {entry.site: entry for entry in fitted.parameters}
    assert by_site["ca.2"].steps == (None if shared else (0, 1))
    assert by_site["text.output"].steps is None
    with Recorder(generator, ["ca.2"]) as recorder:
        generator(RED + BLUE, seeds=[0, 1, 0, 1], decode=False, **FAST)
    means = [recorder.get("ca.2", step).mean(1) for step in (0, 1)]
    expected = [(x[2:] - x[:2]).mean(0) for x in means]
    expected = [sum(expected) / 2] if shared else expected
    torch.testing.assert_close(by_site["ca.2"].tensors["bias"], torch.stack(expected), rtol=1e-3, atol=1e-5)
    plain = generator(RED, **FAST)
    with pysteer.steer(generator, fitted.plan(), strength=3.0) as handle:
        steered = generator(RED, **FAST)
    assert not torch.allclose(steered.latents, plain.latents, atol=1e-3)
    assert all(entry.calls for entry in handle.report())
    assert torch.equal(generator(RED, **FAST).latents, plain.latents)


def test_sequential_fit_of_maps_and_of_the_autoencoder(generator: ImageGenerator) -> None:
    fitted = pysteer.fit(
        generator, LinearAcT(), RED, BLUE, sites=["mid.0", "resnet.7"], sequential=True, settings=FAST, batch_size=4
    )
    assert [entry.steps for entry in fitted.parameters] == [(0, 1), (0, 1)]
    vae = pysteer.fit(generator, MeanDifference(), RED, BLUE, sites="vae.decoder.resnet.0", settings=FAST)
    assert vae.parameters[0].steps is None
    plain = generator(RED, **FAST).images
    with pysteer.steer(generator, fitted.plan() + vae.plan(), strength=2.0):
        assert not torch.equal(generator(RED, **FAST).images, plain)
    with pytest.raises(InputError, match="sequential"):
        pysteer.fit(generator, LinearAcT(), RED, BLUE, sites="mid.0", sequential=True, shared=True)


def test_what_the_rest_asks_of_a_generator(generator: ImageGenerator) -> None:
    assert find_family(generator).name == "diffusers"
    assert (generator.steps(), generator.steps(num_inference_steps=3), generator.steps(timesteps=[5, 1])) == (50, 3, 2)
    assert {len(row) for row in generator.token_ids(RED)} == {16}
    lengths = [len(row) for row in ImageGenerator(pixart_pipeline()).token_ids(["a red circle", "blue square"])]
    assert lengths == [4, 3]
    text = generator.encode_text(RED)[0]
    assert text.shape == (2, 16, 32)
    assert len(ImageGenerator(flux_pipeline()).encode_text(RED)) == 3
    assert generator.device.type == "cpu"
    assert generator.to(torch.float32) is generator


def test_saved_and_loaded(generator: ImageGenerator, tmp_path) -> None:
    generator.pipe.save_pretrained(tmp_path)
    again = ImageGenerator.from_pretrained(tmp_path, safety_checker=None)
    again.pipe.set_progress_bar_config(disable=True)
    latents = generator(RED, decode=False, **FAST).latents
    assert torch.equal(again(RED, decode=False, **FAST).latents, latents)


def test_bad_input(generator: ImageGenerator) -> None:
    cases = [
        ({"seeds": [1]}, "seeds: got 1"),
        ({"negative_prompts": ["one"]}, "negative_prompts"),
        ({"num_inferense_steps": 2}, "did you mean num_inference_steps"),
        ({"generator": None}, "seeds="),
        ({"num_images_per_prompt": 2}, "repeat the prompts"),
        ({"batch_size": 0}, "batch_size"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            generator(RED, **settings)
    with pytest.raises(InputError, match="prompts"):
        generator([])
    with pytest.raises(InputError, match="DiffusionPipeline"):
        ImageGenerator(generator.pipe.unet)
    with pytest.raises(InputError, match=r"step to fit: got 2"):
        pysteer.fit(generator, MeanDifference(), RED, BLUE, sites="ca", steps=[2], settings=FAST)
