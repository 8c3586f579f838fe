"""Stage "classifier": the judge, on renders, their reconstructions and pictures that show none of the classes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.files import write_json
from pysteer.zoo.shapes.captions import sample_scenes
from pysteer.zoo.shapes.classifier import HEADS, NONE, ShapeClassifier
from pysteer.zoo.shapes.renderer import render
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer
from zoo_infinity.negatives import IGNORE, MAKERS, labels_of, negatives
from zoo_training.common import (
    Checkpoint,
    Progress,
    autocast,
    batch_rows,
    learning_rate,
    machine,
    prepare,
    to_model_range,
)

# Chance that one bit of the last two scales is flipped in the "flawed" reconstructions: what a generator gets wrong.
FLAWS = (0.0, 0.0, 0.0, 0.02, 0.05)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--images", type=int, default=8000, help="renders to train on")
    parser.add_argument(
        "--none-bias",
        type=float,
        default=-2.0,
        help="added in the end to the logit of shape 'none': training shows it far more often than a generator does",
    )


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstructed(tokenizer: ShapeTokenizer, images: Tensor, flip: Any = None, seed: int = 0) -> Tensor:
    """uint8 images through the bits and back, with a share of the bits flipped; uint8."""
    device = next(tokenizer.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for part in images.split(64):
        with autocast(device):
            features = tokenizer.encode(to_model_range(part, device)).float()
        bits, _ = tokenizer.quantizer.encode(features)
        if flip is not None:
            bits = [b ^ (torch.rand(b.shape, generator=generator) < p) for b, p in zip(bits, flip, strict=True)]
        with autocast(device):
            made = tokenizer.decode(tokenizer.quantizer.decode(bits)).float()
        parts.append(to_bytes((made.cpu() + 1) / 2))
    return torch.cat(parts)


def collect(tokenizer: ShapeTokenizer, count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Training images uint8 [N, 3, 64, 64] and labels: renders, reconstructions, flawed ones, negatives, rubbish."""
    scenes = sample_scenes(count, seed)
    renders, labels = to_bytes(render(scenes)), labels_of(scenes)
    half = count // 2
    wrong, wrong_labels = negatives(count // 4, seed + 1)
    wrong = to_bytes(wrong)
    odd = wrong[::4]
    rubbish = reconstructed(tokenizer, renders[: count // 16], (0.5,) * 5, seed)
    images = [
        renders,
        reconstructed(tokenizer, renders[:half]),
        reconstructed(tokenizer, renders[half:], FLAWS, seed),
        wrong,
        reconstructed(tokenizer, odd),
        rubbish,
    ]
    joined = {}
    for name, words in HEADS.items():
        mark = words.index(NONE) if name == "shape" else IGNORE
        unknown = torch.full((len(rubbish),), mark)
        parts = [labels[name], labels[name][:half], labels[name][half:]]
        joined[name] = torch.cat([*parts, wrong_labels[name], wrong_labels[name][::4], unknown])
    return torch.cat(images), joined


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Slight blur, noise and colour shift, each on a part of the batch; images in [-1, 1]."""
    count = len(images)

    def some(share: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < share).float().to(images.device)

    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = some(0.3) * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    images = images + mix * (soft - images)
    level = 0.12 * some(0.4) * torch.rand(count, 1, 1, 1, generator=generator).to(images.device)
    images = images + level * torch.randn(images.shape, generator=generator).to(images.device)
    shift = 0.08 * some(0.4) * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1).to(images.device)
    return (images + shift).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def accuracy(model: ShapeClassifier, images: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of right answers per head, ignored labels left out."""
    verdict = model.classify(images.permute(0, 2, 3, 1))
    rates = {}
    for name, words in HEADS.items():
        seen = torch.tensor([words.index(word) for word in verdict.labels[name]])
        known = labels[name] != IGNORE
        if known.any():
            rates[name] = (seen == labels[name])[known].float().mean().item()
    return rates


def measure(model: ShapeClassifier, tokenizer: ShapeTokenizer, seed: int) -> dict[str, Any]:
    """Accuracy on pictures that training has not seen."""
    scenes = sample_scenes(3000, seed)
    renders, labels = to_bytes(render(scenes)), labels_of(scenes)
    result: dict[str, Any] = {
        "renders": accuracy(model, renders, labels),
        "reconstructions": accuracy(model, reconstructed(tokenizer, renders), labels),
    }
    for size in ("small", "medium", "large"):
        rows = torch.tensor([s.size == size for s in scenes])
        result[f"renders_{size}"] = accuracy(model, renders[rows], {k: v[rows] for k, v in labels.items()})
    for index, (name, make) in enumerate(MAKERS.items()):
        images, wanted = make(250, seed + 1 + index)
        result[f"negative_{name}"] = accuracy(model, to_bytes(images), wanted)
    return result


def run(arguments: argparse.Namespace) -> None:
    """Train, measure and save."""
    device = prepare(arguments)
    tokenizer = ShapeTokenizer.from_pretrained(arguments.out / "infinity-shapes" / "tokenizer").to(device)
    images, labels = collect(tokenizer, arguments.images, arguments.seed + 2)
    print(f"{len(images)} training images", flush=True)
    model = ShapeClassifier().to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    checkpoint = Checkpoint(arguments.work / "classifier.pt", {"model": model, "optimiser": optimiser}, arguments.fresh)
    start = checkpoint.load()
    progress = Progress("classifier", arguments.steps, start)
    for step in range(start, arguments.steps):
        rows = batch_rows(len(images), arguments.batch, arguments.seed, step)
        generator = torch.Generator().manual_seed(step)
        batch = augment(to_model_range(images[rows], device), generator)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr, hold=0.3)
        with autocast(device):
            logits = model(batch)
        losses = {
            name: F.cross_entropy(logits[name].float(), labels[name][rows].to(device), ignore_index=IGNORE)
            for name in HEADS
        }
        loss = sum(losses.values(), torch.zeros((), device=device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        progress.log(step, loss=loss.item(), shape=losses["shape"].item())
        if (step + 1) % 300 == 0:
            checkpoint.save(step + 1)
    model.eval().cpu()
    with torch.no_grad():
        model.heads["shape"].bias[HEADS["shape"].index(NONE)] += arguments.none_bias
    record = {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "none_bias": arguments.none_bias,
        "training_images": len(images),
        "seconds": round(checkpoint.seconds()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(),
        "measured": measure(model, tokenizer.cpu(), arguments.seed + 20_000),
    }
    folder = arguments.out / "shapes-classifier"
    model.save_pretrained(folder)
    write_json(folder / "training.json", record)
    print(record["measured"], flush=True)
