"""Activations in memory, seen as R rows of L tokens of D channels whatever their dimensions are."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/dtype.h


class Frame(NamedTuple):
    """Sizes R, L, D and strides in elements of an activation; the tokens of a row share one stride."""

    rows: int
    tokens: int
    width: int
    row_stride: int
    token_stride: int
    channel_stride: int


def frame_of(x: Tensor, channel_dim: int) -> Frame | None:
    """Return the frame of `x`, or None where no kernel can walk it: several token strides, or no stride of one.

    Args:
        x: [R, D], [R, *tokens, D] (`channel_dim` -1 or the last) or [R, D, *tokens] (`channel_dim` 1).
        channel_dim: where the channels are.
    """
    shape, stride = x.shape, x.stride()
    dims = len(shape)
    if dims == 2:
        frame = Frame(shape[0], 1, shape[1], stride[0], shape[1], stride[1])
    elif dims == 3:
        channel = channel_dim % 3
        token = 3 - channel
        frame = Frame(shape[0], shape[token], shape[channel], stride[0], stride[token], stride[channel])
    else:
        channel = channel_dim % dims
        tokens, token_stride = 1, 1
        for dim in range(dims - 1, 0, -1):
            if dim == channel or shape[dim] == 1:
                continue
            if tokens == 1:
                token_stride = stride[dim]
            elif stride[dim] != token_stride * tokens:
                return None
            tokens *= shape[dim]
        frame = Frame(shape[0], tokens, shape[channel], stride[0], token_stride, stride[channel])
    unit = frame.channel_stride == 1 or frame.width == 1 or frame.token_stride == 1 or frame.tokens == 1
    return frame if unit else None


def overlapping(frame: Frame) -> bool:
    """Whether several elements share one address, as in an expanded tensor; nothing can be written there."""
    return any(stride == 0 and size > 1 for size, stride in zip(frame[:3], frame[3:], strict=True))
