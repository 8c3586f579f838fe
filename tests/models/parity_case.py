"""Small Infinity models with weights from a seed, and what the port computes on them: shared by the parity tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.generate import generate
from pysteer.models.infinity.schedule import scale_schedule
from pysteer.models.infinity.transformer import Infinity, TextCondition

FIXTURE = Path(__file__).parent / "fixtures" / "infinity_parity.safetensors"
CFG, TAU = 3.0, 0.5
LENGTHS = (5, 9)
SEED = 2


def small_config(**changes: object) -> InfinityConfig:
    """A two-block model over the published 256 px schedule."""
    shape = {"depth": 2, "dim": 64, "heads": 2, "bits": 8, "scales": tuple(scale_schedule("0.06M")), "chunks": 2}
    return InfinityConfig(**{**shape, "text_dim": 128, "text_maxlen": 32, **changes})  # type: ignore[arg-type]


def normal(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, fp32; NumPy's legacy generator is frozen, so they are the same everywhere."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape))).float()


def weights(config: InfinityConfig, seed: int) -> dict[str, Tensor]:
    """Weights large enough that every part of the model matters: unit-gain matrices, biases and gates of 0.1 to 0.5."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Infinity(config).state_dict().items()}
    state = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        draw = normal(seed * 1000 + index, shape)
        if name.endswith("zero_k_bias"):
            draw = torch.zeros(shape)
        elif name.endswith("scale_mul_1H11"):
            draw = draw * 0.3 + np.log(4.0)
        elif name.endswith(("norm.weight",)):
            draw = draw * 0.1 + 1.0
        elif name.endswith(("bias", "pos_start", "lvl_embed.weight")):
            draw = draw * 0.1
        elif name.endswith("ada_gss"):
            draw = draw * 0.3
        elif name.startswith(("shared_ada_lin", "head_nm")):
            draw = draw * 0.3 / shape[-1] ** 0.5
        else:
            draw = draw / shape[-1] ** 0.5
        state[name] = draw
    return state


def texts(config: InfinityConfig, lengths: Sequence[int], seed: int) -> TextCondition:
    """Random text hidden states; the padding is large on purpose, because it must not matter."""
    hidden = normal(seed, (len(lengths), max(lengths), config.text_dim)) * 0.2
    for row, length in enumerate(lengths):
        hidden[row, length:] = 1e3
    return TextCondition(hidden, torch.tensor(lengths))


def forced_bits(config: InfinityConfig, scales: Sequence[tuple[int, int]], batch: int, seed: int) -> list[Tensor]:
    """Random bits `[B, L, d]` of every scale."""
    return [(normal(seed + i, (batch, h * w, config.bits)) > 0).long() for i, (h, w) in enumerate(scales)]


def build(config: InfinityConfig, seed: int) -> Infinity:
    """The port with `weights(config, seed)`."""
    model = Infinity(config)
    model.load_state_dict(weights(config, seed), strict=True)
    return model.eval()


@dataclass
class PortRun:
    """As `official.OfficialRun`."""

    blocks: list[list[Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0))


def run_port(
    model: Infinity,
    text: TextCondition,
    *,
    scales: Sequence[tuple[int, int]] | None = None,
    cfg: float | Sequence[float] = CFG,
    tau: float | Sequence[float] = TAU,
    negative: TextCondition | None = None,
    insertion: Sequence[int] = (0,),
    forced: Sequence[Tensor] | None = None,
) -> PortRun:
    """Generate greedily, recording every block, the logits and the bits of every scale."""
    run, scales = PortRun(), list(scales or model.config.scales)

    def keep(module: torch.nn.Module, _: object, output: Tensor) -> None:
        if module is model.blocks[0]:
            run.blocks.append([])
        run.blocks[-1].append(output.detach().clone())

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        made = generate(
            model,
            text,
            seeds=torch.arange(len(text.lengths)),
            negative=negative,
            cfg=cfg,
            tau=tau,
            greedy=True,
            cfg_insertion_layer=insertion,
            forced_bits=forced,
            scales=scales,
            on_scale=lambda _, logits: run.logits.append(logits.detach().clone()),
        )
    finally:
        for handle in handles:
            handle.remove()
    run.bits, run.features = made.bits, made.features
    return run


def summary(run: Any) -> dict[str, Tensor]:
    """A run in some 140 kB: bits and logits whole; of every block output two tokens, and two numbers per token.

    The two numbers are the length and the projection on a fixed direction, so a change of any single token shows.
    """
    kept: dict[str, Tensor] = {}
    for scale, layers in enumerate(run.blocks):
        for layer, output in enumerate(layers):
            length, width = output.shape[1:]
            some = torch.linspace(0, length - 1, min(length, 2)).round().long()
            direction = torch.cos(torch.arange(width) * 0.7)
            kept[f"block.{scale}.{layer}.tokens"] = output[:, some].contiguous()
            kept[f"block.{scale}.{layer}.length"] = output.norm(dim=-1)
            kept[f"block.{scale}.{layer}.projection"] = output @ direction
        kept[f"logits.{scale}.all"] = run.logits[scale]
        kept[f"bits.{scale}.all"] = run.bits[scale].to(torch.uint8)
    return kept
