"""Published configurations: parameter counts and shapes."""

import pytest
import torch

from pysteer.errors import InputError
from pysteer.models.infinity.presets import PRESETS, preset
from pysteer.models.infinity.transformer import Infinity
from pysteer.models.infinity.vae import InfinityVAE, VAEConfig

# Parameters in millions. layer12 was counted on the published code; it prints 2.20B for 2b; the others follow from the
# same shapes.
MILLIONS = {
    "layer12": 125.15,
    "layer16": 361.58,
    "layer24": 940.87,
    "layer32": 2256.60,
    "layer40": 4716.29,
    "layer48": 8767.04,
    "2b": 2204.56,
    "8b": 8375.79,
    "20b": 19952.20,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = Infinity(preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.006)
    assert len(model.blocks) == PRESETS[name].depth


def test_8b_is_patchified() -> None:
    config = preset("infinity_8b")
    assert (config.patchify, config.bits, PRESETS["8b"].vae_bits) == (True, 56, 14)
    assert len(config.scales) == 13


def test_image_size_and_ratio() -> None:
    assert preset("2b", pn="0.25M", h_div_w=0.5).scales[-1] == (23, 46)
    assert preset("layer12").scales[-1] == (16, 16)


def test_unknown_name_is_explained() -> None:
    with pytest.raises(InputError, match=r"'layer13'.*layer12.*fix"):
        preset("layer13")


@pytest.mark.parametrize(("bits", "levels", "millions"), [(16, 5, 109.97), (32, 5, 110.12), (14, 4, 81.62)])
def test_vae_parameter_count(bits: int, levels: int, millions: float) -> None:
    with torch.device("meta"):
        model = InfinityVAE(VAEConfig(bits, multipliers=(1, 2, 4, 4, 4)[:levels]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
