"""Stage "transformer": the text encoder and the Infinity transformer, jointly, on the tokenizer's bits."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.files import write_json
from pysteer.models.infinity.bsq import MultiScaleBSQ
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.models.infinity.transformer import Infinity, TextCondition
from pysteer.zoo.shapes.captions import MAX_TOKENS, STATED, build_text_tokenizer, captions_of, vocabulary
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
    to_model_range,
)
from zoo_training.parallel import Optimizers, join, spawn

NAME = "infinity-shapes"
DEFAULTS = {"cfg": 3.0, "tau": 0.5, "top_p": 1.0}
VALIDATION_SEED = 7919


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this stage."""
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--flip", type=float, default=0.1, help="largest flip probability of self-correction")
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions replaced by the unconditional text")
    parser.add_argument("--images", type=int, default=60000, help="renders to train on")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="share each batch between processes; two of one thread beat one of two",
    )


class CaptionedInfinity(nn.Module):
    """Text encoder and transformer as one module, so that they share optimizer, average and checkpoint."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.transformer = Infinity(config)
        self.text_encoder = small_text_encoder(config.text_dim)

    def forward(self, ids: Tensor, inputs: Tensor, dropped: Tensor) -> Tensor:
        """Logits [B, tokens, 2 bits] of captions [B, T]; rows in ``dropped`` see the unconditional text."""
        mask = ids != 0
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        text = TextCondition(hidden, mask.sum(-1))
        uncond = self.transformer.unconditional(text).hidden
        text.hidden = torch.where(dropped[:, None, None], uncond, hidden)
        return self.transformer(text, inputs)


def small_text_encoder(width: int) -> nn.Module:
    """A two-layer T5 encoder for the words of the shapes captions."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(vocabulary()), d_model=width, d_kv=32, d_ff=4 * width, num_layers=2, num_heads=width // 32,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    # Heads that start by looking at the next word, the previous word and the neighbourhood. From T5's own start the
    # bias stayed flat for 1,500 steps: without word order "a red square on blue" reads like "a blue square on red".
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    previous, following = torch.arange(16), torch.arange(16, 32)
    with torch.no_grad():
        bias.zero_()
        bias[following[1], 0] = bias[previous[1], 1] = 5.0
        bias[previous, 2] = bias[following, 2] = -0.7 * torch.arange(16.0)
    return encoder


def is_matrix(name: str) -> bool:
    """Whether a two-dimensional parameter is one of a block's or the encoder's matrices."""
    inside = any(part in name for part in ("block_chunks", "encoder.block", "text_proj_for_ca"))
    return inside and "relative_attention_bias" not in name


