"""A task without a model: a picture is a function of prompt, seed and strength."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pysteer.models.infinity.sampling import row_uniform
from pysteer.sweep.tasks.base import Engine, Outputs, Task


@dataclass(frozen=True)
class ToySetting:
    """A cell of the toy.

    Attributes:
        model: another name is another group.
        prompt: a text.
        seed: of the picture.
        strength: how bright.
        method: a word.
        seconds: that a batch takes.
    """

    model: str = "a"
    prompt: str = "p"
    seed: int = 0
    strength: float = 1.0
    method: str = "none"
    seconds: float = 0.0


class ToyEngine(Engine):
    """What makes the pictures; knows some settings that go wrong."""

    def generate(self, settings: Sequence[ToySetting]) -> Outputs:
        log = os.environ.get("TOY_LOG")
        if log:
            with Path(log).open("a") as stream:
                stream.write(f"{os.getpid()} {len(settings)}\n")
        time.sleep(settings[0].seconds)
        if any(s.method == "raise" for s in settings):
            raise RuntimeError("this one always fails")
        if any(s.method == "die" for s in settings):
            os.kill(os.getpid(), 9)
        if len(settings) > int(os.environ.get("TOY_ROOM", "1000")):
            raise torch.OutOfMemoryError("out of memory: toy")
        seeds = torch.tensor([hash_of(s) for s in settings])
        images = (row_uniform(seeds, 0, 8 * 8 * 3) * 255).to(torch.uint8).reshape(-1, 8, 8, 3)
        failed = {i: "NaN in the picture" for i, s in enumerate(settings) if s.method == "nan"}
        return Outputs(images, failed=failed, work=(len(settings), len(settings)))

    def evaluate(self, settings: Sequence[ToySetting], outputs: Outputs) -> list[dict[str, Any]]:
        assert outputs.images is not None
        bright = outputs.images.float().mean((1, 2, 3)).tolist()
        return [
            {"bright": b, "target": s.strength > 1, "damage": s.strength**2}
            for b, s in zip(bright, settings, strict=True)
        ]

    def provenance(self) -> dict[str, Any]:
        return {"weights": "toy", "device": "cpu"}


def hash_of(setting: ToySetting) -> int:
    return sum(map(ord, setting.prompt)) * 1009 + setting.seed * 31 + round(setting.strength * 1000)


class ToyTask(Task):
    """The toy as a task."""

    setting = ToySetting
    group = ("model",)
    together = ("prompt", "seed")
    sets = ("method",)
    repeats = ("prompt", "seed")
    batch_size = 8

    def open(self, setting: ToySetting, folder: Path) -> Engine:
        return ToyEngine()

    def score(self) -> dict[str, str]:
        return {"target": "target", "damage": "damage"}
