"""Stage "unet": the text encoder and the UNet, jointly, on the autoencoder's latents (v-prediction)."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from pysteer.files import read_json, write_json
from pysteer.zoo.shapes.captions import MAX_TOKENS, STATED, build_text_tokenizer, captions_of, vocabulary
from pysteer.zoo.shapes.card import TRAINING
from pysteer.zoo.shapes.classifier import ShapeClassifier
from pysteer.zoo.shapes.evaluate import evaluate
from zoo_diffusion.sampling import DEFAULTS, Sampler
from zoo_diffusion.vae_stage import CHANNELS, NAME, latent_means
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
)
from zoo_training.parallel import Optimizers, join, spawn

TEXT_WIDTH, HEAD = 128, 32
WIDTHS, HEADS = (96, 112), (3, 4)
VALIDATION_SEED = 7919


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hold", type=float, default=0.5, help="share of the steps before the rate falls")
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions replaced by the empty one")
    parser.add_argument("--images", type=int, default=40000, help="renders to train on")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--judge-every", type=int, default=1000, help="steps between looks at generated images")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="share each batch between processes; two of one thread beat one of two",
    )


def new_text_encoder() -> CLIPTextModel:
    """A two-layer CLIP text model for the words of the shapes captions.

    Positions start as sinusoids in a head's worth of channels of their own, and two heads of the first layer start by
    looking at the previous word and the one before: without word order "a red square on blue" reads like "a blue
    square on red", and order takes long to be found.
    """
    words = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=TEXT_WIDTH // HEAD, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
        pad_token_id=words["<pad>"], bos_token_id=words["</s>"], eos_token_id=words["</s>"],
    )  # fmt: skip
    model = CLIPTextModel(config)
    inner = getattr(model, "text_model", model)
    angle = torch.arange(MAX_TOKENS)[:, None] * math.pi * (torch.arange(HEAD // 2) + 0.5) / (HEAD // 2)
    attention = inner.encoder.layers[0].self_attn
    with torch.no_grad():
        nn.init.normal_(inner.embeddings.token_embedding.weight)
        inner.embeddings.token_embedding.weight[:, :HEAD] = 0.0
        inner.embeddings.position_embedding.weight.zero_()
        inner.embeddings.position_embedding.weight[:, :HEAD] = torch.cat([angle.cos(), angle.sin()], 1)
        for head, shift in enumerate((1, 2)):
            rows = slice(head * HEAD, (head + 1) * HEAD)
            turn = shift * angle[1]
            cosine, sine = torch.diag(turn.cos()), torch.diag(turn.sin())
            rotation = torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])
            attention.q_proj.weight[rows] = 0.0
            attention.k_proj.weight[rows] = 0.0
            attention.q_proj.weight[rows, :HEAD] = 1.5 * torch.eye(HEAD)
            attention.k_proj.weight[rows, :HEAD] = 1.5 * rotation
    return model


def new_unet() -> UNet2DConditionModel:
    """Two levels (8 x 8 and 4 x 4 latents), each with self- and cross-attention."""
    return UNet2DConditionModel(  # its attention_head_dim is the number of heads
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=WIDTHS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=HEADS,
        norm_num_groups=16,
    )  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas rescaled to end in pure noise (Lin et al. 2024), so that a background colour cannot
    be read off the last step; v-prediction, 20 trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
        clip_sample=False,
    )  # fmt: skip


class CaptionedUNet(nn.Module):
    """Text encoder and UNet as one module, so that they share optimizer, average and checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = new_unet()
        self.text_encoder = new_text_encoder()

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """The predicted v [B, C, 8, 8] of noisy latents, timesteps [B] and caption ids [B, 20]."""
        return self.unet(noisy, steps, self.text_encoder(ids).last_hidden_state, return_dict=False)[0]


def is_matrix(name: str) -> bool:
    """Whether a two-dimensional parameter is one of the attention blocks' or the encoder's matrices."""
    return any(part in name for part in ("transformer_blocks", "encoder.layers"))


