"""Registration of ops with torch, and when an op must leave the work to plain torch.

Every op is registered twice: `pysteer::<op>` without autograd, which costs 2-3 us a call, and `pysteer::<op>_ad` with
it; the public function picks one in Python. An op without an autograd formula would otherwise give no gradient under
torch.compile, silently.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from pysteer.errors import InputError

_LIBRARY = torch.library.Library("pysteer", "FRAGMENT")


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def declare(
    name: str,
    schema: str,
    forward: Callable[..., Tensor],
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Register an op whose result is like its first argument; return the plain and the differentiable op.

    Args:
        name: of the op.
        schema: arguments and result, `(Tensor x, ...) -> Tensor`.
        forward: the implementation for all devices; returns a fresh tensor with the strides of `torch.empty_like(x)`.
        setup_context, backward: as for `torch.library.register_autograd`.
    """
    for each in (name, f"{name}_ad"):
        _LIBRARY.define(f"{each}{schema}")
        _LIBRARY.impl(each, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pysteer::{each}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"pysteer::{name}_ad", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.pysteer, name).default, getattr(torch.ops.pysteer, f"{name}_ad").default


def plain_torch_needed(*parameters: Tensor) -> bool:
    """Whether somebody differentiates in a way that only plain torch supports.

    That is: in the parameters of the op, with functions of torch.func (vmap included), or in forward mode.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for parameter in parameters:
            if parameter.requires_grad:
                return True
    return False


def has_memory(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor with an address, not a stand-in used while tracing."""
    return type(x) is Tensor or type(x) is Parameter


def refuse_out(x: Tensor) -> None:
    """Raise the error for `out=` where a gradient is wanted.

    Raises:
        InputError: always.
    """
    raise InputError(
        "out", value=f"x of {list(x.shape)} requires grad", allowed="tensors without grad", fix="leave out= away"
    )
