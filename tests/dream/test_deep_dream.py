"""Dreams on a tiny pipeline: rows of their own, the model frozen and left early, one latent read."""

import pytest
import torch
from dreaming import SETTINGS, SITE, autoencoder, features, generator
from torch import nn

from pysteer.dream.augment import Augmentation
from pysteer.dream.deep_dream import DreamConfig, Dreamer, Objective, frozen, row_generator
from pysteer.dream.denoiser import Denoiser
from pysteer.dream.regularise import beyond_range, blur, moments_off, precondition, spectral_filter, total_variation
from pysteer.errors import InputError
from pysteer.models.diffusion import ImageGenerator

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipe():
    return generator()


@pytest.fixture(scope="module")
def denoiser(pipe):
    return Denoiser(pipe, settings=SETTINGS)


def hooked(pipe, latents, times, text):
    """The activation as a plain forward hook sees it, of the whole model."""
    held = []
    module = pipe.pipe.unet.up_blocks[1].attentions[0]
    hook = module.register_forward_hook(lambda m, args, out: held.append(out[0]))
    pipe.pipe.unet(latents, times, encoder_hidden_states=text, return_dict=False)
    hook.remove()
    return held[0]


@pytest.fixture(scope="module")
def empty(pipe):
    with torch.no_grad():
        return pipe.encode_text([""])[0]


def test_the_activation_is_that_of_the_whole_model_and_the_rest_does_not_run(pipe, denoiser, empty):
    z, times = torch.randn(3, *denoiser.shape), torch.tensor([10.0, 500.0, 900.0])
    truth = hooked(pipe, z, times, empty.expand(3, -1, -1))
    ran = []
    hook = pipe.pipe.unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    with denoiser.reading(features(pipe).site) as read:
        torch.testing.assert_close(read(z, times), truth)
        assert not ran
    with denoiser.reading(features(pipe).site, early_exit=False) as read:
        torch.testing.assert_close(read(z, times), truth)
        assert ran
    hook.remove()
    torch.testing.assert_close(hooked(pipe, z, times, empty.expand(3, -1, -1)), truth)  # the model is as before


@pytest.mark.slow
def test_a_compiled_model_leaves_out_what_comes_after_the_site(pipe, denoiser):
    from torch._dynamo.backends.common import aot_autograd

    z, times, counts = torch.randn(2, *denoiser.shape), torch.tensor([300.0, 300.0]), []

    def count(module, example):
        counts.append(sum("convolution" in str(node.target) for node in module.graph.nodes))
        return module.forward

    with torch.no_grad(), denoiser.reading(features(pipe).site) as read:
        plain = read(z, times)
        torch._dynamo.reset()
        compiled = torch.compile(read, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        torch.testing.assert_close(compiled(z, times), plain)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in pipe.pipe.unet.modules())
    assert counts
    assert 0 < counts[0] < convolutions


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_the_objective_is_the_latent_of_the_full_encoder(pipe, denoiser, activation):
    sae = autoencoder(activation=activation)
    known = features(pipe, sae)
    x = torch.randn(4, 32, 8, 8, requires_grad=True)
    chosen = [0, 7, 7, 19]
    soft, value = Objective(known, chosen, x.device, leak=0.0)(x)
    tokens = x.flatten(2).transpose(1, 2)
    full = ((tokens - sae.bias) @ sae.encoder.T + sae.encoder_bias).relu().mean(1)
    truth = full[torch.arange(4), torch.tensor(chosen)]
    torch.testing.assert_close(value, truth.detach(), rtol=1e-4, atol=1e-5)
    (mine,) = torch.autograd.grad(soft.sum(), x)
    (theirs,) = torch.autograd.grad(truth.sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    raw, _ = Objective(features(pipe), [3, 1, 0, 31], x.device, leak=0.0)(x)
    torch.testing.assert_close(raw, x.mean((2, 3))[torch.arange(4), torch.tensor([3, 1, 0, 31])])


CONFIG = {"num_steps": 12, "snapshot_every": 4, "learning_rate": 0.2}


def test_dreams_rise_and_do_not_depend_on_the_rows_beside_them(pipe, denoiser):
    known = features(pipe, autoencoder())
    dreamer = Dreamer(denoiser, known, DreamConfig(**CONFIG, see_through_schedule_noise=False))
    z = dreamer.start([1, 2, 3])
    seen = []
    chosen, times, seeds = [2, 5, 9], [0.0, 400.0, 801.0], [1, 2, 3]
    out = dreamer(z, chosen, times, seeds, snapshot=lambda step, latents, figures: seen.append((step, figures)))
    assert [step for step, _ in seen] == [0, 4, 8, 12]
    assert (seen[-1][1]["activation"] > seen[0][1]["activation"]).all()
    assert not torch.allclose(out.latents, z)
    dreamer = Dreamer(denoiser, known, DreamConfig(**CONFIG))
    out = dreamer(z, chosen, times, seeds)
    for row in range(3):
        part = slice(row, row + 1)
        alone = dreamer(z[part], chosen[part], times[part], seeds[part])
        torch.testing.assert_close(alone.latents, out.latents[part], rtol=1e-3, atol=1e-3)
    again = dreamer(z, chosen, times, seeds)
    assert torch.equal(again.latents, out.latents)


def test_no_parameter_gets_a_gradient(pipe, denoiser):
    unet = pipe.pipe.unet
    assert all(p.requires_grad for p in unet.parameters())
    asked = []
    hook = unet.conv_in.register_forward_hook(
        lambda m, args, out: asked.append((m.weight.requires_grad, out.requires_grad))
    )
    dreamer = Dreamer(denoiser, features(pipe), DreamConfig(num_steps=2))
    dreamer(dreamer.start([1]), [0], [100.0], [1])
    hook.remove()
    assert (False, True) in asked  # weights ask for none, the latents do
    assert (True, True) not in asked
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.requires_grad for p in unet.parameters())
    with pytest.raises(RuntimeError), frozen(unet):
        raise RuntimeError
    assert all(p.requires_grad for p in unet.parameters())


