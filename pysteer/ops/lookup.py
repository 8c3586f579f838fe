"""Reading the steering table in plain torch, as every reference does it."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def look_up(slot: Tensor, strength: Tensor, clock: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the parameter set ([R] int32) and the strength ([R] fp32) of every row at the current step."""
    step = clock.reshape(1)
    return slot.index_select(0, step)[0, :rows], strength.index_select(0, step)[0, :rows]


def along(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Shape per-row values [R], or per-row channel values [R, D], so that they broadcast against `x`."""
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    if values.dim() == 2:
        shape[channel_dim] = values.shape[1]
    return values.reshape(shape)


def active_tokens(x: Tensor, which: Tensor, strength: Tensor, span: Tensor | None, channel_dim: int) -> Tensor:
    """Return a mask that broadcasts against `x`: True where a token is to be changed."""
    active = along((which != 0) & (strength != 0), x, channel_dim)
    if span is None or x.dim() == 2:
        return active if span is None else active & along((span[: len(x), 0] <= 0) & (span[: len(x), 1] > 0), x, -1)
    shape = list(x.shape)
    shape[channel_dim] = 1
    position = torch.arange(math.prod(shape[1:]), device=x.device).reshape([1, *shape[1:]])
    start, end = (along(edge, x, channel_dim) for edge in span[: x.shape[0]].unbind(1))
    return active & (position >= start) & (position < end)


def means_of_rows(x: Tensor, active: Tensor, span: Tensor | None, channel_dim: int) -> Tensor:
    """Return the means over the tokens of every row, or over those that are active, shaped to broadcast against `x`.

    Args:
        x: the activation, in the precision of the sum; [R, D] is its own mean.
        active: what `active_tokens` gives.
    """
    dims = [dim for dim in range(1, x.dim()) if dim != channel_dim % x.dim()]
    if not dims:
        return x
    if span is None:
        return x.mean(dims, keepdim=True)
    count = active.sum(dims, keepdim=True).clamp_min(1)
    return torch.where(active, x, 0).sum(dims, keepdim=True) / count


def laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """Return `y` with the strides of `torch.empty_like(x)`: a steered activation lies in memory as the plain one."""
    result = torch.empty_like(x)
    return y if y.stride() == result.stride() else result.copy_(y)


def own_scores(tokens: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """Return c_k (|F_k x|² - |x|²) / 2 for `tokens` [R, L, D], factors [R, K, r, D] and scales [R, K], as [R, L, K]."""
    z, c = factor.to(tokens.dtype), scale.to(tokens.dtype)
    along_factor = tokens @ z.flatten(1, 2).transpose(1, 2)
    squares = along_factor.square().reshape(*tokens.shape[:2], *factor.shape[1:3]).sum(-1)
    return 0.5 * c.unsqueeze(1) * (squares - tokens.square().sum(-1, keepdim=True))


def close_scores(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    channel_dim: int,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return where the two best of the scores x·w_k + o_k lie so close that fp32 rounding may decide.

    Args:
        x: the activation; weight: [P, K, D]; offset: [P, K]; the rest as for the ops.
        factor, scale: of `prototype_shift`.

    Returns:
        A mask that broadcasts against `x`.
    """
    which, _ = look_up(slot, strength, clock, x.shape[0])
    moved = x.movedim(channel_dim, -1).double()
    tokens = moved.unsqueeze(1).flatten(1, -2)
    w, o = weight.index_select(0, which).double(), offset.index_select(0, which).double()
    score = tokens @ w.transpose(1, 2) + o.unsqueeze(1)
    size = (tokens.abs() @ w.abs().transpose(1, 2)).amax(-1)
    if factor is not None and scale is not None:
        own = scale.index_select(0, which)
        score = score + own_scores(tokens, factor.index_select(0, which), own)
        size = size + own.amax(-1, keepdim=True) * tokens.square().sum(-1)
    best = score.topk(min(2, w.shape[1]), -1).values
    size = size + best[..., 0].abs()
    close = (best[..., 0] - best[..., -1] < 1e-6 * size) & (w.shape[1] > 1)
    return close.reshape(moved.shape[:-1]).unsqueeze(channel_dim)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off, so that matrix products stay in the precision they are given in."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
