"""Recipe `lora-farm`: hundreds of LoRA adapters, trained many at a time on one frozen denoiser.

Each adapter learns one class from a few pictures of its own, as in DreamBooth. A batch of adapters is one run of the
denoiser per step; a batch that was written is not trained again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pysteer import files
from pysteer.errors import InputError
from pysteer.models.load import load_model
from pysteer.recipes.farm.check import measure_effects
from pysteer.recipes.farm.config import FarmConfig
from pysteer.recipes.farm.page import write_report
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.generator import choose_device
from pysteer.weightspace.farm.collection import adapter_path, is_written, write_batch
from pysteer.weightspace.farm.concepts import Lesson, drawn_lesson, folder_lesson, list_folders
from pysteer.weightspace.farm.many import Factors
from pysteer.weightspace.farm.training import Teacher

COLLECTION = "collection"


class _Order:
    """The adapters to be made, in their order; pictures are drawn or read when an adapter's turn comes."""

    def __init__(self, config: FarmConfig) -> None:
        self.config, self.folders = config, []
        if config.folders:
            root = Path(config.folders)
            if not root.is_dir():
                raise InputError("folders", value=config.folders, allowed="a folder of concept folders")
            self.root, self.folders = root, list_folders(root)
            self.count = len(self.folders)
        else:
            self.count = config.adapters * len(config.concepts)

    def __getitem__(self, index: int) -> Lesson:
        c = self.config
        if self.folders:
            return folder_lesson(self.folders[index], self.root, index, c.side, c.ranks, c.seed)
        return drawn_lesson(index, c.concepts, c.images, c.ranks, c.seed)


@recipe("lora-farm", FarmConfig)
def run_lora_farm(config: FarmConfig, run: Run) -> Summary:
    """Train a collection of LoRA adapters, many at a time, for the recipe weightspace."""
    order, folder = _Order(config), run.path(COLLECTION)
    generator = load_model(config.generator)
    if not hasattr(generator, "pipe"):
        raise InputError("generator", value=config.generator, allowed="diffusion-shapes or a Stable Diffusion pipeline")
    device = choose_device(config.device)
    if device.type != "cpu":
        generator.to(device)
    generator.pipe.set_progress_bar_config(disable=True)
    _train(config, run, order, Teacher(generator.pipe, config.training), folder)
    records = read_records(folder)
    seconds = _seconds(run)
    effects = []
    if config.check_adapters and not config.folders:
        chosen = _chosen(records, folder, config.check_adapters)
        seeds = list(range(config.check_images))
        with run.progress.task("pictures", sum(len(scale) for _, scale in chosen.values()) * len(seeds)) as advance:
            effects = measure_effects(generator, chosen, config.training.prompt, seeds, advance)
    run.write_parquet("metrics.parquet", [{**record, "training": str(record["training"])} for record in records])
    write_report(run, config, records, effects, seconds)
    per = seconds["seconds"] / max(1, seconds["adapters"])
    headline = {"adapters": len(records), "classes": len({record["label"] for record in records}),
                "seconds_per_adapter": round(per, 3), **seconds}  # fmt: skip
    return Summary(
        best={"adapters": len(records), "seconds_per_adapter": round(per, 3)}, headline=headline,
        tables={"effects": [effect.as_dict() for effect in effects]},
    )  # fmt: skip


def _train(config: FarmConfig, run: Run, order: _Order, teacher: Teacher, folder: Path) -> None:
    first = 0
    with run.progress.task("adapters", order.count) as advance:
        while first < order.count:
            part = range(first, min(first + config.together, order.count))
            lessons = list(map(order.__getitem__, part))
            missing = [lesson for lesson in lessons if not is_written(folder, lesson.name, lesson.label)]
            advance(len(lessons) - len(missing))
            if missing:
                start, share = time.monotonic(), len(missing) / config.training.steps
                trained = teacher.train(missing, lambda units, share=share: advance(units * share))  # type: ignore[misc]
                write_batch(folder, missing, trained, config.training, config.generator)
                note = {"adapters": len(missing), "seconds": round(time.monotonic() - start, 3)}
                run.write_json(f"batches/{part.start:06d}-{missing[0].name}.json", note)
            first = part.stop


def _seconds(run: Run) -> dict[str, float]:
    """Adapters and seconds of all batches, those of an interrupted start included."""
    notes = [files.read_json(path, "note of a batch") for path in sorted((run.folder / "batches").glob("*.json"))]
    total = {name: sum(note[name] for note in notes) for name in ("adapters", "seconds")}
    return {"adapters": total["adapters"], "seconds": round(total["seconds"], 1)}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of the adapters of a collection, by file name."""
    paths = sorted(folder.glob("*/*.json"), key=lambda path: path.name)
    return [{"name": path.stem, **files.read_json(path, "record of an adapter")} for path in paths]


def _chosen(records: list[dict[str, Any]], folder: Path, count: int) -> dict[str, tuple[Factors, torch.Tensor]]:
    """Factors and scales of the first `count` adapters of every class, padded to the highest rank."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_label.setdefault(record["label"], []).append(record)
    found = {}
    for label, rows in by_label.items():
        rows = rows[:count]
        widest = max(row["rank"] for row in rows)
        down: dict[str, list[torch.Tensor]] = {}
        up: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            tensors, _ = files.read_safetensors(adapter_path(folder, row["name"], label), "adapter")
            for name, tensor in tensors.items():
                path, _, kind = name.removeprefix("unet.").removesuffix(".weight").rpartition(".")
                if kind == "lora_A":
                    down.setdefault(path, []).append(torch.nn.functional.pad(tensor, (0, 0, 0, widest - len(tensor))))
                elif kind == "lora_B":
                    up.setdefault(path, []).append(torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1])))
        scale = torch.tensor([row["alpha"] / row["rank"] for row in rows])
        found[label] = (Factors(*({k: torch.stack(v) for k, v in part.items()} for part in (down, up))), scale)
    return found
