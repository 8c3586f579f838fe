"""The judge of the shapes task: shape, colour, background and size of a picture, each with a "none of these" class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.files import read_json, read_safetensors, write_json, write_safetensors
from pysteer.zoo.shapes.captions import BACKGROUNDS, COLOURS, IMAGE_SIDE, SHAPES, SIZES

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
NONE = "none"
HEADS: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, NONE),
    "colour": (*COLOURS, NONE),
    "background": (*BACKGROUNDS, NONE),
    "size": (*SIZES, NONE),
}


@dataclass(frozen=True)
class ShapeClassifierConfig:
    """Channel widths at 32, 16, 8 and 4 pixels, and the width of the feature vector."""

    widths: tuple[int, ...] = (24, 48, 64, 96)
    features: int = 128


@dataclass(frozen=True)
class Verdict:
    """What the classifier saw: a word per image and head, its probability [N], and the feature vectors fp32 [N, F]."""

    labels: dict[str, list[str]]
    confidence: dict[str, Tensor]
    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def matches(self, row: int, wanted: dict[str, str]) -> dict[str, bool]:
        """For one image: whether each wanted attribute (those with a head) was seen."""
        return {name: self.labels[name][row] == value for name, value in wanted.items() if name in self.labels}


def _convolution(width_in: int, width: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class ShapeClassifier(nn.Module):
    """A small convolutional network with four heads on one feature vector."""

    def __init__(self, config: ShapeClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config or ShapeClassifierConfig()
        widths = self.config.widths
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), _convolution(12, widths[0], 1)]
        for level in range(1, len(widths)):
            layers.append(_convolution(widths[level - 1], widths[level], 2))
            if level + 1 < len(widths):
                layers.append(_convolution(widths[level], widths[level], 1))
        self.trunk = nn.Sequential(*layers)
        self.project = nn.Linear(2 * widths[-1], self.config.features)
        self.heads = nn.ModuleDict({name: nn.Linear(self.config.features, len(c)) for name, c in HEADS.items()})

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, 64, 64] in [-1, 1] -> feature vectors [B, F] (before the last ReLU)."""
        maps = self.trunk(images)
        return self.project(torch.cat([maps.mean((-2, -1)), maps.amax((-2, -1))], dim=1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, 64, 64] in [-1, 1] -> logits per head [B, classes]."""
        return self.logits(self.features(images))

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Feature vectors [B, F] -> logits per head."""
        hidden = F.relu(features)
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: Tensor, batch: int = 256) -> Verdict:
        """Judge images: uint8 [N, 64, 64, 3] as a pipeline gives them, or floats [N, 3, 64, 64] in [-1, 1]."""
        images = _as_input(images)
        weight = self.project.weight
        parts = [self.features(part.to(weight.device, weight.dtype)).float().cpu() for part in images.split(batch)]
        features = torch.cat(parts) if parts else torch.empty(0, self.config.features)
        labels: dict[str, list[str]] = {}
        confidence: dict[str, Tensor] = {}
        for name, logits in self.logits(features.to(weight.device, weight.dtype)).items():
            best = logits.float().softmax(-1).cpu().max(-1)
            labels[name] = [HEADS[name][i] for i in best.indices.tolist()]
            confidence[name] = best.values
        return Verdict(labels, confidence, features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to a folder."""
        folder = Path(folder)
        write_safetensors(folder / WEIGHTS, self.state_dict())
        write_json(folder / CONFIG, {"kind": "ShapeClassifier", "heads": HEADS, **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ShapeClassifier:
        """Read a classifier that ``save_pretrained`` wrote, as fp32 in eval mode."""
        folder = Path(folder)
        fields = read_json(folder / CONFIG, "classifier config")
        kind = fields.get("kind") if isinstance(fields, dict) else type(fields).__name__
        if kind != "ShapeClassifier":
            raise InputError(f"kind in {folder / CONFIG}", value=kind, allowed="ShapeClassifier")
        if fields.get("heads") != {name: list(words) for name, words in HEADS.items()}:
            raise InputError(f"heads in {folder / CONFIG}", value="other classes", allowed="those of this version")
        config = _config_of(fields)
        with torch.device("meta"):  # a damaged width must not reserve memory
            shapes = {name: tuple(value.shape) for name, value in cls(config).state_dict().items()}
        tensors, _ = read_safetensors(folder / WEIGHTS, "classifier weights", shapes=shapes)
        model = cls(config)
        model.load_state_dict(tensors)
        return model.float().eval()


def _config_of(fields: dict[str, Any]) -> ShapeClassifierConfig:
    widths, features = fields.get("widths"), fields.get("features")
    sizes = [*widths, features] if isinstance(widths, list) and 1 <= len(widths) <= 16 else [None]
    if not all(type(size) is int and 1 <= size <= 2**16 for size in sizes):
        given = {"widths": widths, "features": features}
        raise InputError("classifier config", value=given, allowed="widths and features from 1 to 65536")
    return ShapeClassifierConfig(tuple(widths), features)  # type: ignore[arg-type]


def _as_input(images: Tensor) -> Tensor:
    side: Sequence[int] = (IMAGE_SIDE, IMAGE_SIDE)
    if images.dtype == torch.uint8 and images.ndim == 4 and tuple(images.shape[1:]) == (*side, 3):
        return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    if images.is_floating_point() and images.ndim == 4 and tuple(images.shape[1:]) == (3, *side):
        return images
    raise InputError(
        "images to classify",
        value=f"{images.dtype} {tuple(images.shape)}",
        allowed="uint8 [N, 64, 64, 3] or floating [N, 3, 64, 64] in [-1, 1]",
    )
