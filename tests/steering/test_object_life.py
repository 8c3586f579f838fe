"""What else happens to modules: copies, pickles, casts, parametrizations, sharding, checkpoints; nothing is left."""

import copy
import gc
import io
import pickle
import socket
import weakref
from typing import Any

import pytest
import torch
from steering_toy import WIDTH, Block, FeedForward, Shift, Toy
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from pysteer.steering import attach

SITE = "blocks.1.ffn"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, WIDTH)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, instance dicts (by identity of their values), hooks and state of every module."""
    return {
        name: (type(module), {key: id(value) for key, value in module.__dict__.items()})
        for name, module in model.named_modules()
    }


def test_attached_module_keeps_its_face(model: Toy, x: Tensor) -> None:
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    ffn, plain = model.blocks[1].ffn, model(x)
    with attach(model, {SITE: Shift()}):
        assert not torch.equal(model(x), plain)
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == names
        assert model.blocks[1].ffn is ffn
        assert isinstance(ffn, FeedForward)
        for attribute in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(ffn), attribute) == getattr(FeedForward, attribute)
        model.load_state_dict(model.state_dict(), strict=True)


def test_hundred_cycles_leave_nothing(model: Toy, x: Tensor) -> None:
    paths = ["blocks.0", "blocks.0.ffn", "blocks.1.norm", "blocks.2", ""]
    before, plain = snapshot(model), model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, {path: Shift() for path in paths}):  # steered classes are made once and stay
        assert not torch.equal(model(x), plain)
    gc.collect()
    objects = len(gc.get_objects())
    watched = []
    for _ in range(100):
        shifts = {path: Shift() for path in paths}
        attachment = attach(model, shifts)
        model(x)
        attachment.detach()
        watched += [weakref.ref(shift) for shift in shifts.values()]
        del shifts, attachment
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []
    assert len(gc.get_objects()) <= objects + len(watched) + 50  # the list of references itself, and some slack
    assert snapshot(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), plain)


def test_steered_class_is_made_once_and_dies_with_its_base() -> None:
    class Local(FeedForward):
        pass

    model = nn.Sequential(Local(), Local())
    with attach(model, {"0": Shift(), "1": Shift()}):
        assert type(model[0]) is type(model[1]) is not Local
        first = type(model[0])
    with attach(model, {"0": Shift()}):
        assert type(model[0]) is first
    gone = weakref.ref(first), weakref.ref(Local)
    del model, Local, first
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("first", [0, 1], ids=["FIFO", "LIFO"])
def test_two_on_one_site(model: Toy, x: Tensor, first: int) -> None:
    plain, before = model(x), snapshot(model)
    one, two = attach(model, {"": Shift(1.0)}), attach(model, {"": Shift(2.0)})
    torch.testing.assert_close(model(x), plain + 3)
    (one, two)[first].detach()
    torch.testing.assert_close(model(x), plain + (2.0, 1.0)[first])
    (one, two)[1 - first].detach()
    assert torch.equal(model(x), plain)
    assert snapshot(model) == before


def test_entries_of_one_site_run_in_order(model: Toy, x: Tensor) -> None:
    plain = model(x)

    class Double(Shift):
        def apply(self, value: Tensor) -> Tensor:
            return value * 2

    with attach(model, [("", Shift()), ("", Double())]):
        torch.testing.assert_close(model(x), (plain + 1) * 2)
    with attach(model, [("", Double())]), attach(model, [("", Shift())]):
        torch.testing.assert_close(model(x), plain * 2 + 1)


def test_shared_module_steers_at_each_use(x: Tensor) -> None:
    ffn = FeedForward()
    model = nn.Sequential(ffn, ffn)
    with attach(model, {"0": Shift()}):
        torch.testing.assert_close(model(x), torch.tanh((torch.tanh(x @ ffn.weight) + 1) @ ffn.weight) + 1)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "copy"])
def test_copies_are_plain_models(model: Toy, x: Tensor, way: str) -> None:
    plain = model(x)
    attachment = attach(model, {SITE: Shift(), "": Shift(3.0)})
    now = model(x)
    if way == "deepcopy":
        replica = copy.deepcopy(model)
    elif way == "pickle":
        replica = pickle.loads(pickle.dumps(model))
    elif way == "save":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        replica = torch.load(stream, weights_only=False)
    else:
        replica = copy.copy(model)
    assert type(replica) is Toy
    assert not any(key.startswith("_steer") for module in replica.modules() for key in module.__dict__ if way != "copy")
    if way != "copy":  # a shallow copy shares its children, which stay steered
        assert type(replica.blocks[1].ffn) is FeedForward
        assert torch.equal(replica(x), plain)
        for parameter in replica.parameters():  # the copy runs its own weights, not those of the original
            parameter.zero_()
        assert not torch.equal(replica(x), plain)
    assert torch.equal(model(x), now)
    attachment.detach()
    assert torch.equal(model(x), plain)


def test_copy_of_a_compiled_wrapper_is_plain(model: Toy, x: Tensor) -> None:
    model.blocks[1].ffn.forward = model.blocks[1].ffn.forward
    model.blocks[1].ffn = torch.compile(model.blocks[1].ffn, backend="eager")
    plain = model(x)
    with attach(model, {SITE: Shift()}):
        assert not torch.equal(model(x), plain)
        function, arguments = model.blocks[1].ffn.__reduce_ex__(4)[:2]
    assert torch._dynamo.eval_frame.OptimizedModule in (function, *arguments)
    assert not any(hasattr(item, "_steer_base") for item in (function, *arguments) if isinstance(item, type))


def test_casting_the_model_leaves_the_table_alone(model: Toy, x: Tensor) -> None:
    shift = Shift(0.1)
    amount = shift.amount
    with attach(model, {"": shift}):
        model.to(torch.bfloat16)
        assert shift.amount is amount
        low = model(x.bfloat16())
        amount.fill_(5.0)  # an update through the old tensor still counts
        assert (model(x.bfloat16()) - low).abs().amax() > 4
        assert low.dtype == torch.bfloat16


def test_moving_the_model_moves_what_is_attached(model: Toy) -> None:
    shift, other = Shift(), Shift()
    with attach(model, {SITE: shift, "": other}):
        model.to(torch.float64)
        assert shift.amount.device.type == "cpu"
        model.to("meta")
        assert shift.amount.device.type == other.amount.device.type == "meta"
        assert shift.amount.dtype == torch.float32


class Halve(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrize_below(model: Toy, x: Tensor) -> None:
    ffn = model.blocks[1].ffn
    parametrize.register_parametrization(ffn, "weight", Halve())
    plain = model(x)
    attachment = attach(model, {SITE: Shift()})
    assert (model(x) - plain).abs().amax() > 0.1
    replica = copy.deepcopy(model)
    assert torch.equal(replica(x), plain)
    attachment.detach()
    assert torch.equal(model(x), plain)
    parametrize.remove_parametrizations(ffn, "weight")
    assert type(ffn) is FeedForward


def test_parametrize_on_top(model: Toy, x: Tensor) -> None:
    ffn = model.blocks[1].ffn
    attachment = attach(model, {SITE: Shift()})
    parametrize.register_parametrization(ffn, "weight", Halve())
    steered = model(x)
    replica = copy.deepcopy(model)
    second = attach(model, {SITE: Shift()})
    assert not torch.equal(model(x), steered)
    second.detach()
    attachment.detach()
    plain = model(x)
    assert not torch.equal(plain, steered)
    assert torch.equal(replica(x), plain)
    parametrize.remove_parametrizations(ffn, "weight")
    assert torch.equal(model(x), plain)
    with attach(model, {SITE: Shift()}):
        torch.testing.assert_close(model(x), steered)
    assert type(ffn) is FeedForward


def test_parametrize_on_top_and_a_forward_on_the_instance(model: Toy, x: Tensor) -> None:
    """Steering moves into `__call__`, in a class above the one that parametrize made, and gives that one back."""
    ffn = model.blocks[1].ffn
    attachment = attach(model, {SITE: Shift()})
    parametrize.register_parametrization(ffn, "weight", Halve())
    parametrized = type(ffn)
    steered = ffn(x)
    old = ffn.forward
    ffn.forward = lambda value: 2 * torch.tanh(value @ ffn.weight)
    plain = ffn(x)
    torch.testing.assert_close(plain, 2 * (steered - 1))
    attachment.ensure()
    assert type(ffn) is not parametrized
    assert "__call__" not in parametrized.__dict__
    torch.testing.assert_close(ffn(x), plain + 1)
    second = attach(model, {SITE: Shift()})
    torch.testing.assert_close(ffn(x), plain + 2)
    second.detach()
    attachment.detach()
    assert type(ffn) is parametrized
    assert torch.equal(ffn(x), plain)
    ffn.forward = old
    torch.testing.assert_close(ffn(x), steered - 1)
    del ffn.forward
    parametrize.remove_parametrizations(ffn, "weight")
    with attach(model, {SITE: Shift()}):
        torch.testing.assert_close(ffn(x), steered)
    assert type(ffn) is FeedForward


def test_functional_call(model: Toy, x: Tensor) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    with attach(model, {SITE: Shift()}):
        torch.testing.assert_close(torch.func.functional_call(model, zeros, (x,)), x + 1)
    torch.testing.assert_close(torch.func.functional_call(model, zeros, (x,)), x)


class _Counted(Shift):
    calls = 0

    def apply(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.amount * 2


def test_checkpoint_recomputes_the_steered_block(x: Tensor) -> None:
    block, shift = Block(), _Counted()
    with attach(block, {"ffn": shift}), torch.enable_grad():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        block(a).square().sum().backward()
        assert shift.calls == 1
        checkpoint(block, b, use_reentrant=False).square().sum().backward()
        assert shift.calls == 3
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("order", ["attach first", "shard first"])
def test_fully_shard(model: Toy, x: Tensor, order: str) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    plain = model(x)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        if order == "attach first":
            attachment = attach(model, {SITE: Shift()})
            fully_shard(model.blocks[1].ffn, mesh=mesh)
        else:
            fully_shard(model.blocks[1].ffn, mesh=mesh)
            attachment = attach(model, {SITE: Shift()})
        assert (model(x) - plain).abs().amax() > 0.1
        second = attach(model, {SITE: Shift(-1.0)})
        torch.testing.assert_close(model(x), plain)
        attachment.detach()
        second.detach()
        torch.testing.assert_close(model(x), plain)
    finally:
        distributed.destroy_process_group()
