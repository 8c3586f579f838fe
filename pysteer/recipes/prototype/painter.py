"""Generating the images of a setting, and keeping them in the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.steering import Plan, steer

_LONGEST_SIDE = 4096  # pixels of a contact sheet


class Painter:
    """Makes images with one pipeline; `advance(n)` is told about every n finished ones.

    Args:
        pipe: an `InfinityPipeline` or anything called and encoding text as it does.
        config: batch size, guidance and temperature are taken from it.
        settings: further arguments of the pipeline (of the file that names official weights).
    """

    def __init__(self, pipe: Any, config: PrototypeConfig, settings: dict[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.batch_size = config.batch_size
        own = {"cfg": config.cfg, "tau": config.tau}
        self.settings = {**(settings or {}), **{name: value for name, value in own.items() if value is not None}}
        self.painted = 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides, beside prompts and seeds, how a baseline image looks."""
        defaults = dict(getattr(self.pipe, "defaults", {}))
        return {**defaults, **self.settings, "batch_size": self.batch_size}

    def paint(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        advance: Callable[[float], None],
        *,
        plan: Plan | Sequence[Plan] | None = None,
        strength: Mapping[str, float] | float | Tensor = 1.0,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Images uint8 [N, H, W, 3] of `prompts` with noise `seeds`, steered by `plan` (or one per prompt).

        `strength` can be [N], `gate` [N] of zeros and ones leaves out the prompts with a zero.
        """
        images = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            if plan is None:
                out = self.pipe(list(prompts[part]), seeds=list(seeds[part]), **self.settings)
            else:
                own = plan if isinstance(plan, Plan) else list(plan[part])
                level = strength[part] if isinstance(strength, Tensor) else strength
                with steer(self.pipe, own, strength=level) as handle:
                    handle.gate = None if gate is None else gate[part]
                    out = self.pipe(list(prompts[part]), seeds=list(seeds[part]), **self.settings)
            images.append(out.images.cpu())
            self.painted += len(out.images)
            advance(len(out.images))
        return torch.cat(images)

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """Pooled text vectors [N, D] fp32 of unsteered prompts."""
        parts = [list(prompts[i : i + self.batch_size]) for i in range(0, len(prompts), self.batch_size)]
        return torch.cat([self.pipe.pooled(self.pipe.encode_text(part)).float().cpu() for part in parts])


def _layout(count: int, height: int, width: int) -> tuple[int, int]:
    """Columns, and images per contact sheet."""
    columns = max(1, min(16, count, _LONGEST_SIDE // width))
    return columns, columns * max(1, _LONGEST_SIDE // height)


def save_sheets(images: Tensor, path: Path) -> list[Path]:
    """Write uint8 [N, H, W, 3] as contact sheets without gaps: `path` (a .png), then `-2`, `-3` ... where one is full.

    PNG is lossless, so `load_sheets` gives the very same images.
    """
    count, height, width, _ = images.shape
    columns, per_sheet = _layout(count, height, width)
    written = []
    for number, part in enumerate(images.split(per_sheet)):
        rows = math.ceil(len(part) / columns)
        sheet = torch.zeros(rows * columns, height, width, 3, dtype=torch.uint8)
        sheet[: len(part)] = part
        pixels = sheet.view(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)
        name = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        written.append(files.write_image(name, pixels))
    return written


def load_sheets(path: Path, count: int, height: int, width: int) -> Tensor:
    """Read back `count` images uint8 [N, H, W, 3] that `save_sheets` wrote."""
    columns, per_sheet = _layout(count, height, width)
    parts = []
    for number in range(math.ceil(count / per_sheet)):
        name = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        if not name.is_file():
            raise InputError("images of the run not found", value=str(name), fix="run with --overwrite")
        pixels = torch.from_numpy(np.array(Image.open(name).convert("RGB")))
        rows = pixels.shape[0] // height
        if pixels.shape != (rows * height, columns * width, 3):
            raise InputError(
                "images of the run", value=str(name), allowed=f"{columns} columns", fix="run with --overwrite"
            )
        tiles = pixels.view(rows, height, columns, width, 3).transpose(1, 2)
        parts.append(tiles.reshape(rows * columns, height, width, 3))
    return torch.cat(parts)[:count]
