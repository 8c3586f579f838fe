"""Configuration of the recipe `lora-farm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pysteer.errors import InputError
from pysteer.weightspace.farm.concepts import SHAPES_CONCEPTS, parse_concept
from pysteer.weightspace.farm.training import TrainingConfig


@dataclass(frozen=True)
class FarmConfig:
    """A collection of LoRA adapters, a class each.

    Attributes:
        generator: the bundled diffusion-shapes, or the folder or name of a Stable Diffusion pipeline.
        concepts: classes of the bundled renderer, `attribute=value` each.
        folders: folder of concept folders (images.parquet with metadata.json, or image files) to be used instead of
            the renderer; one adapter is trained per concept folder.
        adapters: adapters per class; a larger number continues a finished collection.
        images: pictures per adapter, of the renderer.
        side: side in pixels that pictures of folders are brought to.
        ranks: ranks that the adapters of a class take in turn.
        alpha: scale of the factors times the rank; empty for the rank itself.
        preset: `shapes` for the bundled generator; `dreambooth` replaces steps, rows, lr, schedule and prompt by those
            that DreamBooth LoRAs of Stable Diffusion 1.5 are made with: 200, 16, 1e-4, constant, a photo of sks CLASS.
        steps: optimizer steps.
        rows: pictures of an adapter in a step.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        schedule: constant, or linear down to zero.
        prompt: of all adapters; `{class}` in it is replaced by the class, which then leaks into the weights.
        init: `own`, or `shared` initial factors.
        targets: names of the layers that get factors.
        precision: of the frozen denoiser while training: bf16 or fp32.
        together: adapters trained in one batch.
        check_adapters: adapters of every class whose pictures are judged (renderer classes alone).
        check_images: pictures generated with each of them.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: of pictures, factors and noise.
    """

    generator: str = "diffusion-shapes"
    concepts: tuple[str, ...] = SHAPES_CONCEPTS
    folders: str = ""
    adapters: int = field(default=10, metadata={"identity": False})
    images: int = 8
    side: int = 256
    ranks: tuple[int, ...] = (1,)
    alpha: float | None = None
    preset: Literal["shapes", "dreambooth"] = "shapes"
    steps: int = 60
    rows: int = 4
    lr: float = 1e-2
    weight_decay: float = 1e-2
    schedule: Literal["constant", "linear"] = "linear"
    prompt: str = ""
    init: Literal["own", "shared"] = "own"
    targets: tuple[str, ...] = ("to_q", "to_v")
    precision: Literal["bf16", "fp32"] = "bf16"
    together: int = field(default=50, metadata={"identity": False})
    check_adapters: int = field(default=4, metadata={"identity": False})
    check_images: int = field(default=8, metadata={"identity": False})
    device: str = field(default="auto", metadata={"identity": False})
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"adapters": 1, "images": 1, "side": 8, "together": 1, "check_adapters": 0, "check_images": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(name, value=getattr(self, name), allowed=f"a whole number from {value}")
        if not self.ranks or not all(1 <= rank <= 256 for rank in self.ranks):
            raise InputError("ranks", value=self.ranks, allowed="one or more whole numbers from 1 to 256")
        if not self.folders:
            for concept in self.concepts:
                parse_concept(concept)
            if len(set(self.concepts)) != len(self.concepts) or not self.concepts:
                raise InputError("concepts", value=", ".join(self.concepts), allowed="each once, and at least one")
        _ = self.training

    @property
    def training(self) -> TrainingConfig:
        """The training of one adapter."""
        steps, rows, lr, schedule, prompt = self.steps, self.rows, self.lr, self.schedule, self.prompt
        if self.preset == "dreambooth":
            steps, rows, lr, schedule, prompt = 200, 16, 1e-4, "constant", "a photo of sks {class}"
        return TrainingConfig(
            steps, rows, lr, self.weight_decay, schedule, prompt, self.init, self.targets, self.alpha, self.precision
        )  # fmt: skip
