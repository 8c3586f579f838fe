"""Measures of an image: what a classifier sees, how far it is from its unsteered twin, how well it fits the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.metrics import change_outside
from pysteer.recipes.prototype.data import Pair
from pysteer.recipes.prototype.judge import ImageClassifierJudge, Judge, ShapesJudge

JUDGES = "auto, none, shapes, or the folder of an image classifier or a CLIP model of transformers"


def open_judge(name: str, model: str, pair: Pair | None) -> Any:
    """The judge that a setting names; None for none.

    Raises:
        InputError: there is no such judge.
    """
    from pysteer import zoo

    if name == "auto":
        name = "shapes" if model in zoo.available()["generators"] else "none"
    if name == "none":
        return None
    if name == "shapes":
        return ShapesJudge(zoo.load_classifier("shapes"))
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise InputError("judge", value=name, allowed=JUDGES)
    from pysteer import files

    if files.read_json(folder / "config.json", "configuration of the judge").get("model_type") == "clip":
        return ClipJudge(folder)
    if pair is None:
        raise InputError("judge", value=name, allowed="with pair=source->target, whose classes it knows")
    return ImageClassifierJudge(folder, pair)


class ClipJudge:
    """How well an image fits its prompt: the cosine of CLIP's embeddings (Radford et al. 2021)."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = CLIPModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.side = int(self.model.config.vision_config.image_size)
        self.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of CLIP's training images
        self.std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Cosines of uint8 images `[N, H, W, 3]` and their prompts."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        size = (self.side, self.side)
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        words = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        out = self.model(pixel_values=(pixels - self.mean) / self.std, **words)
        cosines: list[float] = (out.image_embeds * out.text_embeds).sum(1).tolist()
        return cosines


def measure(
    judge: Judge | ClipJudge | None, pair: Pair | None, images: Tensor, baselines: Tensor, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Measures of images uint8 `[N, H, W, 3]` beside their unsteered twins.

    `target` says whether the class is the target, `kept` whether everything else is as in the twin, `distance` is that
    of the classifier's features relative to their length, `change` the pixel change outside the object (0 to 1).
    """
    measures: list[dict[str, Any]] = [{} for _ in images]
    changes = change_outside(baselines, images).tolist()
    for row, change in zip(measures, changes, strict=True):
        row["change"] = None if math.isnan(change) else change
    if isinstance(judge, ClipJudge):
        for row, score in zip(measures, judge.scores(images, prompts), strict=True):
            row["clip"] = score
        return measures
    if judge is None:
        return measures
    seen = judge(torch.cat((images, baselines)))
    count = len(images)
    features, before = seen.features[:count], seen.features[count:]
    away = ((features - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)).tolist()
    for i, row in enumerate(measures):
        row["distance"] = away[i]
        same = True
        for name, labels in seen.labels.items():
            row[name] = labels[i]
            if pair is not None and name == pair.attribute:
                row["target"] = labels[i] == pair.target
            else:
                same = same and labels[i] == labels[count + i]
        row["kept"] = same
    return measures
