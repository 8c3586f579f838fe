"""A collection on disk: one safetensors file and one JSON record per adapter, in a folder per class.

    collection/shape-star/000003-shape-star.safetensors     names as diffusers loads them
    collection/shape-star/000003-shape-star.json            class, rank, seed, ids of its images, losses, settings

An adapter is there when both files are; the record is written last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pysteer import files
from pysteer.weightspace.farm.concepts import Lesson
from pysteer.weightspace.farm.training import Trained, TrainingConfig


def adapter_path(folder: Path, name: str, label: str) -> Path:
    """Where the factors of an adapter are kept; the class is cut down to letters, digits, `-` and `_`."""
    return folder / (re.sub(r"[^\w-]+", "-", label).strip("-") or "unlabelled") / f"{name}.safetensors"


def is_written(folder: Path, name: str, label: str) -> bool:
    """Whether an adapter is complete."""
    path = adapter_path(folder, name, label)
    return path.is_file() and path.with_suffix(".json").is_file()


def named_tensors(factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, scale: float) -> dict[str, Tensor]:
    """Tensors under the names that `load_lora_weights` of diffusers knows; alpha only where the scale is not 1."""
    named: dict[str, Tensor] = {}
    for path, (down, up) in factors.items():
        named[f"unet.{path}.lora_A.weight"], named[f"unet.{path}.lora_B.weight"] = down, up
        if scale != 1.0:
            named[f"unet.{path}.alpha"] = down.new_tensor(scale * rank)
    return named


def write_batch(folder: Path, lessons: Iterable[Lesson], trained: Trained, config: TrainingConfig, base: str) -> None:
    """Write the adapters of a batch; `base` names the generator."""
    for index, lesson in enumerate(lessons):
        scale = config.scale_of(lesson.rank)
        factors = trained.factors.of(index, lesson.rank)
        path = adapter_path(folder, lesson.name, lesson.label)
        files.write_safetensors(path, named_tensors(factors, lesson.rank, scale), {"format": "pt"})
        losses = trained.losses[:, index]
        tail = max(1, len(losses) // 10)
        record: dict[str, Any] = {
            **lesson.facts(), "base": base, "alpha": scale * lesson.rank, "prompt": config.prompt_of(lesson),
            "init": config.init, "training": {"steps": config.steps, "rows": config.rows, "lr": config.lr,
            "weight_decay": config.weight_decay, "schedule": config.schedule, "targets": config.targets},
            "first_loss": losses[:tail].mean(), "last_loss": losses[-tail:].mean(),
        }  # fmt: skip
        files.write_json(path.with_suffix(".json"), record)
