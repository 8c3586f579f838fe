"""What the tests of the ops share: cases from the registry, the comparison with fp64, and what must not change.

Run as a script it compares everything that the kernels of a device serve, on small shapes and without pytest:
    python tests/ops/checking.py cpu                 one instruction set at a time, see PYSTEER_ISA
    python tests/ops/checking.py cuda --only cuda    one backend, for instance under compute-sanitizer
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tolerances import tolerance
from torch import Tensor

from pysteer.ops import Case, OpSpec, SteeringSpec, backend, backend_status, get, specs
from pysteer.ops.lookup import active_tokens, look_up

CPU_VARIANTS = ["reference", "cpu"] if backend_status()["cpu"].live else ["reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# R, L, D: ones, one off a power of two, and the longest sequence and width, never two long ones at a time.
SHAPES = ((5, 1, 1), (5, 1, 4608), (3, 4608, 1), (5, 63, 257), (5, 257, 63), (1, 130, 192), (7, 7, 64))
SMALL = ((5, 7, 63), (5, 70, 17))


def entries(steering: bool) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield op, variant and sizes; variants that only plain torch serves are tried with the first sizes alone."""
    for spec in specs().values():
        if isinstance(spec, SteeringSpec) != steering:
            continue
        for variant, options in spec.variants.items():
            case = Case(2, 4, 16, options=options)
            fast = bool(spec.backends) and spec.implementation(**spec.make_inputs(case)) != "reference"
            for sizes in spec.sizes if fast else spec.sizes[:1]:
                yield spec.name, variant, dict(sizes)


Entry = tuple[str, str, dict[str, int]]


def names_of(entries: list[Entry]) -> list[str]:
    """Return what the tests call the entries."""
    return ["-".join([op, variant, *(f"{k[0]}{v}" for k, v in sizes.items())]) for op, variant, sizes in entries]


ENTRIES, GENERAL = list(entries(steering=True)), list(entries(steering=False))
IDS, GENERAL_IDS = names_of(ENTRIES), names_of(GENERAL)


def truth_of(spec: OpSpec, inputs: dict[str, Any]) -> Any:
    """Return the result of the reference in fp64."""
    return spec.reference(**{**inputs, **{name: inputs[name].double() for name in spec.wide}})


def active_mask(inputs: dict[str, Any]) -> Tensor:
    """Return where a call may change `x`, in the shape of `x`."""
    x = inputs["x"]
    which, strength = look_up(inputs["slot"], inputs["strength"], inputs["clock"], x.shape[0])
    return active_tokens(x, which, strength, inputs["span"], inputs["channel_dim"]).expand(x.shape)


