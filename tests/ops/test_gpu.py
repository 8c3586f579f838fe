"""The ops on a GPU: every backend against fp64, captured graphs, bad tables that come out as NaN."""

import pytest
import torch
from checking import DTYPES, ENTRIES, GENERAL, GENERAL_IDS, IDS, SHAPES, check, check_general

from pysteer.ops import Case, backend, backend_status, get, steering_specs

pytestmark = pytest.mark.gpu

each_entry = pytest.mark.parametrize(("op", "variant", "sizes"), ENTRIES, ids=IDS)


FEW = ((5, 63, 257), (3, 70, 64))  # Triton compiles for each


@each_entry
@pytest.mark.parametrize("name", [None, "triton", "cuda"])
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_fp64(
    op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype, layout: str, name: str | None
) -> None:
    if name and not backend_status()[name].live:
        pytest.skip(backend_status()[name].reason)
    for index, (rows, tokens, width) in enumerate(SHAPES if name == "cuda" else FEW):
        case = Case(rows, tokens, width, dtype, layout, span=index % 2 == 1, device="cuda", sizes=sizes, seed=index)
        check(op, variant, case, backend_name=name)


@pytest.mark.parametrize("op", list(steering_specs()))
def test_a_captured_graph_sees_changes(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 64, 128, torch.bfloat16, strength="one", device="cuda"))
    out = torch.empty_like(inputs["x"])
    spec.function(**inputs, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spec.function(**inputs, out=out)
    for strength in (0.0, 0.5, 1.5):
        inputs["strength"].fill_(strength)
        graph.replay()
        assert torch.equal(out, spec.function(**inputs))
        assert torch.equal(out, inputs["x"]) == (strength == 0.0)


@pytest.mark.parametrize("op", [name for name, spec in steering_specs().items() if spec.backends])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_rows_outside_the_bank_are_nan(op: str, name: str) -> None:
    if not backend_status()[name].live:
        pytest.skip(backend_status()[name].reason)
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 16, 64, strength="one", device="cuda"))
    inputs["slot"][:, 1], inputs["slot"][:, 2] = 99, -3
    with backend(name):
        y = spec.function(**inputs)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("op", list(steering_specs()))
def test_no_call_waits_for_the_device(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 16, 64, device="cuda"))
    spec.function(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        spec.function(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


each_general = pytest.mark.parametrize(("op", "variant", "sizes"), GENERAL, ids=GENERAL_IDS)


@each_general
@pytest.mark.parametrize("name", [None, "triton", "cuda"])
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_general_ops_agree_with_fp64(
    op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype, layout: str, name: str | None
) -> None:
    if layout not in get(op).layouts:
        pytest.skip("not a layout of this op")
    if name and not backend_status()[name].live:
        pytest.skip(backend_status()[name].reason)
    for index, (rows, tokens, width) in enumerate(SHAPES if name == "cuda" else FEW):
        case = Case(rows, tokens, width, dtype, layout, device="cuda", sizes=sizes, seed=index)
        check_general(op, variant, case, backend_name=name)


@pytest.mark.parametrize("op", sorted({op for op, _, _ in GENERAL}))
def test_no_general_op_waits_for_the_device(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 16, 64, device="cuda"))
    spec.function(**inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        spec.function(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
