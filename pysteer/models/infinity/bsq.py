"""Multi-scale binary spherical quantiser (BSQ): residual bits, coarse to fine, and the next-scale inputs.

The maths of Infinity's ``new_quant`` quantiser (Han et al. 2024, "Infinity", section 3.2; Zhao et al. 2024, "BSQ"):
at scale k the residual ``r_k = f - sum_{i<k} up(q_i)`` is resized down by area averaging, normalised to unit length
over channels and replaced by its signs over sqrt(d); codes go up again bilinearly and are summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.errors import InputError

Scale = tuple[int, int]


class MultiScaleBSQ(nn.Module):
    """Bits of ``dim`` channels at a list of ``scales`` (h, w), coarse to fine; it holds no parameters.

    With ``patchify`` every token stands for a 2 x 2 block of codes: features have size 2h x 2w at the last scale and
    tokens 4 * dim bits (pixel-unshuffle order), as in Infinity-8B.
    """

    def __init__(self, dim: int, scales: Sequence[Scale], *, patchify: bool = False) -> None:
        super().__init__()
        if dim < 1 or not scales:
            raise InputError("quantiser", value=f"dim {dim}, {len(scales)} scales", allowed="at least one of each")
        self.dim = dim
        self.scales: list[Scale] = [(int(h), int(w)) for h, w in scales]
        self.patchify = patchify
        self.step = 1.0 / math.sqrt(dim)

    @property
    def token_dim(self) -> int:
        """Bits per token: dim, or 4 * dim with patchify."""
        return 4 * self.dim if self.patchify else self.dim

    def grid(self, scale: int) -> Scale:
        """Size of the code map at a scale index (twice the token grid with patchify)."""
        h, w = self.scales[scale]
        return (2 * h, 2 * w) if self.patchify else (h, w)

    def to_tokens(self, maps: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, h * w, token_dim]."""
        if self.patchify:
            maps = F.pixel_unshuffle(maps, 2)
        return maps.flatten(2).transpose(1, 2).contiguous()

    def to_map(self, tokens: Tensor, scale: int) -> Tensor:
        """[B, h * w, token_dim] -> [B, dim, H, W], the inverse of ``to_tokens`` at this scale."""
        h, w = self.scales[scale]
        if tokens.shape[1:] != (h * w, self.token_dim):
            raise InputError(
                f"tokens of scale {scale}", value=tuple(tokens.shape), allowed=f"[B, {h * w}, {self.token_dim}]"
            )
        maps = tokens.transpose(1, 2).reshape(len(tokens), self.token_dim, h, w)
        return F.pixel_shuffle(maps, 2) if self.patchify else maps

    def codes(self, bits: Tensor) -> Tensor:
        """Bits {0, 1} of any shape -> codes -1/sqrt(d) or +1/sqrt(d), fp32 (floating bits keep their dtype)."""
        values = bits if bits.is_floating_point() else bits.float()
        return values * (2.0 * self.step) - self.step

    def up(self, maps: Tensor, scale: int = -1) -> Tensor:
        """Resize a map to the size of a scale, bilinearly (half-pixel centres)."""
        size = self.grid(scale)
        return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear")

    def down(self, maps: Tensor, scale: int) -> Tensor:
        """Resize a map to the size of a scale by area averaging."""
        size = self.grid(scale)
        return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="area")

    def next_input(self, summed: Tensor, scale: int) -> Tensor:
        """Summed codes [B, dim, H, W] at full size -> transformer inputs [B, h * w, token_dim] of a scale."""
        return self.to_tokens(self.up(summed, scale))

    def accumulate(self, summed: Tensor | None, bits: Tensor, scale: int) -> Tensor:
        """Add the codes of one scale's bits [B, h * w, token_dim] to the running sum [B, dim, H, W] (None = zero)."""
        codes = self.up(self.to_map(self.codes(bits), scale))
        return codes if summed is None else summed + codes

    def decode(self, bits: Sequence[Tensor]) -> Tensor:
        """Bits of the first scales (usually all) -> features [B, dim, H, W]."""
        summed: Tensor | None = None
        for scale, tokens in enumerate(bits):
            summed = self.accumulate(summed, tokens, scale)
        if summed is None:
            raise InputError("bits to decode", value="an empty list", allowed="bits of at least the first scale")
        return summed

    @torch.no_grad()
    def encode(
        self,
        features: Tensor,
        flip: float | Sequence[float] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Features [B, dim, H, W] -> (bits per scale int64 [B, h * w, token_dim], inputs fp32 [B, L, token_dim]).

        ``inputs`` are the next-scale inputs of scales 1.. joined along tokens (scale 0 has the text as input).
        ``flip`` is the chance that a bit is flipped before it is accumulated: a number, one per scale [S], or per row
        and scale [B, S]. The returned bits are the unflipped signs of a residual that has seen the earlier flips
        (bitwise self-correction), so later scales learn to repair earlier mistakes.
        """
        if features.shape[1:] != (self.dim, *self.grid(-1)):
            raise InputError("features", value=tuple(features.shape), allowed=f"[B, {self.dim}, {self.grid(-1)}]")
        features = features.float()
        chance = self._flip_chances(flip, features)
        summed = torch.zeros_like(features)
        labels: list[Tensor] = []
        inputs: list[Tensor] = []
        for scale in range(len(self.scales)):
            bits = (self.down(features - summed, scale) > 0).long()
            labels.append(self.to_tokens(bits))
            if chance is not None:
                draw = torch.rand(bits.shape, device=bits.device, generator=generator)
                bits = bits ^ (draw < chance[:, scale, None, None, None]).long()
            summed = summed + self.up(self.codes(bits))
            if scale + 1 < len(self.scales):
                inputs.append(self.next_input(summed, scale + 1))
        empty = features.new_zeros(len(features), 0, self.token_dim)
        return labels, torch.cat(inputs, 1) if inputs else empty

    def _flip_chances(self, flip: float | Sequence[float] | Tensor | None, features: Tensor) -> Tensor | None:
        if flip is None:
            return None
        chance = torch.as_tensor(flip, dtype=torch.float32, device=features.device)
        count = len(self.scales)
        if chance.ndim > 2 or (chance.ndim and chance.shape[-1] != count):
            allowed = f"a number, [{count}] or [B, {count}]"
            raise InputError("flip probabilities", value=tuple(chance.shape), allowed=allowed)
        return chance.expand(len(features), count)

    def quantise(self, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Training form: features [B, dim, H, W] -> (straight-through sum of codes, normalised residuals per scale).

        The sum equals ``decode(encode(features)[0])``; its gradient passes through each scale's normalised residual,
        the residual itself being taken from detached codes. The residuals [B, dim, h, w] have unit length over
        channels and serve the commitment and entropy terms.
        """
        total = torch.zeros_like(features)
        residual = features
        units: list[Tensor] = []
        for scale in range(len(self.scales)):
            unit = F.normalize(self.down(residual, scale), dim=1)
            signs = torch.where(unit > 0, self.step, -self.step).to(unit.dtype)
            codes = self.up(unit + (signs - unit).detach())
            residual = residual - codes.detach()
            total = total + codes
            units.append(unit)
        return total, units
