"""Training sparse autoencoders on tokens: TopK, BatchTopK and JumpReLU, with checkpoints that resume exactly.

What is done as in SAeUron (Cywinski and Deja 2025) and sparsify: FVU as the loss, an auxiliary loss for latents that
have died (Gao et al. 2024), the bias starting at the geometric median, directions of length 1 with the gradient along
them taken out, linear decay of the learning rate. What is done otherwise: the target of the auxiliary loss is the error
`x - y` without gradient (SAeUron has the opposite sign), BatchTopK keeps a running threshold so that inference does not
depend on the batch, and activations are scaled to a mean square of 1 per channel for training, which the result undoes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.dream.objective import (
    Outcome,
    Weights,
    drop_parallel,
    geometric_median,
    jump_loss,
    keep_unit,
    top_loss,
)
from pysteer.dream.sources import TokenSource
from pysteer.errors import InputError
from pysteer.models.sae import SparseAutoencoder

KINDS = ("topk", "batch_topk", "jumprelu")
EXPORTS = ("auto", "topk", "batch_topk", "threshold")
CHECKPOINT = "checkpoint.safetensors"
_FORMAT = "pysteer-sae-training-1"
_BETAS, _EPSILON = (0.9, 0.999), 6.25e-10
_MEDIAN_TOKENS = 4096
Tell = Callable[[int, int, dict[str, float]], object]


@dataclass(frozen=True)
class TrainConfig:
    """How a sparse autoencoder is trained.

    Attributes:
        activation: topk, batch_topk or jumprelu.
        k: active latents per token; for batch_topk on average, for jumprelu what the penalty aims at.
        expansion: latents per channel of the activation.
        latents: their number; 0 for expansion times the width.
        batch_tokens: tokens per step.
        epochs: times every token is seen.
        learning_rate: peak; 0 for 2e-4 / sqrt(latents / 2^14).
        warmup: steps of a linear rise; afterwards the rate falls linearly to 0.
        multi_topk: add an eighth of the loss with 4 k latents.
        auxk_alpha: weight of the loss of dead latents.
        dead_after: tokens without firing after which a latent counts as dead.
        clip: largest norm of the gradient.
        penalty: of jumprelu, weight of (L0 / k - 1)^2.
        bandwidth: of jumprelu, width of the rectangle that estimates gradients of thresholds.
        threshold: of jumprelu, at the start, in units of the scaled activations.
        momentum: of the running threshold of batch_topk.
        export: what the result chooses latents by: auto (threshold for batch_topk, itself for the others), topk,
            batch_topk, threshold.
        save_every: steps between checkpoints.
        seed: of the start and of the order of the tokens.
    """

    activation: str = "batch_topk"
    k: int = 32
    expansion: int = 16
    latents: int = 0
    batch_tokens: int = 4096
    epochs: int = 5
    learning_rate: float = 0.0
    warmup: int = 0
    multi_topk: bool = False
    auxk_alpha: float = 1 / 32
    dead_after: int = 10_000_000
    clip: float = 1.0
    penalty: float = 1.0
    bandwidth: float = 0.05
    threshold: float = 0.05
    momentum: float = 0.99
    export: str = "auto"
    save_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("activation", KINDS), ("export", EXPORTS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} of the training", value=getattr(self, name), allowed=", ".join(allowed))
        for name in ("k", "expansion", "batch_tokens", "epochs", "dead_after", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the training", value=getattr(self, name), allowed="a whole number above 0")
        for name in ("clip", "bandwidth", "threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} of the training", value=getattr(self, name), allowed="a number above 0")
        if not 0 <= self.momentum < 1:
            raise InputError("momentum of the training", value=self.momentum, allowed="0 to below 1")
        if self.export in ("topk", "batch_topk") and self.activation == "jumprelu":
            raise InputError("export of jumprelu", value=self.export, allowed="auto, threshold")
        if self.export in ("batch_topk", "threshold") and self.activation == "topk":
            raise InputError("export of topk", value=self.export, allowed="auto, topk")

    def size(self, width: int) -> int:
        """M, the number of latents for activations of `width`."""
        latents = self.latents or self.expansion * width
        if self.k > latents:
            raise InputError("k of the training", value=self.k, allowed=f"1 to {latents}, the number of latents")
        return latents

    def rate(self, latents: int) -> float:
        """The peak of the learning rate."""
        return self.learning_rate or 2e-4 / math.sqrt(latents / 2**14)


class Trainer:
    """The state of a training: weights, moments of Adam, what each latent did last, and the running threshold.

    Args:
        config: how.
        first: tokens `[n, D]` that the scale and the bias are taken from.
        total: steps of the whole training, for the decay of the learning rate.
    """

    def __init__(self, config: TrainConfig, first: Tensor, total: int) -> None:
        self.config, self.total, self.step = config, max(total, 1), 0
        width, device = first.shape[1], first.device
        latents = config.size(width)
        generator = torch.Generator().manual_seed(config.seed)
        self.scale = 1.0 / max(float((first - first.mean(0)).square().mean().sqrt()), 1e-12)
        scaled = first[:_MEDIAN_TOKENS] * self.scale
        encoder = (torch.rand(latents, width, generator=generator) * 2 - 1).div_(math.sqrt(width)).to(device)
        decoder = encoder.clone()
        keep_unit(decoder)
        limits = torch.full((latents,), math.log(config.threshold), device=device)
        jump = config.activation == "jumprelu"
        self.weights = Weights(
            encoder, torch.zeros(latents, device=device), decoder, geometric_median(scaled), limits if jump else None
        )
        for tensor in self.weights.named().values():
            tensor.requires_grad_(True)
        self.since = torch.zeros(latents, dtype=torch.int64, device=device)  # tokens since a latent fired
        self.least = 0.0  # running mean of the smallest active value, scaled; 0 before the first batch
        self.adam = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        values = list(self.weights.named().values())
        return torch.optim.Adam(values, lr=1.0, betas=_BETAS, eps=_EPSILON, fused=True)

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens, `[M]` bool."""
        return self.since >= self.config.dead_after

    def learning_rate(self) -> float:
        """At the present step: linear rise over `warmup`, then linear to 0."""
        rise = min(1.0, (self.step + 1) / max(self.config.warmup, 1))
        fall = (self.total - self.step) / self.total
        return self.config.rate(len(self.since)) * min(rise, fall)

    def advance(self, tokens: Tensor) -> dict[str, float]:
        """One step on tokens `[n, D]`; returns fvu, aux, l0, dead (a fraction) and lr."""
        x = tokens * self.scale
        keep_unit(self.weights.decoder)
        rate = self.learning_rate()
        for group in self.adam.param_groups:
            group["lr"] = rate
        dead = self.dead
        outcome = self._loss(x, dead)
        self.adam.zero_grad(set_to_none=True)
        outcome.loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.named().values()), self.config.clip)
        drop_parallel(self.weights.decoder)
        self.adam.step()
        self.since += len(x)
        self.since[outcome.fired] = 0
        least = float(outcome.least)
        if math.isfinite(least):
            m = self.config.momentum if self.step else 0.0
            self.least = m * self.least + (1 - m) * least
        self.step += 1
        parts = {"fvu": outcome.fvu, "aux": outcome.aux, "l0": outcome.l0, "dead": dead.float().mean()}
        return {**{name: float(value) for name, value in parts.items()}, "lr": rate}

    def _loss(self, x: Tensor, dead: Tensor) -> Outcome:
        c = self.config
        shared: dict[str, Any] = {"k": c.k, "alpha": c.auxk_alpha, "most": x.shape[1] // 2}
        if c.activation == "jumprelu":
            return jump_loss(self.weights, x, dead, penalty=c.penalty, bandwidth=c.bandwidth, **shared)
        return top_loss(self.weights, x, dead, mode=c.activation, multi=c.multi_topk, **shared)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the state by name."""
        found = {name: value.detach() for name, value in self.weights.named().items()}
        for name, value in self.weights.named().items():
            held = self.adam.state.get(value)
            if held:
                found |= {f"adam.{name}.{key}": held[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        numbers = torch.tensor([self.least, self.scale, self.step], dtype=torch.float64)
        return {**found, "since": self.since, "numbers": numbers}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.adam = self._optimiser()
        for name, value in self.weights.named().items():
            value.copy_(state[name])
            if f"adam.{name}.step" in state:
                keys = ("exp_avg", "exp_avg_sq", "step")
                self.adam.state[value] = {key: state[f"adam.{name}.{key}"].clone() for key in keys}
        self.since.copy_(state["since"])
        least, scale, step = state["numbers"].tolist()
        self.least, self.scale, self.step = least, scale, int(step)

    @torch.no_grad()
    def result(self, meta: dict[str, Any] | None = None) -> SparseAutoencoder:
        """The autoencoder for activations as they are: the scale of the training is undone."""
        c, w = self.config, self.weights
        keep_unit(w.decoder)
        kind = {"topk": "topk", "batch_topk": "threshold", "jumprelu": "threshold"}[c.activation]
        kind = kind if c.export == "auto" else c.export
        threshold = None
        if kind == "threshold":
            limits = torch.full_like(w.encoder_bias, self.least) if w.log_threshold is None else w.log_threshold.exp()
            threshold = limits.detach() / self.scale
        return SparseAutoencoder(
            encoder=w.encoder.detach().clone(),
            encoder_bias=w.encoder_bias.detach() / self.scale,
            decoder=w.decoder.detach().clone(),
            bias=w.bias.detach() / self.scale,
            activation="jumprelu" if kind == "threshold" else kind,
            k=None if kind == "threshold" else c.k,
            threshold=threshold,
            meta={"training": asdict(c), "steps": self.step, **(meta or {})},
        )


class _Order:
    """Which tokens every step sees: chunks in a shuffled order, and the tokens of a chunk shuffled."""

    def __init__(self, config: TrainConfig, sizes: list[int]) -> None:
        self.config = config
        self.batches = [max(1, size // config.batch_tokens) for size in sizes]
        self.per_epoch = sum(self.batches)
        self.total = self.per_epoch * config.epochs

    def _shuffled(self, count: int, *keys: int) -> Tensor:
        seed = 0
        for key in (self.config.seed, *keys):
            seed = (seed * 1_000_003 + key + 1) % (2**63)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def place(self, step: int) -> tuple[int, int, int]:
        """(epoch, chunk, batch in the chunk) of a step."""
        epoch, left = divmod(step, self.per_epoch)
        for chunk in self._shuffled(len(self.batches), epoch).tolist():
            if left < self.batches[chunk]:
                return epoch, chunk, left
            left -= self.batches[chunk]
        raise AssertionError("a step has a place in its epoch")

    def rows(self, epoch: int, chunk: int, size: int) -> Tensor:
        """The tokens of a chunk in the order of an epoch."""
        return self._shuffled(size, epoch, chunk, 1)


def train_sae(
    config: TrainConfig,
    source: TokenSource,
    folder: str | Path,
    *,
    meta: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    tell: Tell | None = None,
    log_every: int = 50,
) -> tuple[SparseAutoencoder, list[dict[str, float]]]:
    """Train an autoencoder; the same call continues, exactly, where an earlier one was interrupted.

    Args:
        config: how.
        source: tokens.
        folder: for the checkpoint.
        meta: kept with the result.
        device: where to train.
        tell: told `(step, steps, figures)` every `log_every` steps.
        log_every: steps between two entries of the history.

    Returns:
        The autoencoder, and the history: means of fvu, aux, l0 and dead over `log_every` steps each.

    Raises:
        InputError: the folder holds a training with another configuration or source.
    """
    path, order = Path(folder) / CHECKPOINT, _Order(config, list(source.sizes))
    first = source.chunk(0)
    trainer = Trainer(config, first[torch.randperm(len(first), generator=_generator(config))].to(device), order.total)
    identity = json.dumps([_FORMAT, asdict(config), source.width, list(source.sizes)])
    history = _load(trainer, path, identity)
    window: list[dict[str, float]] = []
    here: tuple[int, int] | None = None
    tokens = rows = first
    try:
        while trainer.step < order.total:
            epoch, chunk, batch = order.place(trainer.step)
            if here != (epoch, chunk):
                tokens = source.chunk(chunk)
                rows, here = order.rows(epoch, chunk, len(tokens)), (epoch, chunk)
            part = rows[batch * config.batch_tokens : (batch + 1) * config.batch_tokens]
            window.append(trainer.advance(tokens[part].to(device)))
            if trainer.step % log_every == 0 or trainer.step == order.total:
                history.append({"step": trainer.step, **_means(window)})
                window = []
                if tell is not None:
                    tell(trainer.step, order.total, history[-1])
            if trainer.step % config.save_every == 0:
                _save(trainer, path, identity, history)
    finally:
        _save(trainer, path, identity, history)
    return trainer.result(meta), history


def _generator(config: TrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed + 17)


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in window) / len(window) for name in window[0]}


def _save(trainer: Trainer, path: Path, identity: str, history: list[dict[str, float]]) -> None:
    files.write_safetensors(path, trainer.state(), {"identity": identity, "history": json.dumps(history)})


def _load(trainer: Trainer, path: Path, identity: str) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    state, metadata = files.read_safetensors(path, "checkpoint of the training")
    if metadata.get("identity") != identity:
        raise InputError(
            "checkpoint of another training", value=str(path), fix="choose another folder, or delete the checkpoint"
        )
    trainer.load(state)
    history: list[dict[str, float]] = json.loads(metadata["history"])
    return history
