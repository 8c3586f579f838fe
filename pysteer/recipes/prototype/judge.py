"""Judging pictures: which class they show, and feature vectors to compare sets of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.prototype.data import Pair
from pysteer.recipes.source_config import experiment_file

_NEEDED = "a shape classifier (file or folder) or a folder of a transformers image classifier"


@dataclass(frozen=True)
class Judgement:
    """Of N images: a word per attribute, and feature vectors fp32 [N, F]."""

    labels: dict[str, list[str]]
    features: Tensor


class Judge(Protocol):
    """Looks at uint8 images [N, H, W, 3]."""

    def __call__(self, images: Tensor) -> Judgement: ...


class ShapesJudge:
    """The classifier of the shapes task: shape, colour, background and size."""

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier

    def __call__(self, images: Tensor) -> Judgement:
        verdict = self.classifier.classify(images)
        return Judgement(verdict.labels, verdict.features)


class ImageClassifierJudge:
    """A transformers image classifier whose labels name the two classes (dog, cat); logits serve as features."""

    def __init__(self, folder: Path, pair: Pair, batch: int = 32) -> None:
        from transformers import AutoModelForImageClassification

        self.model = AutoModelForImageClassification.from_pretrained(folder).eval()
        names = {int(index): str(name).lower() for index, name in self.model.config.id2label.items()}
        self.words = [self._class_of(names[index], pair) for index in range(len(names))]
        for name in (pair.source, pair.target):
            if name not in self.words:
                raise InputError(
                    f"labels of classifier {folder}",
                    value=", ".join(list(names.values())[:8]),
                    allowed=f"at least one with the word {name}",
                    fix="use a classifier that knows both classes",
                )
        path = folder / "preprocessor_config.json"
        found = files.read_json(path, "image preprocessor") if path.is_file() else {}
        self.side = int(getattr(self.model.config, "image_size", 224))
        self.mean = torch.tensor(found.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        self.std = torch.tensor(found.get("image_std", [0.5] * 3)).view(3, 1, 1)
        self.batch = batch

    @staticmethod
    def _class_of(label: str, pair: Pair) -> str:
        words = label.replace(",", " ").replace("_", " ").split()
        return next((name for name in (pair.source, pair.target) if name.lower() in words), "none")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Judgement:
        logits = []
        for part in images.split(self.batch):
            pixels = part.permute(0, 3, 1, 2).float() / 255
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
            logits.append(self.model(pixel_values=(pixels - self.mean) / self.std).logits.float())
        scores = torch.cat(logits)
        return Judgement({"class": [self.words[index] for index in scores.argmax(1).tolist()]}, scores)


def find_judge(config: PrototypeConfig, pair: Pair) -> Judge | None:
    """The judge of the configuration; None where there is none, and then nothing but the images is measured."""
    from pysteer import zoo

    if config.classifier_weights:
        path = experiment_file(config.experiment_dir, "weights", config.classifier_weights)
        if not path.exists():
            raise InputError("CLASSIFIER_WEIGHTS not found", value=str(path), allowed=_NEEDED, fix="leave it empty")
        if path.is_dir() and files.read_json(path / "config.json", "classifier config").get("kind") is None:
            return ImageClassifierJudge(path, pair)
        return ShapesJudge(_shape_classifier(path))
    return ShapesJudge(zoo.load_classifier("shapes")) if config.dataset == "shapes_colors" else None


def _shape_classifier(path: Path) -> Any:
    from pysteer.zoo.shapes.classifier import ShapeClassifier

    if path.is_dir():
        return ShapeClassifier.from_pretrained(path)
    model = ShapeClassifier()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        tensors, _ = files.read_safetensors(path, "classifier weights", shapes=shapes)
    else:
        tensors = load_tensors(path, "classifier weights")
        if {name: tuple(value.shape) for name, value in tensors.items()} != shapes:
            raise InputError(
                "classifier weights", value=str(path), allowed=_NEEDED, fix="leave CLASSIFIER_WEIGHTS empty"
            )
    model.load_state_dict(tensors)
    return model.float().eval()


def load_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a `.pth` file, read without running any code in it; a bare tensor is called `images`."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, all meaning that the file cannot be used
        raise InputError(f"{what} cannot be read", value=str(path), allowed="tensors by name in a .pth file") from error
    values = {"images": values} if isinstance(values, Tensor) else values
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise InputError(f"{what} cannot be used", value=str(path), allowed="tensors by name in a .pth file")
    return values
