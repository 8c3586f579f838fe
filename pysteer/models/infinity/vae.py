"""Convolutional image tokenizer of the published Infinity models: images to features `[B, d, h, w]` and back.

A convolutional autoencoder (residual blocks with group norm and SiLU, one halving per level but the last) whose
features are quantised by `pysteer.models.infinity.bsq`. Module names give the published state-dict keys, so the weights
`infinity_vae_d16`, `d24`, `d32`, `d32reg`, `d64` (16 pixels per feature) and `d56_f8_14_patchify` (8 pixels) load.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer import files
from pysteer.errors import InputError


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the tokenizer.

    Attributes:
        bits: feature channels d, one bit each.
        base_channels: width of the first level; a multiple of 32 or 24 (group norm).
        multipliers: width of every level over `base_channels`, fine to coarse; one halving between levels.
        blocks: residual blocks per level of the encoder (the decoder has one more).
    """

    bits: int
    base_channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    blocks: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(int(m) for m in self.multipliers))
        if self.bits < 1 or self.blocks < 1 or not self.multipliers:
            raise InputError("VAE config", value=str(asdict(self)), allowed="bits >= 1, blocks >= 1, one level or more")
        for multiplier in self.multipliers:
            _groups(self.base_channels * multiplier)

    @property
    def stride(self) -> int:
        """Pixels per feature and side."""
        return 2 ** (len(self.multipliers) - 1)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VAEConfig":
        """The inverse of `dataclasses.asdict`; an unknown key is an InputError."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise InputError("VAE config key", value=unknown[0], allowed=", ".join(sorted(names)))
        return cls(**data)


def _groups(channels: int) -> int:
    for groups in (32, 24):
        if channels > 0 and channels % groups == 0:
            return groups
    raise InputError("VAE channels", value=channels, allowed="multiples of 32 or 24")


class Conv(nn.Module):
    """2-D convolution under the published key `conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Norm(nn.Module):
    """Group norm under the published key `norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_groups(channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = Conv(inputs, outputs, 3, padding=1)
        self.norm2 = Norm(outputs)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        self.nin_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Downsample(nn.Module):
    """Halve height and width: stride-2 convolution with zero padding at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next one where there is one."""

    def __init__(self, widths: Sequence[int], *, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.downsample = Downsample(widths[-1]) if down else None
        self.upsample = Upsample(widths[-1]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for change in (self.downsample, self.upsample):
            x = x if change is None else change(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the coarsest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Images `[B, 3, H, W]` -> features `[B, bits, H / stride, W / stride]`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.conv_in = Conv(3, config.base_channels, 3, padding=1)
        before = [config.base_channels, *widths[:-1]]
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level([a] + [b] * config.blocks, down=i < last) for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], config.bits, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features `[B, bits, h, w]` -> images `[B, 3, h * stride, w * stride]`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.multipliers]
        self.conv_in = Conv(config.bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level([a] + [b] * (config.blocks + 1), up=i > 0)
            for i, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.norm_out = Norm(widths[0])
        self.conv_out = Conv(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class InfinityVAE(nn.Module):
    """The tokenizer between images and features; the bits are made by `MultiScaleBSQ`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> features `[B, bits, H / stride, W / stride]`, fp32.

        Raises:
            InputError: not 3 channels, or a side that is not a multiple of the stride.
        """
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise InputError(
                "images to encode", value=list(images.shape), allowed=f"[B, 3, H, W] with H and W multiples of {stride}"
            )
        return self.encoder(images.to(self.encoder.conv_in.conv.weight.dtype)).float()

    def decode(self, features: Tensor) -> Tensor:
        """Features `[B, bits, h, w]` -> images `[B, 3, h * stride, w * stride]` clamped to [-1, 1], fp32."""
        if features.ndim != 4 or features.shape[1] != self.config.bits:
            raise InputError("features to decode", value=list(features.shape), allowed=f"[B, {self.config.bits}, h, w]")
        return self.decoder(features.to(self.decoder.conv_in.conv.weight.dtype)).float().clamp(-1, 1)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and `config.json` into `folder`; weights are rounded to `dtype` if it is given."""
        state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in self.state_dict().items()}
        files.write_safetensors(Path(folder) / "model.safetensors", state)
        files.write_json(Path(folder) / "config.json", asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "InfinityVAE":
        """Load a folder written by `save_pretrained` or `pysteer convert`, in fp32 on the CPU.

        Raises:
            InputError: missing or damaged files, tensors that do not fit the config, NaN or infinite weights.
        """
        config = VAEConfig.from_dict(files.read_json(Path(folder) / "config.json", "VAE config"))
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        state, _ = files.read_safetensors(Path(folder) / "model.safetensors", "VAE weights", shapes=shapes)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model.eval()
