"""Registration of ops with torch, and when an op must leave the work to plain torch.

An op with a gradient is registered twice: `pysteer::<op>` without autograd, which costs 2-3 us a call, and
`pysteer::<op>_ad` with it; the public function picks one in Python. An op without an autograd formula would otherwise
give no gradient under torch.compile, silently.
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
    forward: Callable[..., Any],
    *,
    fake: Callable[..., Any] = _fake,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Register an op; return the plain and the differentiable operator, twice the plain one without a backward.

    Args:
        name: of the op.
        schema: arguments and result, such as `(Tensor x, ...) -> Tensor`.
        forward: the implementation for all devices; returns fresh tensors with the strides that `fake` gives.
        fake: the result's shapes and strides; left out, those of `torch.empty_like` of the first argument.
        setup_context, backward: as for `torch.library.register_autograd`.
    """
    names = [name] if backward is None else [name, f"{name}_ad"]
    for each in names:
        _LIBRARY.define(f"{each}{schema}")
        _LIBRARY.impl(each, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pysteer::{each}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"pysteer::{name}_ad", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.pysteer, names[0]).default, getattr(torch.ops.pysteer, names[-1]).default


def dispatch(
    x: Tensor,
    out: Tensor | None,
    arguments: tuple[Any, ...],
    *,
    wants_grad: bool,
    plain: Callable[..., Tensor],
    differentiable: Callable[..., Tensor],
    run: Callable[..., Tensor],
) -> Tensor:
    """Call the operator that fits: the differentiable one, the plain one, or the kernel itself into `out`.

    Args:
        x: first argument of the operators; arguments: all others.
        out: where to write, or None for a fresh tensor.
        wants_grad: whether a gradient is wanted, which `out` cannot have.
        plain, differentiable: what `declare` returned.
        run: `run(out, x, *arguments)` writes into `out` and returns it.
    """
    if wants_grad and torch.is_grad_enabled():
        if out is not None:
            refuse_out(x)
        return differentiable(x, *arguments)
    if out is None:
        return plain(x, *arguments)
    if torch.compiler.is_compiling() or not has_memory(x):
        return out.copy_(plain(x, *arguments))
    return run(out, x, *arguments)


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether a function of torch.func or forward mode is at work; asked for real, as a traced answer is always yes."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def plain_torch_needed(*parameters: Tensor) -> bool:
    """Whether somebody differentiates in a way that only plain torch supports.

    That is: in the parameters of the op, with functions of torch.func (vmap included), or in forward mode.
    """
    if transformed():
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
