"""A small autoencoder for the tests, and planted dead channels."""

import torch
from torch import nn

PLANTED = {
    "encoder.down_blocks.0.resnets.0.norm1": (3, 0.0, 0.0),  # nothing comes out
    "decoder.up_blocks.1.resnets.0.norm1": (5, 1e-4, 0.0),  # next to nothing
    "decoder.conv_norm_out": (2, 0.0, 0.7),  # a constant
}


def tiny_vae(seed: int = 0) -> nn.Module:
    """AutoencoderKL with 8 and 16 channels for pictures of 16 x 16."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
        sample_size=16,
    )  # fmt: skip


@torch.no_grad()
def plant(model: nn.Module) -> list[str]:
    """Kill the channels of `PLANTED` (scale, shift); returns their names as a classifier gives them."""
    for path, (channel, scale, shift) in PLANTED.items():
        norm = model.get_submodule(path)
        norm.weight[channel], norm.bias[channel] = scale, shift
    return [f"{path}.output[{channel}]" for path, (channel, _, _) in PLANTED.items()]


def pictures(count: int = 4, seed: int = 1) -> torch.Tensor:
    """Smooth random pictures [count, 3, 16, 16] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
