"""What the training stages share: device, moving average, progress, checkpoints, rendered data."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysteer.files import atomic_path
from pysteer.zoo.shapes.captions import Scene, sample_scenes
from pysteer.zoo.shapes.renderer import SceneBatch, render


def prepare(arguments: argparse.Namespace) -> torch.device:
    """Set threads and seed, and choose the device."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.device != "auto":
        return torch.device(arguments.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 autocast on a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def rendered(scenes: Sequence[Scene], chunk: int = 2048) -> Tensor:
    """Images of scenes as uint8 [N, 3, 64, 64]: a quarter of the memory of floats."""
    batch = SceneBatch.of(scenes)
    parts = [
        (render(batch[start : start + chunk]) * 255).round_().to(torch.uint8) for start in range(0, len(batch), chunk)
    ]
    return torch.cat(parts)


def dataset(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """``count`` scenes from a seed and their images, uint8."""
    scenes = sample_scenes(count, seed)
    return scenes, rendered(scenes)


def to_model_range(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images -> fp32 in [-1, 1] on the device, channels last."""
    values = images.to(device).float().div_(127.5).sub_(1.0)
    return values.contiguous(memory_format=torch.channels_last)


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows of one training step: a function of seed and step, so that a resumed run sees the same data."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(count, (batch,), generator=generator)


def learning_rate(step: int, steps: int, peak: float, hold: float = 0.4, warmup: int = 50) -> float:
    """Linear warm-up, constant until ``hold`` of the run, then linear to zero."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / max(1.0, steps * (1.0 - hold)))
    return peak * rise * fall


class Average:
    """Exponential moving average of a module's parameters; decay grows to its value over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold in the present parameters."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        current = module.state_dict()
        floating = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[n] for n in floating], [current[n] for n in floating], 1.0 - decay)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.count, self.values = state["count"], state["values"]


class Progress:
    """Prints step, rate, time left and running means of the logged values every few seconds."""

    def __init__(self, name: str, steps: int, start: int = 0, every: float = 15.0) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.first, self.began, self.last = start, time.monotonic(), time.monotonic()
        self.sums: dict[str, list[float]] = {}

    def log(self, step: int, **values: float) -> None:
        """Note the values of a finished step (0-based) and print when it is time."""
        for key, value in values.items():
            self.sums.setdefault(key, []).append(float(value))
        now = time.monotonic()
        if now - self.last < self.every and step + 1 < self.steps:
            return
        done = step + 1 - self.first
        rate = done / max(1e-9, now - self.began)
        means = "  ".join(f"{key} {sum(v) / len(v):.4g}" for key, v in self.sums.items())
        left = (self.steps - step - 1) / max(1e-9, rate)
        print(f"{self.name} {step + 1}/{self.steps}  {rate:.2f} steps/s  {left:.0f} s left  {means}", flush=True)
        self.sums, self.last = {}, now


class Checkpoint:
    """One resumable checkpoint file: state dicts by name, and the next step."""

    def __init__(self, path: Path, parts: dict[str, Any], fresh: bool = False) -> None:
        self.path, self.parts = path, parts
        self.before, self.began = 0.0, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)

    def load(self) -> int:
        """Restore the parts and return the step to go on from; 0 where there is no checkpoint."""
        if not self.path.is_file():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.before = float(state["seconds"])
        print(f"going on from step {state['step']} of {self.path}", flush=True)
        return int(state["step"])

    def seconds(self) -> float:
        """Wall-clock seconds spent in this run and the ones it goes on from (as of their last checkpoint)."""
        return self.before + time.monotonic() - self.began

    def save(self, step: int) -> None:
        """Write the parts; ``step`` is the next one to run."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_path(self.path) as temporary:
            torch.save({**state, "step": step, "seconds": self.seconds()}, temporary)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB; values in [-1, 1] (peak 2)."""
    return 10.0 * torch.log10(4.0 / (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-12))


def sheet(rows: Iterable[Tensor], scale: int = 2) -> Tensor:
    """Rows of images [N, 3, H, W] in [-1, 1] -> one uint8 image [H', W', 3], enlarged without smoothing."""
    lines = [torch.cat(list(row.float().clamp(-1, 1)), dim=-1) for row in rows]
    image = torch.cat(lines, dim=-2).add(1.0).mul(127.5).round().to(torch.uint8)
    return image.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).contiguous()


def machine() -> dict[str, Any]:
    """Versions and machine, for the training record."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