class Latents:
    """Encoded renders fp32 [N, C, 8, 8] and caption ids [N, 20]; the encoding is kept in a file of ``--work``."""

    def __init__(self, vae: AutoencoderKL, count: int, seed: int, device: torch.device, work: Path) -> None:
        path = work / f"diffusion-latents-{seed}-{count}.pt"
        scenes, images = dataset(count, seed)
        words = build_text_tokenizer()
        encoded = words(captions_of(scenes), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        self.ids = encoded["input_ids"].to(device)
        self.empty = words("", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")["input_ids"].to(device)
        if not path.is_file():
            with autocast(device):
                torch.save(latent_means(vae, images, device).float(), path)
        self.values = torch.load(path, weights_only=True).to(device)

    def batch(self, rows: Tensor, drop: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents, noise, timesteps (spread evenly over the batch) and ids, a share ``drop`` of them empty."""
        rows = rows.to(self.ids.device)
        latents = self.values[rows]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        spread = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        dropped = (torch.rand(len(rows), 1, generator=generator) < drop).to(latents.device)
        return (
            latents,
            noise,
            (1000 * spread).long().to(latents.device),
            torch.where(dropped, self.empty, self.ids[rows]),
        )


def velocity_loss(model: nn.Module, scheduler: DDIMScheduler, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Squared error of the predicted velocity."""
    latents, noise, steps, ids = batch
    noisy = scheduler.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
    with autocast(latents.device):
        made = model(noisy, steps, ids)
    return F.mse_loss(made.float(), scheduler.get_velocity(latents, noise, steps))


@torch.no_grad()
def validate(model: nn.Module, scheduler: DDIMScheduler, data: Latents) -> float:
    """Mean loss on held-out scenes with fixed noise."""
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    parts = [
        velocity_loss(model, scheduler, data.batch(rows, 0.0, generator)).item()
        for rows in torch.arange(len(data.ids)).split(64)
    ]
    return sum(parts) / len(parts)


class Exporter:
    """Writes the averaged weights as a pipeline folder (bf16) and notes how good they are."""

    def __init__(self, arguments: argparse.Namespace, vae: AutoencoderKL, device: torch.device) -> None:
        self.arguments, self.vae, self.device = arguments, vae, device
        self.out = arguments.out / NAME
        self.held_out = Latents(vae, 512, VALIDATION_SEED, device, arguments.work)
        self.judge = ShapeClassifier.from_pretrained(arguments.out / "shapes-classifier").to(device)

    def __call__(self, average: Average, step: int, look: bool) -> dict[str, Any]:
        """Save, and return the validation loss and, with ``look``, rates on 128 captions."""
        scheduler = new_scheduler()
        averaged = CaptionedUNet().to(self.device)
        averaged.load_state_dict(average.values)
        note: dict[str, Any] = {"step": step, "validation_loss": validate(averaged.eval(), scheduler, self.held_out)}
        if look:
            pipe = pipeline(averaged, self.vae, scheduler)
            found = evaluate(Sampler(pipe), self.judge, count=128, seed=VALIDATION_SEED, batch=64, **DEFAULTS)
            overall = found.results["overall"]
            note |= {name: overall[name]["value"] for name in ("shape", "colour", "position", "background")}
        print("  ".join(f"{k} {v:.4g}" for k, v in note.items()), flush=True)
        save(averaged, self.vae, scheduler, self.out)
        return note


def pipeline(model: CaptionedUNet, vae: AutoencoderKL, scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    """The parts as one pipeline, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=model.text_encoder, tokenizer=build_text_tokenizer(), unet=model.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save(model: CaptionedUNet, vae: AutoencoderKL, scheduler: DDIMScheduler, folder: Path) -> None:
    """Write a Stable Diffusion folder in bfloat16; the model and the autoencoder are rounded in place."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it advises against .to(), which is what rounds here
    model.to(torch.bfloat16)
    pipeline(model, vae.to(torch.bfloat16), scheduler).save_pretrained(folder)
    path = folder / "vae" / "config.json"  # diffusers writes down where on this machine the autoencoder came from
    write_json(path, {k: v for k, v in read_json(path).items() if k != "_name_or_path"})
    vae.float()
    # The encoder would otherwise load as bfloat16 beside a UNet in float32.
    config = read_json(folder / "text_encoder" / "config.json", "text encoder config")
    write_json(folder / "text_encoder" / "config.json", {**config, "dtype": "float32"})
    # transformers 5 has another name for this class, and 4 knows only this one.
    index = read_json(folder / "model_index.json", "pipeline index")
    write_json(folder / "model_index.json", {**index, "tokenizer": ["transformers", "PreTrainedTokenizerFast"]})


def run(arguments: argparse.Namespace) -> None:
    """Encode the renders, then train, with a checkpoint and an exported pipeline every ``--save-every`` steps."""
    device = prepare(arguments)
    vae = AutoencoderKL.from_pretrained(arguments.out / NAME / "vae").float().eval().to(device)
    Latents(vae, arguments.images, arguments.seed + 1, device, arguments.work)
    spawn(train, arguments)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """The work of one process."""
    device, world = prepare(arguments), arguments.processes
    join(rank, arguments)
    vae = AutoencoderKL.from_pretrained(arguments.out / NAME / "vae").float().eval().to(device)
    data = Latents(vae, arguments.images, arguments.seed + 1, device, arguments.work)
    model = CaptionedUNet().to(device, memory_format=torch.channels_last).train()
    model.unet.set_attn_processor(AttnProcessor())  # plain matmuls: their backward is faster than SDPA's on a CPU
    scheduler, export = new_scheduler(), Exporter(arguments, vae, device) if rank == 0 else None
    optimizer = Optimizers(model, arguments.lr, is_matrix, rank, world)
    average = Average(model, arguments.ema)
    parts = {"model": model, "average": average, "muon": optimizer.muon, "adamw": optimizer.adamw}
    checkpoint = Checkpoint(arguments.work / f"diffusion-unet.{rank}of{world}.pt", parts, arguments.fresh)
    start = checkpoint.load()
    progress, history = Progress("unet", arguments.steps, start), []
    for step in range(start, arguments.steps):
        generator = torch.Generator().manual_seed(arguments.seed * 7_368_787 + step + 15_485_863 * rank)
        rows = batch_rows(len(data.ids), arguments.batch, arguments.seed, step).chunk(world)[rank]
        loss = velocity_loss(model, scheduler, data.batch(rows, arguments.drop, generator))
        loss.backward()
        norm = optimizer.step(learning_rate(step, arguments.steps, arguments.lr, hold=arguments.hold, warmup=100))
        average.update(model)
        last = step + 1 == arguments.steps
        if rank == 0:
            progress.log(step, loss=loss.item(), norm=norm)
        if (step + 1) % arguments.save_every == 0 or last:
            checkpoint.save(step + 1)
            if export is not None:
                history.append(export(average, step + 1, look=(step + 1) % arguments.judge_every == 0 or last))
                write_record(arguments, history, checkpoint.seconds())


def write_record(arguments: argparse.Namespace, history: list[dict[str, Any]], seconds: float) -> None:
    """How these weights were trained, for the model card."""
    settings = {k: v for k, v in vars(arguments).items() if isinstance(v, (int, float, str)) and k != "stage"}
    record = {"settings": settings, "history": history, "seconds": seconds, "captions": STATED, **machine()}
    write_json(arguments.out / NAME / "unet" / TRAINING, record)
