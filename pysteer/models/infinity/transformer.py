"""The Infinity transformer: next-scale prediction of image bits, with the published state-dict keys.

Written from the architecture of Han et al. 2024 so that published weights load: 2-D rotary positions stretched over
the final grid, cosine self-attention, cross-attention to the text, a shared AdaLN and a head of two logits per bit.
Attention is PyTorch's SDPA over a static key/value cache; the residual stream is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.errors import InputError
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.schedule import rope_schedule


@dataclass
class TextCondition:
    """Hidden states of the text encoder: ``hidden [B, T, C]`` padded at the end, ``lengths [B]`` int64."""

    hidden: Tensor
    lengths: Tensor

    def mask(self) -> Tensor:
        """``[B, T]`` bool, true at real tokens."""
        return torch.arange(self.hidden.shape[1], device=self.hidden.device) < self.lengths[:, None]

    def to(self, *args: Any, **kwargs: Any) -> TextCondition:
        hidden = self.hidden.to(*args, **kwargs)
        return TextCondition(hidden, self.lengths.to(hidden.device))

    @staticmethod
    def cat(parts: Sequence[TextCondition]) -> TextCondition:
        """Stack the rows of several conditions, padding to the longest."""
        longest = max(p.hidden.shape[1] for p in parts)
        hidden = torch.cat([F.pad(p.hidden, (0, 0, 0, longest - p.hidden.shape[1])) for p in parts])
        return TextCondition(hidden, torch.cat([p.lengths for p in parts]))


@dataclass
class ModelCondition:
    """What the blocks need of the text, computed once per image.

    pooled ``[R, D]`` fp32 drives the AdaLN and is the first token; modulation ``[R, 1, 6, D]``; keys_values holds one
    ``(k, v)`` of ``[R, H, T, D/H]`` per block; mask ``[R, 1, 1, T]`` bool, true at real text tokens.
    """

    pooled: Tensor
    modulation: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def take(self, rows: Tensor) -> ModelCondition:
        """That of rows ``[N]`` int64, in their order."""
        pairs = [(k[rows], v[rows]) for k, v in self.keys_values]
        return ModelCondition(self.pooled[rows], self.modulation[rows], pairs, self.mask[rows])


class RMSNorm(nn.Module):
    """RMS norm in fp32 with the epsilon inside the root, cast back to the input's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_table(scales: Sequence[tuple[int, int]], head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotary table ``[2 (cos, sin), tokens of all scales, head_dim / 2]`` fp32.

    Half of the frequencies carry the row, half the column. Coordinates of a coarse scale are stretched to the finest
    grid (``round(i * H_last / h)``), so that all scales share one coordinate system.
    """
    half = head_dim // 2
    frequency = 1.0 / (base ** (torch.arange(0, half, 2, dtype=torch.int64).float() / half))
    full_h, full_w = scales[-1]
    angles = []
    for h, w in scales:
        row = (torch.arange(h) * (full_h / h)).round().int().float()
        column = (torch.arange(w) * (full_w / w)).round().int().float()
        a = torch.outer(row, frequency)[:, None].expand(h, w, -1)
        b = torch.outer(column, frequency)[None].expand(h, w, -1)
        angles.append(torch.cat([a, b], dim=-1).reshape(h * w, half))
    angle = torch.cat(angles)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply a rotary table ``[2, L, d/2]`` to ``x [R, H, L, d]`` (interleaved pairs); fp32 in and out.

    In eager code as one complex product, which is many times faster on a CPU; the compiler fuses the real form.
    """
    pair = x.unflatten(-1, (-1, 2))
    cos, sin = rope[0], rope[1]
    if torch.compiler.is_compiling():
        a, b = pair.unbind(-1)
        return torch.stack([cos * a - sin * b, sin * a + cos * b], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pair) * torch.complex(cos, sin)).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention of ``[R, H, L, d]``; ``mask`` is bool, true where a key may be seen."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # SDPA's CPU backward takes three times as long as these two products at heads of 48 channels.
        scores = torch.matmul(q * (scale or q.shape[-1] ** -0.5), k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class KeyValueCache:
    """Static cache of one self-attention: ``k, v [R, H, > tokens, d]``; ``write`` returns the filled prefix."""

    def __init__(self, rows: int, tokens: int, config: InfinityConfig, like: Tensor) -> None:
        # One token more than is ever filled: where a prefix could be the whole buffer, the compiler specialises the
        # last scale on it and then fails on the strides of a start it can no longer solve for.
        shape = (rows, config.heads, tokens + 1, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty(shape, dtype=like.dtype, device=like.device)

    def write(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        end = start + k.shape[2]
        self.k[:, :, start:end].copy_(k)
        self.v[:, :, start:end].copy_(v)
        return self.k[:, :, :end], self.v[:, :, :end]

    def take(self, rows: Tensor, end: int) -> KeyValueCache:
        """A cache of the same room for ``rows [N]`` int64 that holds their first ``end`` tokens."""
        taken: KeyValueCache = object.__new__(KeyValueCache)
        for name in ("k", "v"):
            held: Tensor = getattr(self, name)
            room = held.new_empty(len(rows), *held.shape[1:])
            room[:, :, :end].copy_(held[rows, :, :end])
            setattr(taken, name, room)
        return taken


class SelfAttention(nn.Module):
    """Cosine attention: unit q and k, a learned temperature per head (at most 100), 2-D RoPE, no key bias."""

    zero_k_bias: Tensor

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.register_buffer("zero_k_bias", torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(
        self, x: Tensor, rope: Tensor, cache: KeyValueCache | None = None, start: int = 0, mask: Tensor | None = None
    ) -> Tensor:
        weight = self.mat_qkv.weight
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x.to(weight.dtype), weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        temperature = self.scale_mul_1H11.clamp_max(math.log(100.0)).exp()
        # Contiguous first: norms and products over strided heads cost far more than the copies.
        q, k = q.float().contiguous(), k.float().contiguous()
        q = rotate(F.normalize(q, dim=-1, eps=1e-12) * temperature, rope).to(v.dtype)
        k = rotate(F.normalize(k, dim=-1, eps=1e-12), rope).to(v.dtype)
        if cache is not None:
            k, v = cache.write(k, v, start)
        y = attend(q, k, v, mask, scale=1.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from image tokens to the text; the text's keys and values are computed once per image."""

    zero_k_bias: Tensor

    def __init__(self, dim: int, kv_dim: int, heads: int, pool: bool = False):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        if pool:
            query = torch.empty(1, heads, self.head_dim)
            nn.init.trunc_normal_(query, std=math.sqrt(1 / dim / 3))
            self.mat_q: Any = nn.Parameter(query)  # a linear layer otherwise: the published names
        else:
            self.mat_q = nn.Linear(dim, dim)
        self.mat_kv = nn.Linear(kv_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[R, H, T, d]`` of the projected text ``[R, T, kv_dim]``."""
        weight = self.mat_kv.weight
        kv = F.linear(text.to(weight.dtype), weight, torch.cat((self.zero_k_bias, self.v_bias)))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        k, v = keys_values
        q = self.mat_q(x.to(self.proj.weight.dtype)).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        y = attend(q, k.to(q.dtype), v.to(q.dtype), mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class TextPool(nn.Module):
    """Attentive pooling of the text with one learned query per head; its output ``[R, D]`` is the site ``pooled``."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.ca = CrossAttention(config.dim, config.text_dim, config.pool_heads, pool=True)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        k, v = self.ca.keys_values(text)
        q = self.ca.mat_q.to(v.dtype).expand(text.shape[0], -1, -1).unsqueeze(2)
        y = attend(q, k, v, mask)
        return self.ca.proj(y.transpose(1, 2).flatten(2)).squeeze(1)


class FFN(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm without parameters, then ``* (1 + scale) + shift``, in fp32."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), scale + 1)


class CrossAttnBlock(nn.Module):
    """Self-attention, cross-attention and FFN; AdaLN around the first and the last, an affine norm before the second.

    Sites: ``sa``, ``ca``, ``ffn`` are the outputs of the three parts (before the AdaLN gate where there is one),
    ``ca_block`` is the output of the whole block.
    """

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.sa = SelfAttention(config)
        self.ca = CrossAttention(config.dim, config.dim, config.heads)
        self.ffn = FFN(config)
        self.ca_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        keys_values: tuple[Tensor, Tensor],
        text_mask: Tensor,
        rope: Tensor,
        cache: KeyValueCache | None = None,
        start: int = 0,
        mask: Tensor | None = None,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss.float() + modulation).unbind(2)
        x = torch.addcmul(
            x, self.sa(modulated_norm(x, scale1, shift1, self.eps), rope, cache, start, mask).float(), gate1
        )
        norm = self.ca_norm
        h = F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), self.eps)
        x = x + self.ca(h, keys_values, text_mask).float()
        return torch.addcmul(x, self.ffn(modulated_norm(x, scale2, shift2, self.eps)).float(), gate2)


class BlockChunk(nn.Module):
    """A group of blocks; exists for the published key names ``block_chunks.{c}.module.{j}``."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.module = nn.ModuleList(blocks)


class HeadNorm(nn.Module):
    """AdaLN before the head."""

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.ada_lin(pooled).unflatten(-1, (1, 2, -1)).unbind(2)
        return modulated_norm(x, scale, shift, self.eps)


class Infinity(nn.Module):
    """Infinity transformer over a fixed scale schedule.

    ``clock`` is a 0-dim int64 tensor with the index of the scale being computed (not a buffer, follows the device);
    ``row_listeners`` are called as ``f(part, cond, uncond, lengths)`` when a generation starts.
    """

    def __init__(self, config: InfinityConfig):
        super().__init__()
        self.config = config
        self.cfg_uncond = nn.Parameter(self._unconditional_text(config))
        self.text_norm = RMSNorm(config.text_dim, config.norm_eps)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        std = math.sqrt(1 / config.dim / 3)
        self.pos_start = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, config.dim), std=std))
        self.lvl_embed = nn.Embedding(config.max_scales, config.dim)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)
        self.word_embed = nn.Linear(config.bits, config.dim)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        blocks = [CrossAttnBlock(config) for _ in range(config.depth)]
        per_chunk = config.depth // config.chunks
        self.block_chunks = nn.ModuleList(
            BlockChunk(blocks[c * per_chunk : (c + 1) * per_chunk]) for c in range(config.chunks)
        )
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(config.dim, 2 * config.bits)
        self.clock = torch.zeros((), dtype=torch.int64)
        self.row_listeners: list[Callable[[str, int, int, Tensor | None], None]] = []
        self._ropes: dict[tuple, Tensor] = {}

    @staticmethod
    def _unconditional_text(config: InfinityConfig) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        text = torch.empty(config.text_maxlen, config.text_dim)
        return nn.init.trunc_normal_(text, std=1.2, generator=generator) / config.text_dim**0.5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Infinity:
        super()._apply(fn, recurse)
        self.clock = self.clock.to(self.pos_start.device)
        self._ropes.clear()
        return self

    @property
    def blocks(self) -> list[CrossAttnBlock]:
        return [block for chunk in self.block_chunks for block in chunk.module]  # type: ignore[union-attr]

    @property
    def schedule(self) -> list[tuple[int, int]]:
        return list(self.config.scales)

    def rope(self, scales: Sequence[tuple[int, int]]) -> Tensor:
        """Rotary table ``[2, tokens, head_dim/2]`` of a schedule, cached per schedule on the model's device."""
        key = tuple(scales)
        if key not in self._ropes:
            table = rope_table(rope_schedule(scales), self.config.head_dim)
            if self.config.rope_restart:  # each scale reads the table from its start, as the published unfused path
                table = torch.cat([table[:, : h * w] for h, w in scales], dim=1)
            self._ropes[key] = table[:, : sum(h * w for h, w in scales)].to(self.pos_start.device)
        return self._ropes[key]

    def unconditional(self, condition: TextCondition) -> TextCondition:
        """The learned unconditional text with the lengths of ``condition``."""
        longest = condition.hidden.shape[1]
        if longest > self.config.text_maxlen:
            raise InputError("text length", value=longest, allowed=f"at most text_maxlen={self.config.text_maxlen}")
        hidden = self.cfg_uncond[:longest].to(condition.hidden.dtype).expand(len(condition.lengths), -1, -1)
        return TextCondition(hidden, condition.lengths)

    def condition(self, text: TextCondition) -> ModelCondition:
        """Pooled vector, AdaLN modulation and cross-attention keys and values of ``text`` (R rows)."""
        mask = text.mask()[:, None, None, :]
        first: Any = self.text_proj_for_ca[0]
        hidden = self.text_norm(text.hidden.to(first.weight.dtype))
        pooled = self.text_proj_for_sos(hidden, mask).float()
        projected = self.text_proj_for_ca(hidden)
        ada: Any = self.shared_ada_lin[1]
        modulation = F.linear(F.silu(pooled).to(ada.weight.dtype), ada.weight, ada.bias).float()
        modulation = modulation.unflatten(-1, (1, 6, -1))
        return ModelCondition(pooled, modulation, [b.ca.keys_values(projected) for b in self.blocks], mask)

    def new_caches(self, rows: int, tokens: int) -> list[KeyValueCache]:
        """One static cache per block for ``rows`` rows and ``tokens`` tokens."""
        weight = self.block_chunks[0].module[0].sa.mat_qkv.weight  # type: ignore[union-attr,index]
        return [KeyValueCache(rows, tokens, self.config, weight) for _ in range(self.config.depth)]

    def first_input(self, condition: ModelCondition) -> Tensor:
        """The start token ``[R, 1, D]``: pooled text plus the start position."""
        return condition.pooled.unsqueeze(1) + self.pos_start.float()

    def embed(self, inputs: Tensor, rows: int) -> Tensor:
        """Embed next-scale inputs ``[B, L, bits]``, repeated to ``rows`` (conditional and unconditional rows)."""
        x = self.word_embed(inputs.to(self.word_embed.weight.dtype)).float()
        return x.repeat(rows // x.shape[0], 1, 1)

    def scale_step(
        self,
        x: Tensor,
        level: Tensor,
        condition: ModelCondition,
        rope: Tensor,
        caches: list[KeyValueCache],
        start: int,
        guidance: Tensor,
        insertion: tuple[int, ...] = (),
    ) -> Tensor:
        """Run all blocks on the tokens ``x [R, L, D]`` of one scale; returns the residual stream ``[R, L, D]``.

        level: 0-dim int64 scale index; start: tokens of earlier scales; guidance: 0-dim CFG factor used after the
        absolute layers in ``insertion``, where both halves of the rows are replaced by their mixture.
        """
        x = x + self.lvl_embed(level.view(1)).float()  # weight[level] would read the index on the host
        for i, block in enumerate(self.blocks):
            x = block(x, condition.modulation, condition.keys_values[i], condition.mask, rope, caches[i], start)
            if i in insertion:
                cond, uncond = x.chunk(2)
                mixed = guidance * cond + (1 - guidance) * uncond
                x = torch.cat((mixed, mixed))
        return x

    def logits(self, x: Tensor, pooled: Tensor) -> Tensor:
        """Logits ``[R, L, 2 * bits]`` fp32: for every bit the pair (zero, one)."""
        ada: Any = self.head_nm.ada_lin[1]
        h = self.head_nm(x.float(), pooled.to(ada.weight.dtype))
        return self.head(h.to(self.head.weight.dtype)).float()

    def forward(self, text: TextCondition, inputs: Tensor, scales: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Teacher-forced logits of all scales at once (training, likelihood).

        inputs: ``[B, tokens - 1, bits]``, next-scale inputs of every scale but the first. Returns
        ``[B, tokens, 2 bits]``.
        """
        scales = list(scales or self.config.scales)
        condition = self.condition(text)
        levels = torch.cat([torch.full((h * w,), i, device=inputs.device) for i, (h, w) in enumerate(scales)])
        x = torch.cat((self.first_input(condition), self.embed(inputs, inputs.shape[0])), dim=1)
        x = x + self.lvl_embed.weight[levels].float()
        mask = levels[:, None] >= levels[None, :]
        rope = self.rope(scales)
        for i, block in enumerate(self.blocks):
            x = block(x, condition.modulation, condition.keys_values[i], condition.mask, rope, mask=mask)
        return self.logits(x, condition.pooled)
