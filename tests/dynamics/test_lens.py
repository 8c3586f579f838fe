"""The lens explains what is linear, its channels sum to the whole, and ablation is what zeroing costs."""

import pytest
import torch
from torch import nn

from pysteer.dynamics import Lens, ablation_effect, activation_grid
from pysteer.errors import InputError

from .tiny_vae import pictures, tiny_vae


def test_a_linear_map_is_inverted():
    model = nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), nn.ConvTranspose2d(12, 3, 2, stride=2))
    images = torch.randn(40, 3, 8, 8)
    lens = Lens.fit(model, images, "0", ridge=1e-10)
    x = model[0](images).detach()
    assert lens.decoders["0.output"].patch == 2
    assert lens.decoders["0.output"].explained > 0.9999
    torch.testing.assert_close(lens.project("0.output", x), images, rtol=1e-3, atol=1e-3)


def test_channels_sum_to_the_whole_and_a_dead_one_is_blank():
    model, images = tiny_vae(), pictures(24)
    name = "decoder.up_blocks.1.resnets.0.norm1"
    with torch.no_grad():
        model.get_submodule(name).weight[5] = 0
        model.get_submodule(name).bias[5] = 0.4
    lens = Lens.fit(model, images, name)
    assert model.training
    kept = {}
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, y: kept.update(x=y.detach()))
    with torch.no_grad():
        model.decode(model.encode(images).latent_dist.mode())
    hook.remove()
    x = kept["x"]
    parts = lens.project_channels(f"{name}.output", x, range(x.shape[1]))
    constant = lens.decoders[f"{name}.output"].weight[-1].float()
    bias = torch.nn.functional.pixel_shuffle(constant.view(1, -1, 1, 1).expand(1, -1, *x.shape[-2:]), 1)
    torch.testing.assert_close(parts.sum(1) + bias, lens.project(f"{name}.output", x), rtol=1e-4, atol=1e-5)
    assert parts[:, 5].abs().max() < 1e-5
    assert parts[:, 4].abs().max() > 1e-3


@pytest.mark.parametrize("replace", ["zero", "mean"])
def test_ablation_equals_silencing_by_hand(replace):
    model, images = tiny_vae().eval(), pictures(3)
    name = "decoder.conv_norm_out"
    with torch.no_grad():
        model.get_submodule(name).weight[2] = 0
        effects = ablation_effect(model, images, name, replace=replace, rows=12)[f"{name}.output"]

        def error() -> float:
            y = model.decode(model.encode(images).latent_dist.mode()).sample
            return (y - images).double().square().mean().item()

        plain = error()
        for channel in range(8):

            def silence(_: nn.Module, __: object, y: torch.Tensor, channel: int = channel) -> torch.Tensor:
                y = y.clone()
                y[:, channel] = 0 if replace == "zero" else y[:, channel].mean()
                return y

            hook = model.get_submodule(name).register_forward_hook(silence)
            changed = error()
            hook.remove()
            assert effects[channel].item() == pytest.approx(changed - plain, abs=1e-7)
    some = ablation_effect(model, images, name, replace=replace, channels=4)[f"{name}.output"]
    assert some.isnan().tolist() == [False, True] * 4
    torch.testing.assert_close(some[::2], effects[::2], rtol=1e-4, atol=1e-8)
    assert abs(effects[2]) < 1e-7
    assert effects.abs().max() > 1e-6


def test_grids():
    maps = torch.stack([torch.zeros(4, 4), torch.arange(16.0).view(4, 4)])
    sheet = activation_grid(maps, columns=2, tile=8)
    assert sheet.shape == (8, 18, 3)
    assert sheet.dtype == torch.uint8
    assert len(sheet[:, :8].flatten(0, 1).unique(dim=0)) == 1
    assert len(sheet[:, 10:].flatten(0, 1).unique(dim=0)) == 16
    with pytest.raises(InputError, match="colormap"):
        activation_grid(maps, colormap="nothing")


def test_too_few_images_and_unknown_layers_are_said():
    with pytest.raises(InputError, match="at least 4"):
        Lens.fit(tiny_vae(), pictures(2))
    with pytest.raises(InputError, match="no layer"):
        Lens.fit(tiny_vae(), pictures(8), "nothing_here")
    lens = Lens.fit(tiny_vae(), pictures(8), "decoder.conv_norm_out")
    with pytest.raises(InputError, match="layer of the lens"):
        lens.project("encoder.conv_in.output", torch.zeros(1, 8, 4, 4))