def test_noise_is_seen_through_as_the_schedule_says(pipe, denoiser):
    z, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.0, 700.0])
    truth = pipe.pipe.scheduler.add_noise(z, noise, times.long())
    torch.testing.assert_close(denoiser.noised(z, noise, times), truth)


def test_settings_change_dreams(pipe, denoiser):
    known, z = features(pipe, autoencoder()), torch.randn(1, 4, 8, 8)
    base = {"num_steps": 4, "learning_rate": 0.1}
    changes = (
        {}, {"see_through_schedule_noise": False}, {"use_gradient_spectral_filtering": False},
        {"gradient_smoothing_sigma_start": 0.0}, {"jitter_max": 0, "rotate_max": 0.0, "scale_max": 1.0},
        {"moment_penalty_weight": 5.0}, {"seed": 1},
    )  # fmt: skip
    dreamers = [Dreamer(denoiser, known, DreamConfig(**{**base, **more})) for more in changes]
    found = [dreamer(z, [4], [500.0], [3]).latents for dreamer in dreamers]
    assert all(not torch.equal(found[0], other) for other in found[1:])
    with pytest.raises(InputError, match="odd"):
        DreamConfig(gradient_smoothing_kernel_size=4)
    with pytest.raises(InputError, match="as many of each"):
        Dreamer(denoiser, known, DreamConfig())(z, [1, 2], [3.0], [4])


def test_penalties_against_their_formulas():
    z = torch.randn(3, 2, 6, 5)
    tv = (z[0, :, 1:] - z[0, :, :-1]).abs().mean() + (z[0, :, :, 1:] - z[0, :, :, :-1]).abs().mean()
    torch.testing.assert_close(total_variation(z)[0], tv)
    torch.testing.assert_close(beyond_range(4 * z, 3.0)[1], ((4 * z[1]).abs() - 3).relu().square().mean())
    torch.testing.assert_close(moments_off(z)[2], z[2].mean().abs() + (z[2].std() - 1).abs())


def test_gradients_keep_their_size_and_lose_their_fine_grain():
    g = torch.randn(2, 3, 16, 16)
    shaped = precondition(g, spectral_filter(16, 16, g.device))
    torch.testing.assert_close(shaped.flatten(1).std(1), g.flatten(1).std(1))
    assert (total_variation(shaped) < 0.8 * total_variation(g)).all()
    flat = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(blur(flat, 0.7, 9), flat)
    assert torch.equal(blur(g, 0.0, 9), g)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1.0
    weight = torch.exp(-0.5 * (torch.arange(-4, 5.0) / 0.7) ** 2)
    weight = weight / weight.sum()
    torch.testing.assert_close(blur(point, 0.7, 9)[0, 0], weight[:, None] * weight[None])


def test_augmentations_move_rows_as_drawn():
    z = torch.randn(2, 3, 8, 8)
    rolled = Augmentation(jitter=2, rotate=0, scale=1.0)(z, torch.tensor([[0.99, 0.0, 0, 0], [0.5, 0.5, 0, 0]]))
    assert torch.equal(rolled[0], torch.roll(z[0], (2, -2), (1, 2)))
    assert torch.equal(rolled[1], z[1])
    still = Augmentation(0, 20.0, 1.5)
    torch.testing.assert_close(still(z, torch.tensor([[0, 0, 0.5, 0.0]] * 2)), z)  # no turn, no zoom
    quarter = Augmentation(0, 90.0, 1.0)(z, torch.tensor([[0, 0, 1.0, 0.0]] * 2))
    turned = [torch.rot90(z, k, (2, 3)) for k in (1, 3)]
    assert min((quarter - each).abs().max() for each in turned) < 1e-4
    assert Augmentation.level("level_3") == Augmentation(16, 45.0, 1.8)
    with pytest.raises(InputError, match="level_0"):
        Augmentation.level("level_9")
    assert not torch.equal(torch.rand(3, generator=row_generator(1, 2)), torch.rand(3, generator=row_generator(2, 1)))


def test_pictures_are_the_ones_the_pipeline_makes(pipe, denoiser):
    made = pipe(["a red circle"] * 2, seeds=[1, 2], **SETTINGS)
    assert torch.equal(denoiser.decode(made.latents), made.images)


@pytest.mark.parametrize("name", ["sdxl_pipeline", "sd3_pipeline", "flux_pipeline"])
def test_other_denoisers_dream_too(name):
    import tiny_diffusion

    pipe = ImageGenerator(getattr(tiny_diffusion, name)())
    site = SITE if name == "sdxl_pipeline" else "block.0"
    one = Denoiser(pipe, settings={"height": 8, "width": 8})
    dreamer = Dreamer(one, features(pipe, site=site), DreamConfig(num_steps=8, learning_rate=0.3))
    start, last = [], []
    z = dreamer.start([1, 2])
    out = dreamer(z, [0, 3], [500.0, 100.0], [1, 2], snapshot=lambda step, _, f: (last if step else start).append(f))
    assert out.latents.shape == z.shape
    assert (last[-1]["activation"] > start[0]["activation"]).all()
