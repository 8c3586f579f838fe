"""Saved baseline images, so that several experiments compare with the same ones (`UNCHANGED_SAVED`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.config import config_hash
from pysteer.recipes.prototype.data import PairData
from pysteer.recipes.prototype.judge import load_tensors
from pysteer.recipes.source_config import experiment_file

_DEFAULT = "unchanged.safetensors"


class BaselineFile:
    """One file of baseline images: uint8 [N, H, W, 3] with what they were made from.

    Args:
        experiment_dir: the experiment folder.
        name: file in its `weights/`; empty means `unchanged.safetensors`, which is replaced when it does not fit.
        several: whether the run has several pairs; each then gets a file of its own.
        fingerprint: what else decides how the images look: generator, guidance, temperature, batch size.
    """

    def __init__(self, experiment_dir: str, name: str, several: bool, fingerprint: dict[str, Any]) -> None:
        self.named = bool(name)
        self.path = experiment_file(experiment_dir, "weights", name or _DEFAULT)
        self.several, self.fingerprint = several, fingerprint

    def of(self, data: PairData) -> Path:
        """The file of a pair."""
        return self.path.with_stem(f"{self.path.stem}-{data.pair.slug}") if self.several else self.path

    def _made_from(self, data: PairData) -> dict[str, str]:
        return {
            "prompts": config_hash(data.test.source),
            "seeds": config_hash(data.test.seeds),
            "settings": json.dumps(files.plain(self.fingerprint), sort_keys=True),
        }

    def load(self, data: PairData) -> Tensor | None:
        """The saved images; None when there are none yet, or when an unnamed file is of something else.

        Raises `InputError` when a named file was made from other prompts, seeds or settings, or cannot be used.
        """
        path = self.of(data)
        if not path.exists():
            return None
        if path.suffix != ".safetensors":
            return self._checked(load_tensors(path, "UNCHANGED_SAVED").get("images"), data, path)
        tensors, metadata = files.read_safetensors(path, "UNCHANGED_SAVED")
        for key, value in self._made_from(data).items():
            if metadata.get(key) != value:
                if not self.named:
                    return None
                raise InputError(
                    f"UNCHANGED_SAVED {path} was made from other {key}",
                    value=metadata.get(key, "nothing recorded"),
                    allowed=value,
                    fix="name another file, or leave UNCHANGED_SAVED empty to generate the images again",
                )
        return self._checked(tensors.get("images"), data, path)

    @staticmethod
    def _checked(images: Tensor | None, data: PairData, path: Path) -> Tensor:
        fits = images is not None and images.dtype == torch.uint8 and images.dim() == 4 and images.shape[-1] == 3
        if images is None or not fits or len(images) != len(data.test):
            found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
            allowed = f"a tensor `images`, uint8 [{len(data.test)}, H, W, 3]"
            raise InputError(f"images in {path}", value=found, allowed=allowed, fix="leave UNCHANGED_SAVED empty")
        return images

    def save(self, data: PairData, images: Tensor) -> Path:
        """Save the images of a pair unless they are there; always as safetensors."""
        path = self.of(data)
        if path.suffix != ".safetensors":
            if path.exists():
                return path
            path = path.with_suffix(".safetensors")
        return files.write_safetensors(path, {"images": images}, self._made_from(data))
