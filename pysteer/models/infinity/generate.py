"""Autoregressive generation over scales with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.models.infinity.bsq import MultiScaleBSQ
from pysteer.models.infinity.sampling import greedy_bits, row_uniform, sample_bits
from pysteer.models.infinity.transformer import Infinity, TextCondition


@dataclass
class Generation:
    """bits: per scale ``[B, L, d]`` int64; features: summed codes ``[B, d, H, W]`` fp32, ready to decode."""

    bits: list[Tensor]
    features: Tensor


def per_scale(value: float | Sequence[float], scales: int, what: str) -> list[float]:
    """Broadcast a number to every scale, or check the length of a list."""
    if isinstance(value, (int, float)):
        return [float(value)] * scales
    values = [float(v) for v in value]
    if len(values) != scales:
        raise InputError(what, value=values, allowed=f"one number or {scales} numbers (one per scale)")
    return values


def insertion_layers(items: Sequence[int], depth: int) -> tuple[tuple[int, ...], bool]:
    """Absolute layers after which guidance is mixed, and whether it is applied to the logits (item 0)."""
    layers = []
    for item in items:
        if item > 0 or depth + item <= 0:
            raise InputError("cfg_insertion_layer", value=item, allowed=f"0 (logits) or -{depth - 1}..-1 (layers)")
        if item < 0:
            layers.append(depth + item)
    return tuple(sorted(layers)), 0 in items


@torch.no_grad()
def generate(
    model: Infinity,
    text: TextCondition,
    *,
    seeds: Tensor,
    negative: TextCondition | None = None,
    cfg: float | Sequence[float] = 3.0,
    tau: float | Sequence[float] = 0.5,
    top_p: float = 0.97,
    greedy: bool = False,
    cfg_insertion_layer: Sequence[int] = (0,),
    forced_bits: Sequence[Tensor] | None = None,
    scales: Sequence[tuple[int, int]] | None = None,
    step: Callable[..., Tensor] | None = None,
    on_scale: Callable[[int, Tensor], None] | None = None,
) -> Generation:
    """Generate the bits of ``B = len(text.lengths)`` images.

    Args:
        seeds: int64 ``[B]``, one random stream per image.
        negative: text of the unconditional rows; default the learned unconditional text.
        cfg, tau: guidance factor and temperature, one number or one per scale. If every cfg is 1 there are no
            unconditional rows.
        top_p: nucleus threshold per bit; 1.0 switches it off.
        greedy: take the likelier value of every bit.
        cfg_insertion_layer: 0 mixes the logits, -k mixes the residual stream after layer ``depth - k``.
        forced_bits: bits of the first scales, taken instead of sampled ones (teacher forcing).
        scales: another schedule than the model's own.
        step: compiled ``model.scale_step``; default the plain method.
        on_scale: called as ``f(scale, logits [B, L, 2 d])``.
    """
    schedule = list(scales or model.config.scales)
    cfgs, taus = per_scale(cfg, len(schedule), "cfg"), per_scale(tau, len(schedule), "tau")
    layers, on_logits = insertion_layers(cfg_insertion_layer, model.config.depth)
    batch, guided = len(text.lengths), any(c != 1 for c in cfgs)
    if guided:
        text = TextCondition.cat([text, negative if negative is not None else model.unconditional(text)])
    rows = len(text.lengths)
    for listener in list(model.row_listeners):
        listener("visual", batch, rows - batch, None)
    model.clock.zero_()
    condition = model.condition(text)
    caches = model.new_caches(rows, sum(h * w for h, w in schedule))
    rope, x = model.rope(schedule), model.first_input(condition)
    quantiser = MultiScaleBSQ(model.config.code_dim, schedule, patchify=model.config.patchify)
    run, start, bits = step or model.scale_step, 0, []
    summed = torch.zeros(batch, model.config.code_dim, *quantiser.grid(-1), device=x.device)
    for i, (h, w) in enumerate(schedule):
        model.clock.fill_(i)
        guidance = torch.full((), cfgs[i], device=x.device)
        insertion = layers if cfgs[i] != 1 else ()
        piece = rope[:, start : start + h * w]
        h_out = run(x, model.clock, condition, piece, caches, start, guidance, insertion)
        start += h * w
        logits = _guided_logits(model, h_out, condition.pooled, batch, cfgs[i], on_logits) / taus[i]
        if on_scale is not None:
            on_scale(i, logits)
        if forced_bits is not None and i < len(forced_bits):
            scale_bits = forced_bits[i].to(x.device).reshape(batch, h * w, -1)
        elif greedy:
            scale_bits = greedy_bits(logits)
        else:
            scale_bits = sample_bits(logits, row_uniform(seeds, i, logits.shape[1] * logits.shape[2] // 2), top_p)
        bits.append(scale_bits)
        summed = quantiser.accumulate(summed, scale_bits, i)
        if i + 1 < len(schedule):
            x = model.embed(quantiser.next_input(summed, i + 1), rows)
    return Generation(bits, summed)


def _guided_logits(model: Infinity, x: Tensor, pooled: Tensor, batch: int, cfg: float, on_logits: bool) -> Tensor:
    """Logits of the images ``[B, L, 2 d]``: ``cfg * cond + (1 - cfg) * uncond`` where guidance acts on the logits."""
    if cfg != 1 and on_logits:
        logits = model.logits(x, pooled)
        return cfg * logits[:batch] + (1 - cfg) * logits[batch:]
    return model.logits(x[:batch], pooled[:batch])
