"""Checks of op arguments: shapes, dtypes and devices only, never values, which would wait for the device."""

import torch
from torch import Tensor

from pysteer.errors import InputError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_activation(x: Tensor, channel_dim: int, out: Tensor | None) -> int:
    """Check `x` and `out`; return the width D.

    Raises:
        InputError: names the argument that does not fit.
    """
    if x.dtype not in _FLOATS:
        raise InputError(
            "dtype of x", value=str(x.dtype), allowed="float32, bfloat16, float16 (float64 in plain torch)"
        )
    dims = x.dim()
    if dims < 2:
        raise InputError("shape of x", value=list(x.shape), allowed="[R, D], [R, *tokens, D] or [R, D, *tokens]")
    if channel_dim not in (-1, 1, dims - 1):
        raise InputError("channel_dim", value=channel_dim, allowed="-1 (last) or 1")
    if out is not None and out is not x:
        if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
            raise InputError("out", value=_say(out), allowed=_say(x), fix="give a tensor like x, or x itself")
        if out.data_ptr() == x.data_ptr() and out.stride() != x.stride():
            raise InputError("strides of out", value=out.stride(), allowed=f"{x.stride()} where out lies on x")
    return x.shape[channel_dim]


def check_banks(x: Tensor, **banks: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check that every bank is fp32 of shape [P, *tail] on the device of `x`, with the same P >= 1.

    Raises:
        InputError: names the bank that does not fit.
    """
    sets = None
    for name, (bank, tail) in banks.items():
        if bank.dtype is not torch.float32 or bank.device != x.device or bank.shape[1:] != tail:
            raise InputError(name, value=_say(bank), allowed=f"float32 {['P', *tail]} on {x.device}")
        sets = bank.shape[0] if sets is None else sets
        if bank.shape[0] != sets or sets == 0:
            raise InputError(f"parameter sets in {name}", value=bank.shape[0], allowed=str(sets or "at least 1"))


def check_table(x: Tensor, slot: Tensor, strength: Tensor, clock: Tensor, span: Tensor | None) -> None:
    """Check slot [S, R], strength [S, R], clock [] and span [R, 2] against the rows and the device of `x`.

    Raises:
        InputError: names the argument that does not fit.
    """
    device, rows = x.device, x.shape[0]
    if slot.dtype is not torch.int32 or slot.dim() != 2 or slot.device != device:
        raise InputError("slot", value=_say(slot), allowed=f"int32 [S, R] on {device}")
    if strength.dtype is not torch.float32 or strength.shape != slot.shape or strength.device != device:
        raise InputError("strength", value=_say(strength), allowed=f"float32 {list(slot.shape)} on {device}, like slot")
    if clock.dtype is not torch.int64 or clock.dim() != 0 or clock.device != device:
        raise InputError("clock", value=_say(clock), allowed=f"int64 [] on {device}")
    capacity = slot.shape[1]
    if rows > capacity:
        raise InputError("rows of x", value=rows, allowed=f"at most {capacity}", fix="give the table more rows")
    if span is not None and (span.dtype is not torch.int32 or span.device != device or span.shape != (capacity, 2)):
        raise InputError("span", value=_say(span), allowed=f"int32 [{capacity}, 2] on {device}")
