"""The bit tokenizer of the bundled generator: a small residual convolutional autoencoder around ``MultiScaleBSQ``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.files import read_json, read_safetensors, write_json, write_safetensors
from pysteer.models.infinity.bsq import MultiScaleBSQ

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class ShapeTokenizerConfig:
    """Sizes of the tokenizer. Widths and block counts go from the finest map (image side / 2) to the coarsest."""

    dim: int = 16
    scales: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8))
    encoder_widths: tuple[int, ...] = (32, 64, 96)
    encoder_blocks: tuple[int, ...] = (1, 2, 2)
    decoder_widths: tuple[int, ...] = (48, 96, 128)
    decoder_blocks: tuple[int, ...] = (2, 2, 3)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3, without normalisation; the second convolution starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def _encoder(config: ShapeTokenizerConfig) -> nn.Sequential:
    widths = config.encoder_widths
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
    for level, (width, blocks) in enumerate(zip(widths, config.encoder_blocks, strict=True)):
        if level:
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
        layers += [ResidualBlock(width) for _ in range(blocks)]
    layers += [nn.ReLU(), nn.Conv2d(widths[-1], config.dim, 1)]
    return nn.Sequential(*layers)


def _decoder(config: ShapeTokenizerConfig) -> nn.Sequential:
    widths, blocks = config.decoder_widths[::-1], config.decoder_blocks[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.dim, widths[0], 3, padding=1)]
    for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        if level:
            layers += [nn.Conv2d(widths[level - 1], 4 * width, 1), nn.PixelShuffle(2)]
        layers += [ResidualBlock(width) for _ in range(count)]
    layers += [nn.ReLU(), nn.Conv2d(widths[-1], 12, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


class ShapeTokenizer(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] <-> features [B, dim, 8, 8] <-> bits (``self.quantizer``)."""

    def __init__(self, config: ShapeTokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config or ShapeTokenizerConfig()
        self.encoder = _encoder(self.config)
        self.decoder = _decoder(self.config)
        self.quantizer = MultiScaleBSQ(self.config.dim, self.config.scales)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> continuous features [B, dim, H/8, W/8], before quantisation."""
        return self.encoder(images)

    def decode(self, features: Tensor) -> Tensor:
        """Features (sums of codes) [B, dim, h, w] -> images [B, 3, 8h, 8w], clamped to [-1, 1] outside training."""
        images = self.decoder(features)
        return images if self.training else images.clamp(-1.0, 1.0)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] through the bits and back."""
        bits, _ = self.quantizer.encode(self.encode(images))
        return self.decode(self.quantizer.decode(bits).to(images.dtype))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors to a folder; weights are rounded to ``dtype``."""
        folder = Path(folder)
        write_safetensors(folder / WEIGHTS, {name: value.to(dtype) for name, value in self.state_dict().items()})
        write_json(folder / CONFIG, {"kind": "ShapeTokenizer", **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> ShapeTokenizer:
        """Read a tokenizer that ``save_pretrained`` wrote; weights are cast to ``dtype``."""
        folder = Path(folder)
        fields = read_json(folder / CONFIG, "tokenizer config")
        kind = fields.get("kind") if isinstance(fields, dict) else type(fields).__name__
        if kind != "ShapeTokenizer":
            raise InputError(f"kind in {folder / CONFIG}", value=kind, allowed="ShapeTokenizer")
        config = _config_of(fields, folder / CONFIG)
        with torch.device("meta"):  # a damaged width must not reserve memory
            shapes = {name: tuple(value.shape) for name, value in cls(config).state_dict().items()}
        tensors, _ = read_safetensors(folder / WEIGHTS, "tokenizer weights", shapes=shapes)
        model = cls(config)
        model.load_state_dict(tensors)
        return model.to(dtype).eval()


def _config_of(fields: dict[str, Any], path: Path) -> ShapeTokenizerConfig:
    names = [field.name for field in dataclass_fields(ShapeTokenizerConfig)]
    lists = {name: fields.get(name) for name in names if name not in ("dim", "scales")}
    pairs = fields.get("scales")
    fits = _is_size(fields.get("dim")) and all(
        _are_sizes(value, least=int("widths" in name)) for name, value in lists.items()
    )
    fits = fits and isinstance(pairs, list) and all(_are_sizes(pair) and len(pair) == 2 for pair in pairs)
    if not fits or max(*fields["encoder_blocks"], *fields["decoder_blocks"]) > 64:
        raise InputError(f"tokenizer config {path}", value=fields, allowed=f"the fields {', '.join(names)}")
    for half in ("encoder", "decoder"):
        if len(fields[f"{half}_widths"]) != len(fields[f"{half}_blocks"]):
            raise InputError(f"{half} of tokenizer config {path}", value=fields, allowed="as many widths as blocks")
    scales = tuple((height, width) for height, width in fields["scales"])
    return ShapeTokenizerConfig(fields["dim"], scales, **{name: tuple(fields[name]) for name in lists})


def _is_size(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= 2**16


def _are_sizes(value: object, least: int = 1) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 16 and all(_is_size(item, least) for item in value)
