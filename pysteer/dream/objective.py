"""The losses a sparse autoencoder is trained on, and what their gradients need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer.ops.sae_decode import sae_decode
from pysteer.ops.sae_encode import sae_encode

_SMALL = 1e-8


@dataclass
class Weights:
    """Trainable tensors: `encoder` `[M, D]`, `encoder_bias` `[M]`, `decoder` `[M, D]`, `bias` `[D]`, and
    `log_threshold` `[M]` for JumpReLU, None for the others."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    bias: Tensor
    log_threshold: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """Of one batch: the loss to differentiate, its parts, L0, which latents fired `[M]` bool, and the smallest value
    of an active latent (infinite where none is)."""

    loss: Tensor
    fvu: Tensor
    aux: Tensor
    l0: Tensor
    fired: Tensor
    least: Tensor


def unexplained(x: Tensor, y: Tensor) -> Tensor:
    """Fraction of variance unexplained, `sum |x - y|^2 / sum |x - mean x|^2` over a batch `[N, D]`."""
    return (x - y).square().sum() / (x - x.mean(0)).square().sum().clamp_min(_SMALL)


def geometric_median(points: Tensor, rounds: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point `[D]` with the least summed distance to `points` `[N, D]` (Weiszfeld's iteration)."""
    middle = points.mean(0)
    for _ in range(rounds):
        weight = 1.0 / (points - middle).norm(dim=1).clamp_min(_SMALL)
        after = (weight[:, None] * points).sum(0) / weight.sum()
        moved = float((after - middle).norm())
        middle = after
        if moved <= tolerance * max(float(middle.norm()), _SMALL):
            break
    return middle


class _Jump(torch.autograd.Function):
    """`z` where `z > threshold`, else 0, and whether it is: `(f, active)`.

    The gradient in `z` passes where active. That in the threshold, which the formula does not have, is estimated with
    a rectangle of width `bandwidth` around it (Rajamanoharan et al. 2024, "Jumping Ahead", eq. 11 and 12).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        """See the class."""
        active = z > threshold
        ctx.save_for_backward(z, threshold, active)
        ctx.bandwidth = bandwidth
        return torch.where(active, z, 0.0), active.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """See the class."""
        in_value, in_active = gradients
        z, threshold, active = ctx.saved_tensors
        near = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        in_threshold = -(near * (threshold * in_value + in_active)).sum(0)
        return torch.where(active, in_value, 0.0), in_threshold, None


def _fired(indices: Tensor, values: Tensor, latents: int) -> Tensor:
    found = torch.zeros(latents + 1, dtype=torch.bool, device=values.device)
    found[torch.where((values > 0) & (indices >= 0), indices, latents).flatten().long()] = True
    return found[:-1]


def _aux(weights: Weights, x: Tensor, error: Tensor, dead: Tensor, most: int) -> Tensor:
    """How well the dead latents alone explain what the living ones do not, as a fraction of its variance (Gao et al.
    2024, "Scaling and evaluating sparse autoencoders", A.2); 0 where none is dead."""
    numbers = dead.nonzero()[:, 0]
    if not len(numbers) or not most:
        return x.new_zeros(())
    k = min(most, len(numbers))
    encoder, bias = weights.encoder[numbers], weights.encoder_bias[numbers]
    values, indices = (F.linear(x - weights.bias, encoder, bias)).topk(k, sorted=False)
    made = sae_decode(values.relu(), indices.int(), weights.decoder[numbers])
    error = error.detach()
    scale = min(len(numbers) / max(most, 1), 1.0)
    return scale * (made - error).square().sum() / (error - error.mean(0)).square().sum().clamp_min(_SMALL)


def top_loss(
    weights: Weights, x: Tensor, dead: Tensor, *, k: int, mode: str, multi: bool, alpha: float, most: int
) -> Outcome:
    """The loss of TopK and BatchTopK on tokens `x` `[N, D]`: FVU, `alpha` times that of the dead latents, and with
    `multi` an eighth of the FVU with 4 k latents per token.

    Args:
        weights: trainable tensors.
        x: tokens `[N, D]`.
        dead: `[M]` bool.
        k: active latents per token (on average with `mode` "batch_topk").
        mode: "topk" or "batch_topk".
        multi: whether to add the loss with 4 k latents.
        alpha: weight of the loss of the dead latents.
        most: dead latents used per token.
    """
    latents = len(weights.encoder)
    wide = min(4 * k, latents) if multi and mode == "topk" else k
    given: dict[str, Any] = {"bias": weights.encoder_bias, "pre_bias": weights.bias}
    values, indices = sae_encode(x, weights.encoder, k=wide, mode=mode, **given)
    first, numbers = (values[:, :k], indices[:, :k]) if mode == "topk" else (values, indices)
    y = sae_decode(first.contiguous(), numbers.contiguous(), weights.decoder, weights.bias)
    fvu = unexplained(x, y)
    aux = _aux(weights, x, x - y, dead, most) if alpha else x.new_zeros(())
    loss = fvu + alpha * aux
    if multi:
        if mode != "topk":
            values, indices = sae_encode(x, weights.encoder, k=min(4 * k, latents), mode="topk", **given)
        loss = loss + unexplained(x, sae_decode(values, indices, weights.decoder, weights.bias)) / 8
    seen = first.detach()
    positive = torch.where((seen > 0) & (numbers >= 0), seen, torch.inf)
    l0 = positive.isfinite().sum() / len(x)
    return Outcome(loss, fvu.detach(), aux.detach(), l0, _fired(numbers, seen, latents), positive.min())


def jump_loss(weights: Weights, x: Tensor, dead: Tensor, *, k: int, penalty: float, bandwidth: float,
              alpha: float, most: int) -> Outcome:  # fmt: skip
    """The loss of JumpReLU: FVU + `penalty` (L0 / k - 1)^2 where L0 is above k, + `alpha` times that of dead latents.

    Rajamanoharan et al. 2024 with their target for the number of active latents; thresholds are learned as logarithms.
    Arguments as in `top_loss`, `bandwidth` in units of the (scaled) activations.
    """
    assert weights.log_threshold is not None
    z = F.linear(x - weights.bias, weights.encoder, weights.encoder_bias).relu()
    values, active = _Jump.apply(z, weights.log_threshold.exp(), bandwidth)
    y = values @ weights.decoder + weights.bias
    fvu = unexplained(x, y)
    aux = _aux(weights, x, x - y, dead, most) if alpha else x.new_zeros(())
    l0 = active.sum() / len(x)
    loss = fvu + penalty * (l0 / k - 1).square() + alpha * aux
    seen = values.detach()
    least = torch.where(seen > 0, seen, torch.inf).min()
    return Outcome(loss, fvu.detach(), aux.detach(), l0.detach(), (seen > 0).any(0), least)


@torch.no_grad()
def keep_unit(decoder: Tensor) -> None:
    """Scale the directions `[M, D]` to length 1, in place."""
    decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_min(_SMALL))


@torch.no_grad()
def drop_parallel(decoder: Tensor) -> None:
    """Take from the gradient of every direction (of length 1) its part along the direction, in place."""
    if decoder.grad is not None:
        decoder.grad.sub_((decoder.grad * decoder).sum(1, keepdim=True) * decoder)
