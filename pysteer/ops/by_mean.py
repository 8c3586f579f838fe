"""What the ops share that shift a row by what they make of its mean: when their kernels serve, and the call.

Two passes over the activation are all that such an op costs on a CPU (csrc/by_mean.cpp); what lies between them sees
one vector per row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pysteer.ops.declare import has_memory, plain_torch_needed
from pysteer.ops.launch import Launch, choose, packed, raise_for, run_compiled
from pysteer.ops.layouts import DTYPE_CODES


def launch_by_mean(kernel: str, x: Tensor, out: Tensor | None, channel_dim: int) -> Launch:
    """Return the launch on the CPU, or that of the reference; `kernel` is the name of the compiled function."""
    return choose(kernel, x, x if out is None else out, channel_dim, lambda name: name == "cpu")


def kernel_serves(kernel: str, x: Tensor, out: Tensor | None, channel_dim: int, parameters: Sequence[Tensor]) -> bool:
    """Whether the kernel can do it: eager code on a CPU, no gradients, channels or tokens next to each other."""
    if torch.compiler.is_compiling() or not has_memory(x) or plain_torch_needed(*parameters):
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)):
        return False
    return launch_by_mean(kernel, x, out, channel_dim).backend == "cpu"


def shift_by_mean(
    kernel: str,
    x: Tensor,
    banks: Sequence[Tensor],
    slot: Tensor,
    strength: Tensor,
    clock: Tensor,
    span: Tensor | None,
    out: Tensor | None,
    channel_dim: int,
    *options: Any,
) -> Tensor:
    """Return what the kernel computes, where `kernel_serves`.

    Raises:
        InputError: the clock or a slot is out of range.
    """
    y = torch.empty_like(x) if out is None else out
    launch = launch_by_mean(kernel, x, y, channel_dim)
    tensors = packed(*banks, slot, strength, clock, span)
    sets = banks[0].shape[0]
    sizes = (*launch.shape, sets, *slot.shape, DTYPE_CODES[x.dtype], torch.get_num_threads())
    if status := run_compiled(kernel, (x, y, *tensors), *sizes, *options):
        raise_for(status, slot, clock, sets)
    return y
