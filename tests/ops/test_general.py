"""Every op of the registry that does not steer: features, statistics, gates. A new op is tested by being there."""

from typing import Any

import pytest
import torch
from checking import DTYPES, GENERAL, GENERAL_IDS, SHAPES, bits, check_general, compare_general, tensors_of
from torch import Tensor
from torch._dynamo.utils import counters

from pysteer.ops import Case, OpSpec, backend_status, get
from pysteer.ops.registry import LAYOUTS

each_entry = pytest.mark.parametrize(("op", "variant", "sizes"), GENERAL, ids=GENERAL_IDS)
each_op = pytest.mark.parametrize("op", sorted({op for op, _, _ in GENERAL}))
CPU_IS_LIVE = backend_status()["cpu"].live


def small(op: str, variant: str, sizes: dict[str, int], **more: Any) -> tuple[OpSpec, dict[str, Any]]:
    spec = get(op)
    layout = more.pop("layout", spec.layouts[0])
    case = Case(4, 1 if layout == "rows" else 3, 5, layout=layout, sizes=sizes, options=spec.variants[variant], **more)
    return spec, spec.make_inputs(case)


@each_entry
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_fp64(op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype, layout: str) -> None:
    if layout not in get(op).layouts:
        pytest.skip("not a layout of this op")
    for index, (rows, tokens, width) in enumerate(SHAPES):
        if layout != "rows" or tokens == 1:
            check_general(op, variant, Case(rows, tokens, width, dtype, layout, sizes=sizes, seed=index))


@each_entry
def test_plain_torch_agrees_with_fp64(op: str, variant: str, sizes: dict[str, int]) -> None:
    for layout in get(op).layouts:
        case = Case(5, 1 if layout == "rows" else 9, 40, layout=layout, sizes=sizes)
        check_general(op, variant, case, backend_name="reference")


BY_BLAS = ("quadratic_distance",)  # whose products a BLAS may make, which on some processors depend on the threads


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
@each_entry
def test_threads_do_not_change_the_result(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(3, 190, 512, torch.bfloat16, sizes=sizes, options=spec.variants[variant]))
    if spec.implementation(**inputs) != "cpu":
        pytest.skip("plain torch serves this variant")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(tensors_of(spec.function(**inputs)))
    torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        if op in BY_BLAS:
            torch.testing.assert_close(one, three, rtol=1e-5, atol=0)
        else:
            assert torch.equal(bits(one), bits(three))


@each_entry
def test_strided_input(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(5, 12, 34, sizes=sizes, options=spec.variants[variant]))
    for name in spec.wide:
        x = inputs[name]
        wide = torch.randn(*[2 * size for size in x.shape])
        every_second = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        turned = x.movedim(0, -1).contiguous().movedim(-1, 0)
        for view in (every_second, turned, x[:1].expand_as(x)):
            given = {**inputs, name: view}
            compare_general(spec.function(**given), spec, variant, given)


@each_op
def test_empty_activations(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(2, 3, 8))
    for name in spec.wide[:1]:
        given = {**inputs, **{each: inputs[each][:0] for each in (name, *spec.rowwise)}}
        right = tensors_of(spec.reference(**given))
        assert [each.shape for each in tensors_of(spec.function(**given))] == [each.shape for each in right]


@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(op: str, layout: str) -> None:
    if layout not in get(op).layouts:
        pytest.skip("not a layout of this op")
    spec, inputs = small(op, next(iter(get(op).variants)), {}, layout=layout)
    plain = getattr(torch.ops.pysteer, op).default
    arguments = [{**spec.defaults, **inputs}[argument.name] for argument in plain._schema.arguments]
    torch.library.opcheck(plain, arguments)
    if spec.gradients:
        names = [argument.name for argument in plain._schema.arguments]
        for name in spec.gradients:
            place = names.index(name)
            arguments[place] = arguments[place].clone().requires_grad_()
        torch.library.opcheck(getattr(torch.ops.pysteer, f"{op}_ad").default, arguments)


def floats(result: Any) -> tuple[Tensor, ...]:
    return tuple(each for each in tensors_of(result) if each.dtype.is_floating_point and each.requires_grad)


@each_entry
def test_gradients(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec, inputs = small(op, variant, sizes)
    if not spec.gradients:
        name = spec.wide[0]
        result = spec.function(**{**inputs, name: inputs[name].clone().requires_grad_()})
        assert not any(each.requires_grad for each in tensors_of(result))
        return
    leaves = [inputs[name].double().requires_grad_() for name in spec.gradients]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return floats(spec.function(**{**inputs, **dict(zip(spec.gradients, leaves, strict=True))}))

    assert torch.autograd.gradcheck(call, leaves)


@each_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_agree_with_plain_torch(op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    spec, inputs = small(op, variant, sizes, dtype=dtype)
    if not spec.gradients:
        pytest.skip("the op has no gradient")
    leaves = {name: inputs[name].clone().requires_grad_() for name in spec.gradients}
    gradients = []
    for call in (spec.function, spec.reference):
        outputs = floats(call(**{**inputs, **leaves}))
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in outputs]
        gradients.append(torch.autograd.grad(outputs, list(leaves.values()), weights))
    for fast, plain in zip(*gradients, strict=True):
        assert (fast != 0).any()
        rtol, atol = (2e-2, 1e-5) if dtype is torch.bfloat16 else (1e-4, 1e-5)
        if op == "linear_shift" and dtype is torch.bfloat16:  # products of torch with rounded terms, which may cancel
            atol = 2e-2 * float(plain.abs().mean())
        torch.testing.assert_close(fast, plain, rtol=rtol, atol=atol)


@each_op
def test_compiles_without_graph_breaks(op: str) -> None:
    spec, inputs = small(op, next(iter(get(op).variants)), {})
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda **given: spec.function(**given), fullgraph=True, backend="aot_eager")
    compare_general(compiled(**inputs), spec, next(iter(spec.variants)), inputs)
    assert not counters["graph_break"]


@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors(op: str, layout: str) -> None:
    if layout not in get(op).layouts:
        pytest.skip("not a layout of this op")
    spec, inputs = small(op, next(iter(get(op).variants)), {}, layout=layout)
    real = tensors_of(spec.function(**inputs))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        fake = tensors_of(spec.function(**fakes))
    assert [(each.shape, each.stride(), each.dtype) for each in fake] == [
        (each.shape, each.stride(), each.dtype) for each in real
    ]
