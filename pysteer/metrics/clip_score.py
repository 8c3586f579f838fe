"""CLIP similarity of images to texts, and how far images move along the direction between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError


@dataclass(frozen=True)
class ClipScores:
    """Per image, fp32 `[N]`.

    Attributes:
        source: cosine similarity to the source text.
        target: cosine similarity to the target text.
        prefers_target: probability of the target text against the source text, softmax of the two cosines as they are.
        directional: cosine between the image's move from its unsteered version and the move from source to target text
            (StyleGAN-NADA, Gal et al. 2022); NaN where the image did not move.
    """

    source: Tensor
    target: Tensor
    prefers_target: Tensor
    directional: Tensor


class Clip:
    """A CLIP model.

    Args:
        name: folder or name of a `CLIPModel` of transformers with its processor.

    Raises:
        InputError: there is no such model.
    """

    def __init__(self, name: str | Path, batch_size: int = 32) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(name).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(
                "CLIP model", value=str(name), allowed="a CLIPModel of transformers, folder or name"
            ) from error
        self.side = int(self.model.config.vision_config.image_size)
        self.batch_size = batch_size

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Unit vectors `[N, D]` of uint8 images `[N, H, W, 3]`."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        found = []
        for part in images.split(self.batch_size):
            pixels = part.permute(0, 3, 1, 2).float() / 255
            size = (self.side, self.side)
            pixels = torch.nn.functional.interpolate(
                pixels, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
            found.append(_features(self.model.get_image_features(pixel_values=(pixels - mean) / std)))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `[N, D]` of texts."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return torch.nn.functional.normalize(_features(self.model.get_text_features(**batch)), dim=1)

    def scores(self, unsteered: Tensor, steered: Tensor, source: str, target: str) -> ClipScores:
        """Scores of uint8 images `[N, H, W, 3]`, row i of both being the same prompt and noise."""
        if unsteered.shape[0] != steered.shape[0]:
            value = f"{len(unsteered)} and {len(steered)}"
            raise InputError("images to compare", value=value, allowed="as many of each")
        before, after = self.images(unsteered), self.images(steered)
        texts = self.texts([source, target])
        similar = after @ texts.T
        moved, wanted = after - before, torch.nn.functional.normalize(texts[1] - texts[0], dim=0)
        length = moved.norm(dim=1)
        directional = torch.where(length > 1e-6, (moved @ wanted) / length.clamp_min(1e-6), torch.nan)
        return ClipScores(similar[:, 0], similar[:, 1], similar.softmax(1)[:, 1], directional)


def _features(found: Any) -> Tensor:
    """The vectors themselves; newer transformers wrap them into an output."""
    vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return vectors.float()
