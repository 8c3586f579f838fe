"""Prepared ops: the bits, errors and gradients of the op itself, and the direct way where it is meant to be taken."""

import copy
from typing import Any

import pytest
import torch
from checking import ENTRIES, IDS, bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get, prepare
from pysteer.ops.prepared import Prepared, count_at

# One kernel on the tensors given.
DIRECT = ("affine_shift", "gradient_shift", "low_rank_shift", "mlp_shift", "prototype_shift", "sae_edit")
needs_extension = pytest.mark.skipif(not backend_status()["cpu"].live, reason="the compiled extension is not built")


def parts(op: str, variant: str, sizes: dict[str, int], **more: Any) -> tuple[Tensor, dict[str, Any], Prepared]:
    """An activation, the table, and the prepared op."""
    spec = get(op)
    case = Case(5, 3, 40, sizes=sizes, options=spec.variants[variant], **more)
    inputs = spec.make_inputs(case)
    x, table = inputs.pop("x"), {name: inputs.pop(name) for name in ("slot", "strength", "clock", "span")}
    return x, table, prepare(spec.function, **inputs)


def of_affine() -> tuple[Tensor, dict[str, Any], Prepared]:
    return parts("affine_shift", "bounded", {})


def whole(prepared: Prepared, x: Tensor, table: dict[str, Any]) -> Tensor:
    return prepared.function(x, **prepared.given, **table)


def directly(prepared: Prepared) -> int:
    """How many kinds of calls go the direct way."""
    return len(prepared._kept)


def refuse_whole(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on only the direct way is left."""

    def never(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the op was called as a whole")

    monkeypatch.setattr(prepared, "function", never)


@pytest.mark.parametrize(("op", "variant", "sizes"), ENTRIES, ids=IDS)
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_same_bits_as_the_op(op: str, variant: str, sizes: dict[str, int], layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, table, prepared = parts(op, variant, sizes, dtype=dtype, layout=layout, span=True)
        expected = whole(prepared, x, table)
        for _ in range(3):
            y = prepared(x, **table)
            assert torch.equal(bits(y), bits(expected))
            assert y.stride() == expected.stride()
        assert not torch.equal(expected, x)
        compiled = get(op).implementation(x=x, **prepared.given, **table) == "cpu"
        assert directly(prepared) == (compiled and op in DIRECT)


@needs_extension
def test_the_direct_way_sees_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table, prepared = of_affine()
    before, function = prepared(x, **table), prepared.function
    refuse_whole(prepared, monkeypatch)
    for change in (
        lambda: table["strength"].mul_(-2),
        lambda: prepared.given["gain"].add_(0.5),
        lambda: table["clock"].zero_(),
        lambda: table["slot"].zero_(),
    ):
        change()
        after = prepared(x, **table)
        assert torch.equal(after, function(x, **prepared.given, **table))
        assert not torch.equal(after, before)
        before = after


@needs_extension
def test_whatever_else_changes_is_looked_at_again() -> None:
    x, table, prepared = of_affine()
    prepared(x, **table)
    assert directly(prepared) == 1
    for other in (x[:2], x[:, :1], x.to(torch.bfloat16), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(prepared(other, **table), whole(prepared, other, table))
    assert directly(prepared) == 5
    more = {name: each if name in ("clock", "span") else each.repeat(1, 2) for name, each in table.items()}
    many = torch.cat([x, x])
    assert torch.equal(prepared(many, **more), whole(prepared, many, more))
    assert directly(prepared) == 1  # of the new table
    with pytest.raises(InputError, match="rows of x"):
        prepared(many, **table)
    prepared.given["gain"].data = prepared.given["gain"][:, :7].clone()
    with pytest.raises(InputError, match="gain"):
        prepared(x, **table)


@needs_extension
def test_a_clock_or_slot_outside_is_an_error_on_the_direct_way() -> None:
    x, table, prepared = of_affine()
    prepared(x, **table)
    table["clock"].fill_(99)
    with pytest.raises(InputError, match="clock"):
        prepared(x, **table)
    table["clock"].zero_()
    table["slot"].fill_(77)
    with pytest.raises(InputError, match="slot"):
        prepared(x, **table)


@needs_extension
def test_gradients_transforms_modes_and_backends_take_the_whole_way() -> None:
    x, table, prepared = of_affine()
    expected = prepared(x, **table)
    wanted = x.clone().requires_grad_()
    prepared(wanted, **table).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().max() > 0
    table["strength"].requires_grad_()
    assert prepared(x, **table).requires_grad
    with torch.no_grad():
        assert not prepared(x, **table).requires_grad
    table["strength"].requires_grad_(False)

    def each(row: Tensor) -> Tensor:
        return prepared(row.unsqueeze(0), **table)[0]

    assert torch.allclose(torch.vmap(each)(x[:1]), expected[:1])
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(prepared(x, **table), expected)
    assert any("affine_shift" in name for name in seen)
    with backend("reference"):
        prepared(x, **table)
        assert len(prepared._whole) == 1
    assert torch.equal(prepared(x, **table), expected)


def test_a_compiled_graph_holds_the_op() -> None:
    x, table, prepared = of_affine()
    prepared(x, **table)
    compiled = torch.compile(lambda x: prepared(x, **table) + 0, backend="eager", fullgraph=True)
    expected = whole(prepared, x, table)
    assert torch.allclose(compiled(x), expected)
    table["strength"].mul_(3)
    assert torch.allclose(compiled(x), whole(prepared, x, table))
    assert not torch.allclose(compiled(x), expected)


@needs_extension
def test_no_more_shapes_are_kept_than_needed() -> None:
    _, table, prepared = of_affine()
    for tokens in range(1, 80):
        prepared(torch.zeros(1, tokens, 40), **table)
    assert 0 < directly(prepared) <= 64


@needs_extension
def test_a_kept_call_counts_and_looks_at_the_number_of_rows() -> None:
    x, table, prepared = of_affine()
    expected, counts = prepared(x, **table), torch.zeros_like(table["strength"][:, 0], dtype=torch.int64)
    values = list(table.values())
    y = prepared.again(x, *values, counts, len(x), 1 << 36)
    assert y is not None
    assert torch.equal(y, expected)
    assert counts.sum() == counts[table["clock"]] == (1 << 36) + x.shape[1]
    assert prepared.again(x, *values, counts, len(x) + 1, 0) is None
    assert prepared.again(x, values[0].clone(), *values[1:], counts, len(x), 0) is None  # of another table
    assert counts.sum() == (1 << 36) + x.shape[1]
    with pytest.raises(TypeError, match="again"):
        prepared.again(x)


@needs_extension
def test_a_copy_keeps_calls_of_its_own() -> None:
    x, table, prepared = of_affine()
    expected = prepared(x, **table)
    for other in (copy.deepcopy(prepared), copy.copy(prepared)):
        assert directly(other) == 0
        assert torch.equal(other(x, **table), expected)
        assert directly(other) == directly(prepared) == 1


def test_counts_go_to_the_current_step() -> None:
    counts, clock, one = torch.zeros(3, dtype=torch.int64), torch.tensor(1), torch.ones(1, dtype=torch.int64)
    count_at(counts, clock, one, 5)
    count_at(counts, clock, one, 1 << 40)
    clock.fill_(2)
    count_at(counts, clock, one, 7)
    assert counts.tolist() == [0, 5 + (1 << 40), 7]
