"""Stage "vae": an AutoencoderKL, 64 x 64 pixels <-> 8 latent channels of 8 x 8, edge-weighted losses, little KL."""

from __future__ import annotations

import argparse
import warnings

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from pysteer.files import write_image, write_json
from pysteer.zoo.shapes.captions import IMAGE_SIDE
from pysteer.zoo.shapes.card import TRAINING
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

NAME = "diffusion-shapes"
CHANNELS = 8
# Per latent element. Enough for a posterior a few percent wide, so that the decoder takes slightly wrong latents.
KL = 0.001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--plain-steps", type=int, default=500, help="of these, before edges are weighted")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=24000, help="renders to train on")


def new_vae() -> AutoencoderKL:
    """The untrained autoencoder.

    Its widest maps have few channels: group norm at 64 x 64 is what a step costs. One group: with several, flat
    pictures lose their colours in every norm. Residual branches start at zero.
    """
    widths = (16, 32, 64, 96)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=IMAGE_SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, ResnetBlock2D):
                block.conv2.weight.zero_()
                block.conv2.bias.zero_()
        # A narrow posterior, the same everywhere.
        model.quant_conv.weight[CHANNELS:] = 0.0
        model.quant_conv.bias[CHANNELS:] = -6.0
    return model


@torch.no_grad()
def latent_means(model: AutoencoderKL, images: Tensor, device: torch.device, chunk: int = 64) -> Tensor:
    """Posterior means fp32 [N, C, 8, 8] of uint8 images."""
    return torch.cat([model.encode(to_model_range(p, device)).latent_dist.mean.cpu() for p in images.split(chunk)])


@torch.no_grad()
def standardise(model: AutoencoderKL, means: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 by changing the two 1 x 1 convolutions around the latents."""
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    inward, outward = model.quant_conv, model.post_quant_conv
    outward.bias += outward.weight[:, :, 0, 0] @ shift
    outward.weight *= scale[None, :, None, None]
    inward.weight[:CHANNELS] /= scale[:, None, None, None]
    inward.bias[:CHANNELS] = (inward.bias[:CHANNELS] - shift) / scale
    inward.bias[CHANNELS:] -= 2.0 * scale.log()


@torch.no_grad()
def measure(model: AutoencoderKL, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """PSNR on fresh renders, the width of the posterior, and a sheet of reconstructions in ``--work``."""
    scenes, images = dataset(512, arguments.seed + 10_000)
    values, widths = [], []
    for part in images.split(64):
        batch = to_model_range(part, device)
        posterior = model.encode(batch).latent_dist
        values.append(psnr(model.decode(posterior.mean).sample.clamp(-1, 1), batch).cpu())
        widths.append(posterior.std.mean().item())
    quality = torch.cat(values)
    shown = to_model_range(images[:48], device)
    made = model.decode(model.encode(shown).latent_dist.mean).sample
    rows = [part for i in range(0, 48, 12) for part in (shown[i : i + 12], made[i : i + 12])]
    write_image(arguments.work / "vae.png", sheet([row.cpu() for row in rows]))
    return {
        "psnr_images": len(quality),
        "psnr_mean": quality.mean().item(),
        "psnr_min": quality.min().item(),
        "psnr_by_size": {
            size: quality[[scene.size == size for scene in scenes]].mean().item()
            for size in ("small", "medium", "large")
        },
        "posterior_std": sum(widths) / len(widths),
    }


def finish(model: AutoencoderKL, images: Tensor, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Standardise, round to bfloat16, save, and measure what was saved."""
    standardise(model, latent_means(model, images[:2048], device))
    model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(arguments.out / NAME / "vae")
    return measure(model.float(), arguments, device)


def run(arguments: argparse.Namespace) -> None:
    """Train, standardise, save."""
    device = prepare(arguments)
    model = new_vae().to(device, memory_format=torch.channels_last).train()
    _, images = dataset(arguments.images, arguments.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.01)
    average = Average(model, 0.998)
    parts = {"model": model, "optimiser": optimiser, "average": average}
    checkpoint = Checkpoint(arguments.work / "diffusion-vae.pt", parts, arguments.fresh)
    start = checkpoint.load()
    progress = Progress("vae", arguments.steps, start)
    for step in range(start, arguments.steps):
        rows = batch_rows(len(images), arguments.batch, arguments.seed, step)
        batch = to_model_range(images[rows], device)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        with autocast(device):
            posterior = model.encode(batch).latent_dist
            made = model.decode(posterior.sample()).sample
        loss = reconstruction_loss(made.float(), batch, edges=step >= arguments.plain_steps)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimiser.zero_grad(set_to_none=True)
        (loss + KL * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(model)
        std = posterior.std.mean().item() / posterior.mean.std().item()
        progress.log(step, loss=loss.item(), psnr=psnr(made.detach(), batch).mean().item(), kl=kl.item(), std=std)
        if (step + 1) % 200 == 0:
            checkpoint.save(step + 1)
    model.load_state_dict(average.values)
    model.eval()
    settings = {name: getattr(arguments, name) for name in ("steps", "plain_steps", "batch", "lr", "images", "seed")}
    record = {
        **settings,
        "kl": KL,
        "seconds": round(checkpoint.seconds()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(),
        **finish(model, images, arguments, device),
    }
    write_json(arguments.out / NAME / "vae" / TRAINING, record)
    print(record, flush=True)
