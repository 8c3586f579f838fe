"""The Triton kernels in the interpreter, on the CPU: fp32 and few programs, because each costs a millisecond."""

import os
from dataclasses import replace

import pytest
import torch
from checking import ENTRIES, GENERAL, GENERAL_IDS, IDS, check, check_general

from pysteer.ops import Case, backend, backend_status, get

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not backend_status()["triton"].live or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the Triton interpreter is for machines without a GPU",
)

SERVED = [entry for entry in ENTRIES if "triton" in get(entry[0]).backends]
SERVED_IDS = [IDS[ENTRIES.index(entry)] for entry in SERVED]


@pytest.mark.parametrize(("op", "variant", "sizes"), SERVED, ids=SERVED_IDS)
@pytest.mark.parametrize("layout", ["tokens", "rows", "channels_first", "channels_last"])
def test_agrees_with_fp64(op: str, variant: str, sizes: dict[str, int], layout: str) -> None:
    spec = get(op)
    for index, (tokens, width) in enumerate(((1, 63), (70, 17), (33, 64))):
        if layout == "rows" and tokens > 1:
            continue
        case = Case(5, tokens, width, layout=layout, span=index == 1, sizes=sizes, seed=index)
        inputs = spec.make_inputs(replace(case, options=spec.variants[variant]))
        with backend("triton"):
            chosen = spec.implementation(**inputs)
        if chosen == "reference":
            pytest.skip("plain torch serves this variant")
        check(op, variant, case, backend_name="triton", expect="triton")


GENERAL_SERVED = [entry for entry in GENERAL if "triton" in get(entry[0]).backends]


@pytest.mark.parametrize(
    ("op", "variant", "sizes"), GENERAL_SERVED, ids=[GENERAL_IDS[GENERAL.index(entry)] for entry in GENERAL_SERVED]
)
@pytest.mark.parametrize("layout", ["tokens", "rows", "channels_first", "channels_last"])
def test_general_ops_agree_with_fp64(op: str, variant: str, sizes: dict[str, int], layout: str) -> None:
    spec = get(op)
    if layout not in spec.layouts:
        pytest.skip("not a layout of this op")
    for index, (tokens, width) in enumerate(((1, 63), (70, 17), (33, 64))):
        if layout == "rows" and tokens > 1:
            continue
        case = Case(5, tokens, width, layout=layout, sizes=sizes, seed=index)
        inputs = spec.make_inputs(replace(case, options=spec.variants[variant]))
        with backend("triton"):
            chosen = spec.implementation(**inputs)
        if chosen == "reference":
            pytest.skip("plain torch serves this variant")
        check_general(op, variant, case, backend_name="triton", expect="triton")


@pytest.mark.parametrize("op", sorted({op for op, _, _ in SERVED}))
def test_rows_outside_the_bank_are_nan(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 3, 16, strength="one"))
    inputs["slot"][:, 1], inputs["slot"][:, 2] = 99, -3
    with backend("triton"):
        y = spec.function(**inputs)
        assert y[1:3].isnan().all()
        assert y[[0, 3]].isfinite().all()
        inputs["slot"].fill_(1)
        inputs["clock"].fill_(7)
        assert spec.function(**inputs).isnan().all()


def test_ties_go_to_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 20, 16), generator=generator).float()
    weight = torch.randint(-2, 3, (2, 40, 16), generator=generator).float()
    weight[:, 20:] = weight[:, :20].clone()
    delta = torch.arange(40.0).view(1, -1, 1).expand(2, -1, 16).contiguous()
    table = {"slot": torch.ones(1, 2, dtype=torch.int32), "strength": torch.ones(1, 2), "clock": torch.tensor(0)}
    with backend("triton"):
        y = get("prototype_shift").function(x, weight, torch.zeros(2, 40), delta, **table)
    scores = x @ weight[1].T
    first = (scores == scores.amax(-1, keepdim=True)).float().argmax(-1)
    assert torch.equal((y - x)[..., 0].long(), first)
