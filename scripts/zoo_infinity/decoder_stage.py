"""Stage "decoder": go on with the tokenizer's decoder alone, on the fixed bits.

The encoder does not change, so neither do the bits, and a transformer trained on them stays valid. A share of the bits
is flipped on the way, as a generator gets some wrong: the decoder learns to draw a clean object all the same.
"""

from __future__ import annotations

import argparse

import torch

from pysteer.files import read_json
from pysteer.zoo.shapes.card import TRAINING
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer
from zoo_infinity.tokenizer_stage import finish
from zoo_training.common import (
    Average,
    Checkpoint,
    Progress,
    autocast,
    batch_rows,
    dataset,
    learning_rate,
    prepare,
    psnr,
    to_model_range,
)
from zoo_training.losses import reconstruction_loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--images", type=int, default=24000, help="renders to train on")
    parser.add_argument("--flip", type=float, default=0.03, help="largest share of flipped bits in a picture")


@torch.no_grad()
def flawed_features(
    model: ShapeTokenizer, images: torch.Tensor, flip: float, generator: torch.Generator
) -> torch.Tensor:
    """Summed codes of images, half of them with up to a share ``flip`` of the bits of scales 1.. wrong."""
    with autocast(images.device):
        features = model.encode(images)
    bits, _ = model.quantizer.encode(features.float())
    share = flip * torch.rand(len(images), 1, 1, generator=generator)
    share[::2] = 0.0
    flawed = [bits[0]]
    for part in bits[1:]:
        wrong = torch.rand(part.shape, generator=generator) < share
        flawed.append(part ^ wrong.to(part.device).long())
    return model.quantizer.decode(flawed)


def run(arguments: argparse.Namespace) -> None:
    """Train the decoder of the tokenizer in ``--out`` and save it there."""
    device = prepare(arguments)
    folder = arguments.out / "infinity-shapes" / "tokenizer"
    record = read_json(folder / TRAINING, "tokenizer record")
    _, images = dataset(arguments.images, arguments.seed + 3)
    model = ShapeTokenizer.from_pretrained(folder).to(device, memory_format=torch.channels_last)
    decoder = model.decoder.train()
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.01)
    average = Average(decoder, 0.998)
    checkpoint = Checkpoint(
        arguments.work / "decoder.pt", {"model": decoder, "optimiser": optimiser, "average": average}, arguments.fresh
    )
    start = checkpoint.load()
    progress = Progress("decoder", arguments.steps, start)
    for step in range(start, arguments.steps):
        rows = batch_rows(len(images), arguments.batch, arguments.seed + 1, step)
        batch = to_model_range(images[rows], device)
        summed = flawed_features(model, batch, arguments.flip, torch.Generator().manual_seed(step))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr, hold=0.3)
        with autocast(device):
            made = decoder(summed)
        loss = reconstruction_loss(made.float(), batch, edges=True)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        average.update(decoder)
        progress.log(step, loss=loss.item(), psnr=psnr(made.detach()[::2], batch[::2]).mean().item())
        if (step + 1) % 250 == 0:
            checkpoint.save(step + 1)
    decoder.load_state_dict(average.values)
    settings = {name: getattr(arguments, name) for name in ("steps", "batch", "lr", "images", "flip", "seed")}
    record["decoder"] = {**settings, "seconds": round(checkpoint.seconds())}
    finish(model, arguments, device, record)
