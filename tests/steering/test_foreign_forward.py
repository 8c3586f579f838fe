"""Libraries that put a `forward` on the instance: a class-level one is then not looked up."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steering_toy import WIDTH, FeedForward, Shift, Toy
from torch import Tensor

from pysteer.errors import PysteerError
from pysteer.steering import attach

SITE = "blocks.1.ffn"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, WIDTH)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def hook(module: torch.nn.Module, replace: bool = False) -> Callable[[], None]:
    """Put a forward that doubles on the instance; undo leaves a bound forward behind, as accelerate does."""
    old = module.forward

    def forward(x: Tensor) -> Tensor:
        return 2 * (torch.tanh(x @ module.weight) if replace else old(x))

    module.forward = forward

    def undo() -> None:
        module.forward = old

    return undo


def expected(model: Toy, x: Tensor, factor: float, amount: float) -> Tensor:
    for i, block in enumerate(model.blocks):
        inner = torch.tanh(block.norm(x) @ block.ffn.weight)
        x = x + (inner * factor + amount if i == 1 else inner)
    return x


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hook_first(model: Toy, x: Tensor, compiled: bool) -> None:
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    undo = hook(model.blocks[1].ffn)
    with attach(model, {SITE: Shift()}):
        torch.testing.assert_close(run(x), expected(model, x, 2, 1))
        undo()
        torch.testing.assert_close(run(x), expected(model, x, 1, 1))
    torch.testing.assert_close(run(x), expected(model, x, 1, 0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attach_first(model: Toy, x: Tensor, compiled: bool) -> None:
    """The hook then calls the steered forward; detaching leaves it alone, and no order steers twice."""
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    attachment = attach(model, {SITE: Shift()})
    undo = hook(model.blocks[1].ffn)
    torch.testing.assert_close(run(x), expected(model, x, 2, 2))
    attachment.ensure()
    torch.testing.assert_close(run(x), expected(model, x, 2, 1))
    attachment.detach()
    torch.testing.assert_close(run(x), expected(model, x, 2, 0))
    attachment = attach(model, {SITE: Shift()})
    undo()
    torch.testing.assert_close(run(x), expected(model, x, 1, 1))
    attachment.detach()
    torch.testing.assert_close(run(x), expected(model, x, 1, 0))
    assert type(model.blocks[1].ffn) is FeedForward


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_replaced_after_attaching(model: Toy, x: Tensor, compiled: bool) -> None:
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with attach(model, {SITE: Shift()}) as attachment:
        run(x)
        undo = hook(model.blocks[1].ffn, replace=True)
        torch.testing.assert_close(run(x), expected(model, x, 2, 0))  # the one gap, which ensure() closes
        attachment.ensure()
        torch.testing.assert_close(run(x), expected(model, x, 2, 1))
        attachment.ensure()
        torch.testing.assert_close(run(x), expected(model, x, 2, 1))
    undo()
    del model.blocks[1].ffn.forward
    torch.testing.assert_close(run(x), expected(model, x, 1, 0))
    assert type(model.blocks[1].ffn) is FeedForward


def test_ensure_keeps_the_order_of_two_attachments(model: Toy, x: Tensor) -> None:
    class Double(Shift):
        def apply(self, value: Tensor) -> Tensor:
            return value * 2

    plain = model(x)
    with attach(model, {"": Shift()}) as first, attach(model, {"": Double()}):
        torch.testing.assert_close(model(x), (plain + 1) * 2)
        model.forward = lambda value: plain
        first.ensure()
        torch.testing.assert_close(model(x), (plain + 1) * 2)
    del model.forward
    assert torch.equal(model(x), plain)


def test_replaced_module_is_an_error(model: Toy) -> None:
    attachment = attach(model, {SITE: Shift()})
    old, model.blocks[1].ffn = model.blocks[1].ffn, FeedForward()
    with pytest.raises(PysteerError, match=r"blocks\.1\.ffn.*replaced"):
        attachment.ensure()
    attachment.detach()
    assert type(old) is FeedForward


def test_replaced_parent_is_an_error_after_runs_too(model: Toy, x: Tensor) -> None:
    plain = model(x)
    attachment = attach(model, {SITE: Shift()})
    attachment.ensure()
    assert not torch.equal(model(x), plain)
    attachment.ensure()
    before = model.blocks[1]
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    with pytest.raises(PysteerError, match=r"blocks\.1\.ffn.*replaced"):
        attachment.ensure()
    model.blocks[1] = before
    attachment.ensure()
    attachment.detach()
    assert torch.equal(model(x), plain)


def test_class_put_back_by_others(model: Toy, x: Tensor) -> None:
    plain = model(x)
    with attach(model, {SITE: Shift()}) as attachment:
        model.blocks[1].ffn.__class__ = FeedForward
        attachment.ensure()
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert "_steer_fwd" not in model.blocks[1].ffn.__dict__


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("order", ["hook first", "attach first"])
@pytest.mark.parametrize("removal", ["hook first", "detach first"])
def test_accelerate(model: Toy, x: Tensor, order: str, removal: str, compiled: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module: torch.nn.Module, output: Tensor) -> Tensor:
            return output * 2

    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    ffn = model.blocks[1].ffn
    torch.testing.assert_close(run(x), expected(model, x, 1, 0))
    if order == "hook first":
        hooks.add_hook_to_module(ffn, Doubling())
        attachment = attach(model, {SITE: Shift()})
    else:
        attachment = attach(model, {SITE: Shift()})
        hooks.add_hook_to_module(ffn, Doubling())
        torch.testing.assert_close(run(x), expected(model, x, 2, 2))
        attachment.ensure()
    torch.testing.assert_close(run(x), expected(model, x, 2, 1))
    if removal == "hook first":
        hooks.remove_hook_from_module(ffn)
        torch.testing.assert_close(run(x), expected(model, x, 1, 1))
        attachment.detach()
    else:
        attachment.detach()
        torch.testing.assert_close(run(x), expected(model, x, 2, 0))
        hooks.remove_hook_from_module(ffn)
    torch.testing.assert_close(run(x), expected(model, x, 1, 0))
    with attach(model, {SITE: Shift(2.0)}):  # a bound forward was left behind; nothing steers twice
        torch.testing.assert_close(run(x), expected(model, x, 1, 2))
    assert type(ffn) is FeedForward