def bits(x: Tensor) -> Tensor:
    """Return the bit patterns of `x` as integers, so that NaN and -0 can be compared."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def compare(result: Tensor, spec: SteeringSpec, variant: str, inputs: dict[str, Any]) -> None:
    """Assert that a result is right: close to fp64 where tokens are active, the same bits everywhere else.

    Tokens for which rounding decides between two choices are left out; they must be few.
    """
    x, truth, active = inputs["x"], truth_of(spec, inputs), active_mask(inputs)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    assert torch.equal(bits(result)[~active], bits(x)[~active]), "inactive tokens changed"
    limit = tolerance(spec.name, variant, x.dtype)
    sure = active & ~spec.unsure(**inputs)
    assert sure.sum() >= 0.5 * active.sum()
    far = (result.double() - truth).abs() > limit.absolute + limit.relative * truth.abs()
    assert not (far & sure).any(), f"{int((far & sure).sum())} of {int(sure.sum())} elements are off"
    if active.sum() > 100:
        changed = (result != x)[active].float().mean()
        assert changed > 0.02, "the op did nothing"


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a result, which is one or a tuple of them."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare_general(result: Any, spec: OpSpec, variant: str, inputs: dict[str, Any]) -> None:
    """Assert that the result of an op that does not steer is close to fp64, as the op itself defines it."""
    truth = truth_of(spec, inputs)
    limit = tolerance(spec.name, variant, inputs[spec.wide[0]].dtype)
    if spec.compare is not None:
        spec.compare(result, truth, inputs, limit)
        return
    assert len(tensors_of(result)) == len(tensors_of(truth))
    for each, right in zip(tensors_of(result), tensors_of(truth), strict=True):
        assert each.shape == right.shape
        far = (each.double() - right.double()).abs() > limit.absolute + limit.relative * right.double().abs()
        assert not far.any(), f"{int(far.sum())} of {far.numel()} elements are off"
        assert each.isfinite().all() or not right.isfinite().all()


def check_general(
    op: str, variant: str, case: Case, *, backend_name: str | None = None, expect: str | None = None
) -> None:
    """Compare one case of an op that does not steer; `expect` names the backend that has to serve it."""
    spec = get(op)
    inputs = spec.make_inputs(replace(case, options=spec.variants[variant]))
    with backend(backend_name):
        if expect:
            assert spec.implementation(**inputs) == expect
        result = run(spec, inputs)
    given = {value.data_ptr() for value in inputs.values() if isinstance(value, Tensor) and value.numel()}
    assert not given & {each.data_ptr() for each in tensors_of(result) if each.numel()}, "an input was returned"
    compare_general(result, spec, variant, inputs)


def run(spec: OpSpec, inputs: dict[str, Any], **more: Any) -> Any:
    """Call the op and check that it left its inputs alone."""
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    result = spec.function(**inputs, **more)
    for name, value in before.items():
        if more.get("out") is not inputs[name]:
            assert torch.equal(value, inputs[name]), f"{name} was written to"
    return result


def check(op: str, variant: str, case: Case, *, backend_name: str | None = None, expect: str | None = None) -> None:
    """Compare fresh, `out=` and in-place results of one case; `expect` names the backend that has to serve it."""
    spec = get(op)
    assert isinstance(spec, SteeringSpec)
    case = replace(case, options=spec.variants[variant])
    inputs = spec.make_inputs(case)
    with backend(backend_name):
        if expect:
            assert spec.implementation(**inputs) == expect
        result = run(spec, inputs)
        assert result is not inputs["x"]
        assert result.stride() == torch.empty_like(inputs["x"]).stride()
        compare(result, spec, variant, inputs)
        poisoned = torch.full_like(inputs["x"], torch.nan)
        assert run(spec, inputs, out=poisoned) is poisoned
        copied = {**inputs, "x": inputs["x"].clone()}
        run(spec, copied, out=copied["x"])
    for other, name in ((poisoned, "out="), (copied["x"], "in place")):
        if case.device == "cpu":
            assert torch.equal(bits(other), bits(result)), f"{name} differs from a fresh result"
        else:  # a GPU compiler may contract the two forms differently
            compare(other, spec, variant, inputs)


def small_cases(device: str, name: str, few: bool) -> Iterator[tuple[str, str, Case]]:
    """Yield op, variant and case of what a backend serves; few for Triton, which compiles each one."""
    compiled = few or name == "triton"
    for op, variant, sizes in [*ENTRIES, *GENERAL]:
        spec = get(op)
        for dtype in DTYPES[:2] if compiled else DTYPES:
            for layout in set(spec.layouts) & {"tokens", "channels_first"}:
                for rows, tokens, width in SMALL[1:] if compiled else (*SMALL, (5, 3, 200)):
                    case = Case(rows, tokens, width, dtype, layout, span=True, device=device, sizes=sizes)
                    inputs = spec.make_inputs(replace(case, options=spec.variants[variant]))
                    with backend(name):
                        served = spec.implementation(**inputs) == name
                    if served:
                        yield op, variant, case


def main(device: str, only: str | None, few: bool) -> None:
    """Compare everything, or a few shapes, of what the live backends of a device serve."""
    for name in [only] if only else {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}[device]:
        live, reason = backend_status()[name]
        if not live:
            print(f"{name} is not compared: {reason}")
            continue
        count = 0
        for op, variant, case in small_cases(device, name, few):
            checker = check if isinstance(get(op), SteeringSpec) else check_general
            checker(op, variant, case, backend_name=name, expect=name)
            count += 1
        print(f"{name}: compared {count}")
        assert count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=("cpu", "cuda", "triton"), help="this backend alone")
    parser.add_argument("--few", action="store_true", help="one shape and two dtypes")
    asked = parser.parse_args()
    main(asked.device, asked.only, asked.few)
