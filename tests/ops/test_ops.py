"""Every op of the registry against fp64: dtypes, layouts, shapes, strengths. A new op is tested by being there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checking import DTYPES, ENTRIES, IDS, SHAPES, SMALL, active_mask, bits, check, compare
from tolerances import TOLERANCES

from pysteer.ops import Case, backend, backend_status, get, specs, steering_specs
from pysteer.ops.registry import LAYOUTS, STRENGTHS

CPU_IS_LIVE = backend_status()["cpu"].live
BACKENDS = [None, "reference"] if CPU_IS_LIVE else [None]

each_entry = pytest.mark.parametrize(("op", "variant", "sizes"), ENTRIES, ids=IDS)
each_op = pytest.mark.parametrize("op", list(steering_specs()))


def fits(layout: str, tokens: int) -> bool:
    return layout != "rows" or tokens == 1


@each_entry
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_fp64(op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype, layout: str) -> None:
    for index, (rows, tokens, width) in enumerate(SHAPES):
        if fits(layout, tokens):
            strength = STRENGTHS[index % len(STRENGTHS)]
            case = Case(rows, tokens, width, dtype, layout, strength, span=index % 2 == 1, sizes=sizes, seed=index)
            check(op, variant, case)


@each_entry
@pytest.mark.parametrize("strength", STRENGTHS)
def test_strengths_and_spans(op: str, variant: str, sizes: dict[str, int], strength: str) -> None:
    for span in (False, True):
        for name in BACKENDS:
            case = Case(5, 9, 40, torch.float32, "tokens", strength, span=span, sizes=sizes)
            check(op, variant, case, backend_name=name)


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16"])  # what is best here runs everywhere else
def test_every_instruction_set(isa: str, root: Path) -> None:
    script = Path(__file__).with_name("checking.py")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYSTEER_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, script, "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 50


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
@each_entry
def test_threads_do_not_change_the_result(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    case = Case(3, 190, 512, torch.bfloat16, span=True, sizes=sizes, options=spec.variants[variant])
    inputs = spec.make_inputs(case)
    if spec.implementation(**inputs) != "cpu":
        pytest.skip("plain torch serves this variant")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(spec.function(**inputs))
    torch.set_num_threads(before)
    assert torch.equal(bits(results[0]), bits(results[1]))


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
@each_entry
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_large_results_past_the_caches(op: str, variant: str, sizes: dict[str, int], layout: str) -> None:
    spec = get(op)
    if "cpu" not in spec.backends or max(sizes.values(), default=0) > 8:
        pytest.skip("no kernel that writes past the caches, or slow")
    case = Case(2, 9000, 1024, torch.bfloat16, layout, "one", sizes=sizes, options=spec.variants[variant])
    inputs = spec.make_inputs(case)
    if spec.implementation(**inputs) != "cpu":
        pytest.skip("plain torch serves this variant")
    out = torch.full_like(inputs["x"], torch.nan)
    spec.function(**inputs, out=out)  # 36 MB: not read back from the cache
    in_place = inputs["x"].clone()
    spec.function(**{**inputs, "x": in_place}, out=in_place)
    assert torch.equal(bits(out), bits(in_place))
    assert (out != inputs["x"]).float().mean() > 0.5  # a gate leaves some tokens alone


@each_entry
def test_nothing_outside_the_result_is_written(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    for rows, tokens, width in SMALL:
        case = Case(rows, tokens, width, sizes=sizes, options=spec.variants[variant])
        inputs = spec.make_inputs(case)
        around = torch.full((rows + 2, tokens + 2, width + 2), torch.nan)
        out = around[1:-1, 1:-1, 1:-1]
        spec.function(**inputs, out=out)
        compare(out, spec, variant, inputs)
        out.zero_()
        assert around.isnan().sum() == around.numel() - out.numel()


@each_entry
def test_strided_input(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(5, 12, 34, sizes=sizes, options=spec.variants[variant]))
    wide = torch.randn(5, 24, 40)
    views = [wide[:, ::2, 3:37], wide.transpose(0, 1)[:5, :5, :34], wide[:, :12, ::1][..., :34], wide[:1, :12, :34]]
    for x in [*views, views[-1].expand(5, -1, -1)]:
        given = {**inputs, "x": x}
        result = spec.function(**given)
        assert result.stride() == torch.empty_like(x).stride()
        compare(result, spec, variant, given)


@each_entry
def test_rows_do_not_touch_each_other(op: str, variant: str, sizes: dict[str, int]) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(5, 11, 48, sizes=sizes, options=spec.variants[variant]))
    whole = spec.function(**inputs)
    exact = spec.implementation(**inputs) != "reference"  # BLAS sums in an order that depends on the batch
    for row in range(5):
        alone = {**inputs, "x": inputs["x"][row : row + 1]}
        for name in ("slot", "strength"):
            alone[name] = inputs[name][:, row : row + 1]
        result = spec.function(**alone)
        if exact:
            assert torch.equal(result[0], whole[row])
        else:
            torch.testing.assert_close(result[0], whole[row], rtol=1e-4, atol=1e-4)
    spoiled = {**inputs, "x": inputs["x"].clone()}
    spoiled["x"][0] = torch.nan
    assert torch.equal(spec.function(**spoiled)[1:], whole[1:])


@each_entry
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_odd_values_pass_through(op: str, variant: str, sizes: dict[str, int], dtype: torch.dtype, layout: str) -> None:
    spec = get(op)
    for name in BACKENDS:
        case = Case(5, 37, 35, dtype, layout, span=True, sizes=sizes, options=spec.variants[variant])
        inputs = spec.make_inputs(case)
        x, active = inputs["x"], active_mask(inputs)
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-40, -1e-7], dtype=dtype)
        x.copy_(torch.where(active, x, odd[torch.arange(x.numel()) % 7].view(x.shape)))
        with backend(name):
            result = spec.function(**inputs)
        assert torch.equal(bits(result)[~active], bits(x)[~active])
        assert result[active].isfinite().all()
        assert (result != x)[active].any()


@each_op
def test_zero_strength_and_slot_zero_are_the_identity(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(5, 6, 33, strength="one"))
    assert not torch.equal(spec.function(**inputs), inputs["x"])
    for name in ("strength", "slot"):
        off = {**inputs, name: torch.zeros_like(inputs[name])}
        result = spec.function(**off)
        assert torch.equal(bits(result), bits(inputs["x"]))
        assert result.data_ptr() != inputs["x"].data_ptr()


@each_op
def test_the_clock_selects_the_step(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(4, 6, 33))
    results = []
    for step in range(3):
        inputs["clock"].fill_(step)
        compare(result := spec.function(**inputs), spec, next(iter(spec.variants)), inputs)
        results.append(result)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@each_op
def test_empty_activations(op: str) -> None:
    spec = get(op)
    inputs = spec.make_inputs(Case(2, 3, 8))
    assert spec.function(**{**inputs, "x": inputs["x"][:, :0]}).shape == (2, 0, 8)
    assert spec.function(**{**inputs, "x": inputs["x"][:0]}).shape == (0, 3, 8)


def test_tolerances_have_reasons() -> None:
    assert all(row.reason and row.relative > 0 and row.absolute > 0 for row in TOLERANCES.values())
    assert {key[0] for key in TOLERANCES if len(key) > 1} <= set(specs())
