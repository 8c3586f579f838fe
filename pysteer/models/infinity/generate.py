"""Autoregressive generation over scales with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError, PysteerError
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


class Decoding:
    """A generation that can stop after any scale and fork: rows that go the same way up to there are computed once.

    `advance(until)` computes scales, `fork(rows)` makes a generation whose row i goes on from row `rows[i]`. The image
    of a row depends on its own seed alone, so it is the same with and without forks, up to rounding.

    Args:
        model, text, seeds, negative, cfg, tau, top_p, greedy, cfg_insertion_layer, forced_bits, scales, step, on_scale:
            see `generate`.

    Attributes:
        at: how many scales are done.
        bits, summed: what they gave, see `Generation`.
        finite: bool `[B]`, false for a row whose logits were NaN or infinite at some scale.
    """

    def __init__(
        self,
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
    ) -> None:
        self.model, self.seeds, self.top_p, self.greedy = model, seeds, top_p, greedy
        self.forced, self.on_scale = forced_bits, on_scale
        self.schedule = list(scales or model.config.scales)
        self.cfgs, self.taus = per_scale(cfg, len(self.schedule), "cfg"), per_scale(tau, len(self.schedule), "tau")
        self.insertion, self.on_logits = insertion_layers(cfg_insertion_layer, model.config.depth)
        self.run = step or model.scale_step
        self.quantiser = MultiScaleBSQ(model.config.code_dim, self.schedule, patchify=model.config.patchify)
        self.batch = len(text.lengths)
        if any(factor != 1 for factor in self.cfgs):
            text = TextCondition.cat([text, negative if negative is not None else model.unconditional(text)])
        self.rows = len(text.lengths)
        self._announce()
        with torch.no_grad():
            model.clock.zero_()
            self.condition = model.condition(text)
            self.caches = model.new_caches(self.rows, sum(h * w for h, w in self.schedule))
            self.x = model.first_input(self.condition)
        self.summed = torch.zeros(self.batch, model.config.code_dim, *self.quantiser.grid(-1), device=self.x.device)
        self.finite = torch.ones(self.batch, dtype=torch.bool, device=self.x.device)
        self.bits: list[Tensor] = []
        self.at = self.start = 0
        self.twin: Tensor | None = None  # which unconditional row each image has, where images share them

    def _announce(self) -> None:
        self._announced = self.rows
        for listener in list(self.model.row_listeners):
            listener("visual", self.batch, self.rows - self.batch, None)

    @torch.no_grad()
    def advance(self, until: int | None = None) -> Decoding:
        """Compute the scales before `until`, by default all that are left."""
        end = len(self.schedule) if until is None else until
        if not self.at <= end <= len(self.schedule):
            raise InputError("scale to go on to", value=end, allowed=f"{self.at} to {len(self.schedule)}")
        if self.at and end > self.at:  # whoever steers now may not be who steered before
            self._announce()
        while self.at < end:
            self._scale()
        return self

    def _scale(self) -> None:
        model, i = self.model, self.at
        h, w = self.schedule[i]
        model.clock.fill_(i)
        guidance = torch.full((), self.cfgs[i], device=self.x.device)
        insertion = self.insertion if self.cfgs[i] != 1 else ()
        rope = model.rope(self.schedule)[:, self.start : self.start + h * w]
        out = self.run(self.x, model.clock, self.condition, rope, self.caches, self.start, guidance, insertion)
        self.start += h * w
        logits = self._logits(out, self.cfgs[i])
        logits = logits / self.taus[i]
        self.finite &= torch.isfinite(logits.sum((1, 2)))
        if self.on_scale is not None:
            self.on_scale(i, logits)
        if self.forced is not None and i < len(self.forced):
            bits = self.forced[i].to(self.x.device).reshape(self.batch, h * w, -1)
        elif self.greedy:
            bits = greedy_bits(logits)
        else:
            uniform = row_uniform(self.seeds, i, logits.shape[1] * logits.shape[2] // 2)
            bits = sample_bits(logits, uniform, self.top_p)
        self.bits.append(bits)
        self.summed = self.quantiser.accumulate(self.summed, bits, i)
        self.at += 1
        if self.at < len(self.schedule):
            self._part_twins()
            self.x = model.embed(self.quantiser.next_input(self.summed, self.at), self.rows)
        else:
            self.caches = []  # the decoder needs the memory

    def _logits(self, x: Tensor, cfg: float) -> Tensor:
        """Logits of the images ``[B, L, 2 d]``: ``cfg * cond + (1 - cfg) * uncond`` where guidance acts on them."""
        if cfg == 1 or not self.on_logits:
            return self.model.logits(x[: self.batch], self.condition.pooled[: self.batch])
        logits = self.model.logits(x, self.condition.pooled)
        cond, uncond = logits[: self.batch], logits[self.batch :]
        return cfg * cond + (1 - cfg) * (uncond if self.twin is None else uncond[self.twin])

    def _part_twins(self) -> None:
        """Give every image an unconditional row of its own again: from now on their inputs differ."""
        if self.twin is None:
            return
        both = torch.cat([torch.arange(self.batch, device=self.x.device), self.batch + self.twin])
        self.condition = self.condition.take(both)
        self.caches = [cache.take(both, self.start) for cache in self.caches]
        self.rows, self.twin = len(both), None
        self._announce()

    @torch.no_grad()
    def fork(self, rows: Tensor, seeds: Tensor | None = None, *, twins: bool = False) -> Decoding:
        """A generation of `len(rows)` images, number i going on from image `rows[i]`.

        Args:
            rows: int64 `[N]`, each below the number of images; in any order, with repetitions.
            seeds: int64 `[N]` for what is sampled from now on; by default those of `rows`.
            twins: images that go on from the same one share its unconditional row at the next scale, whose inputs are
                still the same; right where nothing steers unconditional rows at that scale. It has no effect where
                guidance is mixed within the layers, or there is none.

        Raises:
            PysteerError: images still share unconditional rows.
        """
        if self.twin is not None:
            raise PysteerError(
                "images share unconditional rows until the next scale; fix: advance before forking again"
            )
        forked: Decoding = object.__new__(Decoding)
        forked.__dict__.update(self.__dict__)
        rows = rows.to(self.x.device)
        halves = [rows + self.batch * k for k in range(self.rows // self.batch)]
        if twins and self.rows == 2 * self.batch and not self.insertion and self.at < len(self.schedule):
            halves[1], forked.twin = torch.arange(self.batch, 2 * self.batch, device=rows.device), rows
        both = torch.cat(halves)
        forked.batch, forked.rows = len(rows), len(both)
        forked.seeds = self.seeds[rows] if seeds is None else seeds.to(self.x.device)
        forked.condition = self.condition.take(both)
        forked.caches = [cache.take(both, self.start) for cache in self.caches]
        forked.x, forked.summed, forked.finite = self.x[both], self.summed[rows], self.finite[rows]
        forked.bits = [bits[rows] for bits in self.bits]
        if self.forced is not None:
            forked.forced = [bits[rows.to(bits.device)] for bits in self.forced]
        return forked


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
    done = Decoding(
        model, text, seeds=seeds, negative=negative, cfg=cfg, tau=tau, top_p=top_p, greedy=greedy,
        cfg_insertion_layer=cfg_insertion_layer, forced_bits=forced_bits, scales=scales, step=step, on_scale=on_scale,
    ).advance()  # fmt: skip
    return Generation(done.bits, done.summed)