class Bits:
    """Encoded training images: features fp16 [N, d, h, w] and caption ids; draws self-corrected batches."""

    def __init__(self, tokenizer: ShapeTokenizer, count: int, seed: int, device: torch.device) -> None:
        scenes, images = dataset(count, seed)
        words = build_text_tokenizer()
        encoded = words(captions_of(scenes), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        self.ids = encoded["input_ids"].to(device)
        with torch.no_grad(), autocast(device):
            parts = [tokenizer.encode(to_model_range(part, device)).half() for part in images.split(512)]
        self.features = torch.cat(parts).contiguous()
        self.quantiser: MultiScaleBSQ = tokenizer.quantizer

    def batch(self, rows: Tensor, flip: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Caption ids, next-scale inputs and bit labels [B, tokens, d] of some rows."""
        rows = rows.to(self.ids.device)
        features = self.features[rows].float()
        chance = None
        if flip:
            chance = flip * torch.rand(len(rows), len(self.quantiser.scales), generator=generator).to(features.device)
        bits, inputs = self.quantiser.encode(features, chance)
        ids = self.ids[rows]
        longest = int((ids != 0).sum(-1).max())
        return ids[:, :longest], inputs, torch.cat(bits, 1)


def bit_loss(logits: Tensor, bits: Tensor) -> Tensor:
    """Binary cross-entropy per bit, [B, tokens]."""
    pair = logits.float().unflatten(-1, (-1, 2))
    return F.binary_cross_entropy_with_logits(pair[..., 1] - pair[..., 0], bits.float(), reduction="none").mean(-1)


@torch.no_grad()
def validate(model: CaptionedInfinity, data: Bits, device: torch.device) -> list[float]:
    """Mean loss per scale on held-out scenes, without flips."""
    losses = []
    for start in range(0, len(data.ids), 64):
        ids, inputs, bits = data.batch(torch.arange(start, min(start + 64, len(data.ids))), 0.0, None)
        with autocast(device):
            logits = model(ids, inputs, torch.zeros(len(ids), dtype=torch.bool, device=device))
        losses.append(bit_loss(logits, bits).mean(0))
    mean = torch.stack(losses).mean(0)
    return [float(part.mean()) for part in mean.split([h * w for h, w in data.quantiser.scales])]


def steps(arguments: argparse.Namespace, start: int) -> Iterator[tuple[int, torch.Generator, float]]:
    """Step number, its own random stream, and its learning rate."""
    for step in range(start, arguments.steps):
        generator = torch.Generator().manual_seed(arguments.seed * 7_368_787 + step)
        yield step, generator, learning_rate(step, arguments.steps, arguments.lr, hold=0.45, warmup=100)


def run(arguments: argparse.Namespace) -> None:
    """Train, with a checkpoint and an exported pipeline every ``--save-every`` steps."""
    spawn(train, arguments)


def train(rank: int, arguments: argparse.Namespace) -> None:
    """The work of one process."""
    device, world = prepare(arguments), arguments.processes
    join(rank, arguments)
    out = arguments.out / NAME
    tokenizer = ShapeTokenizer.from_pretrained(out / "tokenizer").to(device)
    config = InfinityConfig(
        depth=6, dim=192, heads=4, bits=tokenizer.config.dim, scales=tuple(tokenizer.quantizer.scales), text_dim=128,
        text_maxlen=MAX_TOKENS, chunks=2,
    )  # fmt: skip
    model = CaptionedInfinity(config).to(device)
    optimizer = Optimizers(model, arguments.lr, is_matrix, rank, world)
    average = Average(model, arguments.ema)
    parts = {"model": model, "average": average, "muon": optimizer.muon, "adamw": optimizer.adamw}
    checkpoint = Checkpoint(arguments.work / f"transformer.{rank}of{world}.pt", parts, arguments.fresh)
    start = checkpoint.load()
    data = Bits(tokenizer, arguments.images, arguments.seed + 1, device)
    held_out = Bits(tokenizer, 1024, VALIDATION_SEED, device) if rank == 0 else None
    progress, began, history = Progress("transformer", arguments.steps, start), time.monotonic(), []
    for step, generator, lr in steps(arguments, start):
        generator.manual_seed(generator.initial_seed() + 15_485_863 * rank)
        rows = batch_rows(len(data.ids), arguments.batch, arguments.seed, step).chunk(world)[rank]
        ids, inputs, bits = data.batch(rows, arguments.flip, generator)
        dropped = (torch.rand(len(ids), generator=generator) < arguments.drop).to(device)
        with autocast(device):
            logits = model(ids, inputs, dropped)
        loss = bit_loss(logits, bits).mean()
        loss.backward()
        norm = optimizer.step(lr)
        average.update(model)
        if rank == 0:
            progress.log(step, loss=loss.item(), norm=norm)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            checkpoint.save(step + 1)
            if held_out is not None:
                history.append(export(out, config, average, held_out, device, step + 1, began))
                write_record(arguments, out, history, time.monotonic() - began)


def export(
    out: Path, config: InfinityConfig, average: Average, held_out: Bits, device: torch.device, step: int, began: float
) -> dict[str, Any]:
    """Write the averaged weights as a pipeline folder (bf16) and return the validation losses."""
    averaged = CaptionedInfinity(config).to(device)
    averaged.load_state_dict(average.values)
    losses = validate(averaged.eval(), held_out, device)
    print(f"step {step}: validation loss per scale {' '.join(f'{v:.4f}' for v in losses)}", flush=True)
    tokenizer = ShapeTokenizer.from_pretrained(out / "tokenizer")  # as it is now: its decoder may have been refined
    pipeline = InfinityPipeline(
        averaged.transformer, tokenizer, averaged.text_encoder, build_text_tokenizer(), DEFAULTS
    )
    pipeline.save_pretrained(out, dtype=torch.bfloat16)
    return {"step": step, "validation_loss_per_scale": losses, "seconds": time.monotonic() - began}


def write_record(arguments: argparse.Namespace, out: Path, history: list[dict], seconds: float) -> None:
    """How these weights were trained, for the model card."""
    settings = {k: v for k, v in vars(arguments).items() if isinstance(v, (int, float, str)) and k != "stage"}
    record = {"settings": settings, "history": history, "seconds": seconds, "captions": STATED, **machine()}
    write_json(out / "transformer" / "training.json", record)
