"""Attach and torch.compile in every order: steering always acts, and detaching always restores."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steering_toy import WIDTH, FeedForward, Shift, Toy, counter
from torch import Tensor

from pysteer.steering import Attachment, attach

SITE = "blocks.1.ffn"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, WIDTH)


def compile_model(model: Toy) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def compile_in_place(model: Toy) -> Callable[..., Any]:
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def compile_child_in_place(model: Toy) -> Callable[..., Any]:
    model.get_submodule(SITE).compile(fullgraph=True, backend="aot_eager")
    return model


def wrap_child(model: Toy) -> Callable[..., Any]:
    model.blocks[1].ffn = torch.compile(model.blocks[1].ffn, fullgraph=True, backend="aot_eager")
    return model


def compile_blocks(model: Toy) -> Callable[..., Any]:
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    return model


def wrap_block(model: Toy) -> Callable[..., Any]:
    model.blocks[1] = torch.compile(model.blocks[1], fullgraph=True, backend="aot_eager")
    return model


COMPILERS = [compile_model, compile_in_place, compile_child_in_place, wrap_child, compile_blocks, wrap_block]
PATHS = ["blocks.1.ffn", "blocks.1"]


def steered(model: Toy, x: Tensor, path: str, amount: float = 1.0) -> Tensor:
    """What the model must return, computed without any of the code under test."""
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block = getattr(block, "_orig_mod", block)
            ffn = getattr(block.ffn, "_orig_mod", block.ffn)
            inner = torch.tanh(block.norm(x) @ ffn.weight)
            x = x + inner + (amount if f"blocks.{i}.ffn" == path else 0)
            x = x + (amount if f"blocks.{i}" == path else 0)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("order", ["attach first", "compile first", "compile and run first"])
def test_matrix(model: Toy, x: Tensor, compiler: Any, order: str, path: str) -> None:
    with torch.no_grad():
        plain = model(x)
        expected = steered(model, x, path)
        assert (plain - expected).abs().amax() > 0.1
        attached: Attachment | None = attach(model, {path: Shift()}) if order == "attach first" else None
        run = compiler(model)
        if order == "compile and run first":
            torch.testing.assert_close(run(x), plain)
        attached = attached or attach(model, {path: Shift()})
        torch.testing.assert_close(run(x), expected)
        attached.detach()
        torch.testing.assert_close(run(x), plain)
        again = attach(model, {path: Shift(2.0)})
        torch.testing.assert_close(run(x), steered(model, x, path, 2.0))
        again.detach()
        torch.testing.assert_close(run(x), plain)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_entries_come_and_go_under_compile(model: Toy, x: Tensor, compiler: Any) -> None:
    """A key that appears in an instance dict is not guarded by itself; ours must be noticed all the same."""
    run = compiler(model)
    with torch.no_grad():
        for amounts in ((), (1.0,), (), (1.0, 0.5), (0.5,), ()):
            attachments = [attach(model, {SITE: Shift(amount)}) for amount in amounts]
            torch.testing.assert_close(run(x), steered(model, x, SITE, sum(amounts)))
            for attachment in attachments:
                attachment.detach()


def test_detaching_returns_to_the_cached_graph(model: Toy, x: Tensor) -> None:
    backend, graphs = counter()
    run = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        run(x)
        attachment = attach(model, {SITE: Shift()})
        run(x)
        assert len(graphs) == 2
        attachment.detach()
        with torch.compiler.set_stance("fail_on_recompile"):
            run(x)
            with attach(model, {SITE: Shift(3.0)}):
                torch.testing.assert_close(run(x), steered(model, x, SITE, 3.0))
        assert len(graphs) == 2


def test_detaching_recompiles_what_was_only_run_steered(model: Toy, x: Tensor) -> None:
    run = compile_model(model)
    with torch.no_grad():
        attachment = attach(model, {SITE: Shift()})
        run(x)
        attachment.detach()
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
            run(x)


def test_twelve_sites_in_turn_need_two_graphs_when_blocks_are_compiled(x: Tensor) -> None:
    model = Toy(blocks=12).eval()
    backend, graphs = counter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        for i in range(12):
            with attach(model, {f"blocks.{i}.ffn": Shift()}):
                torch.testing.assert_close(model(x), steered(model, x, f"blocks.{i}.ffn"))
    assert len(graphs) == 2


def test_hooked_child_inside_a_compiled_wrapper(model: Toy, x: Tensor) -> None:
    """The wrapper keeps the bound call that it found, so the entry has to sit on the wrapper."""
    child = model.blocks[1].ffn
    original = child.forward
    child.forward = lambda value: original(value) * 2
    wrap_child(model)
    with torch.no_grad():
        plain = model(x)
        with attach(model, {SITE: Shift()}):
            assert (model(x) - plain).abs().amax() > 0.1
            assert "_steer_call" in model.blocks[1].ffn.__dict__
        assert torch.equal(model(x), plain)
    assert type(model.blocks[1].ffn) is torch._dynamo.eval_frame.OptimizedModule
    assert type(child) is FeedForward


def test_child_wrapped_while_attached_and_hooked(model: Toy, x: Tensor) -> None:
    with torch.no_grad():
        plain = model(x)
        attachment = attach(model, {SITE: Shift()})
        wrap_child(model)
        attachment.ensure()
        torch.testing.assert_close(model(x), steered(model, x, SITE))
        model.blocks[1].ffn = model.blocks[1].ffn._orig_mod
        attachment.ensure()
        torch.testing.assert_close(model(x), steered(model, x, SITE))
        attachment.detach()
        torch.testing.assert_close(model(x), plain)
    assert type(model.blocks[1].ffn) is FeedForward


def test_gradients_under_compile(model: Toy, x: Tensor) -> None:
    scale = _Scale()
    with attach(model, {SITE: scale}):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        model(a).square().sum().backward()
        compile_model(model)(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    c = x.clone().requires_grad_()
    model(c).square().sum().backward()
    assert not torch.allclose(a.grad, c.grad)


class _Scale:
    def apply(self, x: Tensor) -> Tensor:
        return x * 3

    def to(self, device: torch.device) -> object:
        return self


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_sees_the_steered_model(model: Toy, x: Tensor) -> None:
    with torch.no_grad(), attach(model, {SITE: Shift()}):
        traced = torch.jit.trace(model, (x,), check_trace=False)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(traced(x), steered(model, x, SITE))
        torch.testing.assert_close(exported(x), steered(model, x, SITE))
