"""Gradients of the ops, their registration with torch, and compiled graphs that see every change of the table."""

from typing import Any

import pytest
import torch
from checking import ENTRIES, IDS
from torch import Tensor
from torch._dynamo.utils import counters

from pysteer.ops import Case, OpSpec, get, steering_specs

each_entry = pytest.mark.parametrize(("op", "variant", "sizes"), ENTRIES, ids=IDS)
REGISTERED = [name for name in steering_specs() if hasattr(torch.ops.pysteer, name)]
TABLE = ("slot", "strength", "clock", "span")


def small(op: str, variant: str, sizes: dict[str, int], **more: Any) -> tuple[OpSpec, dict[str, Any]]:
    spec = get(op)
    case = Case(4, 3, 5, span=True, sizes=sizes, options=spec.variants[variant], **more)
    return spec, spec.make_inputs(case)


def as_arguments(op: Any, spec: OpSpec, inputs: dict[str, Any]) -> list[Any]:
    """The arguments of a registered op in the order of its schema."""
    return [{**spec.defaults, **inputs}[argument.name] for argument in op._schema.arguments]


@pytest.mark.parametrize("op", REGISTERED)
@pytest.mark.parametrize("layout", ["tokens", "channels_first", "channels_last"])
def test_opcheck(op: str, layout: str) -> None:
    spec, inputs = small(op, next(iter(get(op).variants)), {}, layout=layout)
    plain, differentiable = getattr(torch.ops.pysteer, op).default, getattr(torch.ops.pysteer, f"{op}_ad").default
    arguments = as_arguments(plain, spec, inputs)
    torch.library.opcheck(plain, arguments)
    arguments[0] = arguments[0].clone().requires_grad_()
    torch.library.opcheck(differentiable, arguments)


@each_entry
def test_gradient_in_x(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec, inputs = small(op, variant, sizes)
    x = inputs.pop("x").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spec.function(x, **inputs), (x,))


@each_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_agrees_with_plain_torch(op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    spec, inputs = small(op, variant, sizes, dtype=dtype)
    x = inputs.pop("x").requires_grad_()
    weights = torch.randn(x.shape).to(dtype)
    (fast,) = torch.autograd.grad((spec.function(x, **inputs) * weights).sum(), x)
    (plain,) = torch.autograd.grad((spec.reference(x, **inputs) * weights).sum(), x)
    assert (fast != 0).any()
    torch.testing.assert_close(fast, plain, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-5)
    with torch.no_grad():
        assert not spec.function(x, **inputs).requires_grad


@pytest.mark.parametrize("op", list(steering_specs()))
def test_gradient_in_the_parameters(op: str) -> None:
    spec, inputs = small(op, next(iter(get(op).variants)), {})
    name = next(reversed([key for key, value in inputs.items() if isinstance(value, Tensor) and key not in TABLE]))
    bank = inputs[name].clone().requires_grad_()
    spec.function(**{**inputs, name: bank}).sum().backward()
    assert bank.grad is not None
    assert (bank.grad != 0).any()
    strength = inputs["strength"].clone().requires_grad_()
    spec.function(**{**inputs, "strength": strength}).sum().backward()
    assert strength.grad is not None
    assert (strength.grad != 0).any()


def test_second_derivative_of_affine_shift() -> None:
    spec, inputs = small("affine_shift", "plain", {})
    x = inputs.pop("x").double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: spec.function(x, **inputs).square(), (x,))


@pytest.mark.parametrize("op", list(steering_specs()))
def test_functional_transforms(op: str) -> None:
    spec, inputs = small(op, next(iter(get(op).variants)), {})
    x = inputs.pop("x")
    direction = torch.randn_like(x)
    expected = torch.autograd.functional.jvp(lambda x: spec.reference(x, **inputs), x, direction)[1]
    assert (expected != 0).any()
    torch.testing.assert_close(torch.func.jvp(lambda x: spec.function(x, **inputs), (x,), (direction,))[1], expected)
    gradient = torch.func.grad(lambda x: spec.function(x, **inputs).square().sum())(x)
    torch.testing.assert_close(
        gradient, torch.func.grad(lambda x: spec.reference(x, **inputs).square().sum())(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("op", REGISTERED)
def test_table_changed_before_backward_is_an_error(op: str) -> None:
    options = {"pull": True} if op == "prototype_shift" else {}
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 3, 5, options=options))
    x = inputs.pop("x").requires_grad_()
    y = spec.function(x, **inputs)
    inputs["clock"].fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", list(steering_specs()))
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graph_sees_every_change(op: str, grad: bool) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 6, 16, span=True))
    x = inputs.pop("x").requires_grad_(grad)
    bank = next(name for name in inputs if name not in TABLE)

    def call(x: Tensor) -> Tensor:
        return spec.function(x * 1.0, **inputs) + 0.0

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [compiled(x).detach()]
    graphs = counters["stats"]["unique_graphs"]

    def change(index: int) -> None:
        (
            lambda: inputs["clock"].fill_(0 if index < 5 else 2),
            lambda: inputs["strength"].mul_(1.5),
            lambda: inputs["slot"].copy_(inputs["slot"].flip(1)),
            lambda: inputs["span"].copy_(inputs["span"].flip(0)),
            lambda: inputs[bank].add_(torch.randn_like(inputs[bank])),
        )[index % 5]()

    with torch.compiler.set_stance("fail_on_recompile"):
        for index in range(10):
            change(index)
            result = compiled(x)
            assert not torch.equal(result, results[-1]), f"change {index} was not seen"
            torch.testing.assert_close(result, call(x))
            if grad:
                (gradient,) = torch.autograd.grad(result.sum(), x)
                assert (gradient != 0).any()
            results.append(result.detach())
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_affine_shift_through_inductor() -> None:
    spec = get("affine_shift")
    inputs = spec.make_inputs(Case(4, 6, 16, torch.bfloat16, "channels_first", span=True))
    expected = spec.reference(**inputs)
    assert not torch.equal(expected, inputs["x"])
    torch.compile(spec.function, fullgraph=True)(**inputs, out=inputs["x"])
    assert torch.equal(inputs["x"], expected)


@pytest.mark.parametrize("op", list(steering_specs()))
def test_fake_tensors(op: str) -> None:
    spec, inputs = small(op, next(iter(get(op).variants)), {}, layout="channels_last")
    real = spec.function(**inputs)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        fake = spec.function(**fakes)
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()
