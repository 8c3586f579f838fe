"""Stage "tokenizer": the convolutional bit tokenizer, plain losses first (A), then edge-weighted ones (B)."""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from pysteer.files import write_image, write_json
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer
from zoo_training.common import (
    Average,
    Checkpoint,
    Progress,
    autocast,
    batch_rows,
    dataset,
    learning_rate,
    machine,
    prepare,
    psnr,
    sheet,
    to_model_range,
)
from zoo_training.losses import reconstruction_loss

COMMIT, ENTROPY = 0.1, 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=900, help="steps of part A")
    parser.add_argument("--edge-steps", type=int, default=1900, help="steps of part B (edge-weighted)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--images", type=int, default=24000, help="renders to train on")


def code_losses(units: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Commitment (squared distance to the code) and entropy (sure bits, evenly used), mean over scales."""
    commit = entropy = units[0].new_zeros(())
    for unit in units:
        dim = unit.shape[1]
        signs = torch.where(unit > 0, 1.0, -1.0) / dim**0.5
        commit = commit + (unit - signs).square().sum(1).mean() / len(units)
        chance = torch.sigmoid(4.0 * dim**0.5 * unit)
        even = chance.mean((0, 2, 3))
        entropy = entropy + (_bit_entropy(chance).mean() - _bit_entropy(even).mean()) / len(units)
    return commit, entropy


def _bit_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-5, 1.0 - 1e-5)
    return -(p * p.log() + (1.0 - p) * (1.0 - p).log())


@torch.no_grad()
def evaluate(model: ShapeTokenizer, images: Tensor, device: torch.device) -> Tensor:
    """PSNR per image through the bits."""
    parts = []
    for rows in images.split(64):
        values = to_model_range(rows, device)
        parts.append(psnr(model.reconstruct(values), values).cpu())
    return torch.cat(parts)


def finish(model: ShapeTokenizer, arguments: argparse.Namespace, device: torch.device, record: dict) -> None:
    """Save the averaged weights, a reconstruction sheet and the measured quality."""
    scenes, images = dataset(1024, arguments.seed + 10_000)
    folder = arguments.out / "infinity-shapes" / "tokenizer"
    model.eval().to(torch.bfloat16).to(torch.float32)  # measure what is stored
    values = evaluate(model, images, device)
    sizes = {
        size: values[[scene.size == size for scene in scenes]].mean().item() for size in ("small", "medium", "large")
    }
    quality = {"psnr_images": len(values), "psnr_mean": values.mean().item(), "psnr_min": values.min().item()}
    record |= {**quality, "psnr_by_size": sizes}
    model.save_pretrained(folder)
    shown = to_model_range(images[:48], device)
    made = model.reconstruct(shown)
    rows = [part for i in range(0, 48, 12) for part in (shown[i : i + 12], made[i : i + 12])]
    write_image(arguments.work / "tokenizer.png", sheet([row.cpu() for row in rows]))
    write_json(folder / "training.json", record)
    print(record, flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Train parts A and B and save."""
    device = prepare(arguments)
    began = time.monotonic()
    _, images = dataset(arguments.images, arguments.seed + 1)
    print(f"{len(images)} images rendered in {time.monotonic() - began:.1f} s", flush=True)
    model = ShapeTokenizer().to(device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.01)
    average = Average(model, 0.998)
    checkpoint = Checkpoint(
        arguments.work / "tokenizer.pt", {"model": model, "optimiser": optimiser, "average": average}, arguments.fresh
    )
    start = checkpoint.load()
    steps = arguments.steps + arguments.edge_steps
    progress = Progress("tokenizer", steps, start)
    for step in range(start, steps):
        rows = batch_rows(len(images), arguments.batch, arguments.seed, step)
        batch = to_model_range(images[rows], device)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, arguments.lr)
        with autocast(device):
            features = model.encode(batch)
        summed, units = model.quantizer.quantise(features.float())
        with autocast(device):
            made = model.decode(summed)
        commit, entropy = code_losses(units)
        loss = reconstruction_loss(made.float(), batch, step >= arguments.steps)
        total = loss + COMMIT * commit + ENTROPY * entropy
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(model)
        progress.log(step, loss=loss.item(), psnr=psnr(made.detach(), batch).mean().item(), commit=commit.item())
        if (step + 1) % 250 == 0:
            checkpoint.save(step + 1)
    model.load_state_dict(average.values)
    record = {
        "steps": arguments.steps,
        "edge_steps": arguments.edge_steps,
        "batch": arguments.batch,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "images": arguments.images,
        "seconds": round(checkpoint.seconds()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(),
    }
    finish(model, arguments, device, record)
