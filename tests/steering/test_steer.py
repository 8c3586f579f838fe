"""steer(): what a plan, strengths, gates and layouts do to the output, against a computation by hand."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steering_toy import LAYERS, STEPS, WIDTH, FeedForward, Toy, plan, shift
from torch import Tensor

from pysteer.errors import InputError, PysteerError
from pysteer.steering import Plan, SiteParameters, steer

Amount = Callable[[str, int, int], float]  # (site, step, row) -> what is added there


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, STEPS, WIDTH)


def by_hand(model: Toy, x: Tensor, amount: Amount) -> list[Tensor]:
    outputs = []
    for step in range(STEPS):
        h = x[:, : step + 1]
        for i, block in enumerate(model.blocks):
            added = [
                torch.tensor([amount(f"{kind}.{i}", step, r) for r in range(len(x))])[:, None, None]
                for kind in ("ffn", "block")
            ]
            h = h + torch.tanh(block.norm(h) @ block.ffn.weight) + added[0] + added[1]
        outputs.append(h.detach())
    return outputs


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


def test_schedule_per_step_and_half(model: Toy, x: Tensor) -> None:
    schedule = {"ffn.1": {1: (0.5, 0.0), 3: (1.0, -2.0)}, "block.0": {None: (0.25, 0.25), 2: (0.0, 3.0)}}
    parameters = [shift("ffn.1", 2.0, steps=(1, 3)), shift("block.0", 1.0)]

    def amount(site: str, step: int, row: int) -> float:
        half = 0 if row < 2 else 1
        if site == "ffn.1":
            return 2 * schedule["ffn.1"].get(step, (0, 0))[half]
        if site == "block.0":
            return schedule["block.0"].get(step, (0.25, 0.25))[half]
        return 0.0

    with torch.no_grad():
        plain = model.run(x, 2)
        with steer(model, Plan(parameters, schedule)):
            steered = model.run(x, 2)
        assert_same(steered, by_hand(model, x, amount))
        assert not any(torch.equal(a, b) for a, b in zip(steered, plain, strict=True))
        assert_equal(model.run(x, 2), plain)


def test_parameters_differ_between_steps(model: Toy, x: Tensor) -> None:
    bias = torch.stack([torch.full((WIDTH,), value) for value in (1.0, 2.0, 3.0)])
    tensors = {"gain": torch.ones(3, WIDTH), "bias": bias}
    values = {0: 1.0, 3: 2.0, 1: 3.0}
    one = Plan.build([SiteParameters("ffn.0", "affine_shift", (0, 3, 1), tensors)])
    with torch.no_grad(), steer(model, one):
        assert_same(model.run(x), by_hand(model, x, lambda site, step, _: values.get(step, 0) * (site == "ffn.0")))


@pytest.mark.parametrize(
    ("rows", "cond", "uncond"), [("cond", 1, 0), ("uncond", 0, 1), ("both", 1, 1)], ids=["cond", "uncond", "both"]
)
def test_strength_and_gate(model: Toy, x: Tensor, rows: str, cond: int, uncond: int) -> None:
    strength = torch.rand(STEPS, 2) + 0.5
    gate = torch.tensor([1.0, 0.0])
    with torch.no_grad(), steer(model, plan("block.1", rows=rows), strength=0.0) as handle:
        plain = by_hand(model, x, lambda *_: 0.0)
        bare = model.run(x, 2)
        assert_same(bare, plain)

        def check(factor: Callable[[int, int], float]) -> None:
            def amount(site: str, step: int, row: int) -> float:
                return (cond if row < 2 else uncond) * factor(step, row % 2) if site == "block.1" else 0.0

            found = model.run(x, 2)
            assert_same(found, by_hand(model, x, amount))
            off = [row for row in range(4) if amount("block.1", 0, row) == 0]
            assert_equal([y[off] for y in found], [y[off] for y in bare])  # bit for bit

        handle.strength = 2.0
        check(lambda step, b: 2.0)
        handle.strength = torch.tensor(1.5)
        check(lambda step, b: 1.5)
        handle.strength = strength[0]
        check(lambda step, b: float(strength[0, b]))
        handle.strength = strength
        check(lambda step, b: float(strength[step, b]))
        handle.gate = gate
        check(lambda step, b: float(strength[step, b] * gate[b]))
        handle.strength = -1.0
        check(lambda step, b: -float(gate[b]))
        handle.gate = None
        check(lambda step, b: -1.0)


def test_zero_strength_is_bit_identical_with_nan_and_minus_zero(model: Toy, x: Tensor) -> None:
    x[0, 0, 0], x[1, 0, 1], x[2, 0, 2] = torch.nan, -0.0, torch.inf
    sites = [f"{kind}.{i}" for kind in ("ffn", "block") for i in range(LAYERS)]
    with torch.no_grad():
        plain = model.run(x)
        with steer(model, plan(*sites), strength=torch.tensor([0.0, 1.0, 0.0, 0.0])):
            steered = model.run(x)
    for got, want in zip(steered, plain, strict=True):
        rows = [0, 2, 3]
        assert torch.equal(got[rows].view(torch.int32), want[rows].view(torch.int32))
        assert not torch.allclose(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(model: Toy, x: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        low = model.to(dtype)
        with steer(low, plan("block.2")):
            first = low.run(x.to(dtype))
            assert all(y.dtype == dtype for y in first)
        assert_same(first, [(y.float() + 1).to(dtype) for y in low.run(x.to(dtype))])


def test_casting_while_attached_keeps_the_strengths(model: Toy, x: Tensor) -> None:
    with torch.no_grad(), steer(model, plan("block.2"), strength=1 / 3) as handle:
        model.to(torch.bfloat16)
        low = model.run(x.bfloat16())
        handle.strength = 0.0
        plain = model.run(x.bfloat16())
        assert_same(low, [(y.float() + 1 / 3).bfloat16() for y in plain])


def test_two_entries_at_one_site_apply_in_order(model: Toy, x: Tensor) -> None:
    double = SiteParameters(
        "block.2", "affine_shift", None, {"gain": torch.full((1, WIDTH), 2.0), "bias": torch.zeros(1, WIDTH)}
    )
    with torch.no_grad():
        plain = model.run(x)
        with steer(model, Plan.build([shift("block.2"), double])):
            assert_same(model.run(x), [(y + 1) * 2 for y in plain])
        with steer(model, Plan.build([double]) + plan("block.2", value=3.0)):
            assert_same(model.run(x), [y * 2 + 3 for y in plain])


def test_merged_plans_keep_their_schedules(model: Toy, x: Tensor) -> None:
    merged = plan("block.2", rows="cond") + plan("block.2", value=5.0, rows="uncond")
    with torch.no_grad(), steer(model, merged):
        expected = by_hand(model, x, lambda site, _, row: (1 if row < 2 else 5) * (site == "block.2"))
        assert_same(model.run(x, 2), expected)


@pytest.mark.parametrize("first", [0, 1], ids=["FIFO", "LIFO"])
def test_nested_contexts(model: Toy, x: Tensor, first: int) -> None:
    with torch.no_grad():
        plain = model.run(x)
        handles = [steer(model, plan("block.2")).__enter__(), steer(model, plan("block.2", value=2.0)).__enter__()]
        assert_same(model.run(x), [y + 3 for y in plain])
        handles[first].__exit__(None, None, None)
        assert_same(model.run(x), [y + (2, 1)[first] for y in plain])
        handles[1 - first].__exit__(None, None, None)
        assert_equal(model.run(x), plain)
    assert model.listeners == []
    assert type(model.blocks[2]).__dict__.get("_steer_base") is None


def test_batches_of_changing_size(model: Toy) -> None:
    with torch.no_grad(), steer(model, plan("block.2", rows="cond"), capacity=4) as handle:
        for rows, uncond in ((2, 0), (4, 2), (3, 0), (16, 8), (1, 0), (16, 8)):
            x = torch.randn(rows, STEPS, WIDTH)
            steered = model.run(x, uncond)
            assert_same(steered, by_hand(model, x, lambda s, _, row: (s == "block.2") * (row < rows - uncond)))  # noqa: B023
        assert sum(handle.report()[0].steps) == 6
        assert handle.report()[0].tokens_touched == 10 * (2 + 2 + 3 + 8 + 1 + 8)


def test_report_counts_calls_and_touched_tokens(model: Toy, x: Tensor) -> None:
    entry = shift("ffn.0", 1.0, steps=(1, 2))
    with torch.no_grad(), steer(model, Plan.build([entry]) + plan("block.1", rows="uncond")) as handle:
        for _ in range(2):
            model.run(x, 2)
        handle.gate = torch.tensor([0.0, 1.0])
        model.run(x, 2)
        ffn, block = handle.report()
        assert (ffn.site, ffn.part, ffn.op, ffn.calls) == ("ffn.0", "visual", "affine_shift", 12)
        assert ffn.steps == block.steps == (0, 1, 2, 3)
        assert ffn.tokens_touched == (2 + 3) * (2 + 2 + 1)
        assert block.tokens_touched == (1 + 2 + 3 + 4) * (2 + 2 + 1)
    assert handle.report() == [ffn, block]


def test_a_planned_site_that_never_ran_is_an_error(model: Toy, x: Tensor) -> None:
    with pytest.raises(PysteerError, match=r"never ran: pool;"), steer(model, plan("block.1", "pool")):
        model.run(x)
    assert model.listeners == []
    with steer(model, plan("block.1", "pool")):
        pass  # nothing ran at all
    with steer(model, Plan([shift("pool"), shift("block.1")], {"block.1": {0: (1, 0)}})):
        model.run(x)  # pool is switched off
    handle = steer(model, plan("block.1", "pool")).__enter__()
    model.run(x)
    handle.__exit__(ZeroDivisionError, ZeroDivisionError(), None)  # an error on its way is not covered up
    assert all(type(block.ffn) is FeedForward for block in model.blocks)


def test_rows_that_were_not_announced_are_an_error(model: Toy, x: Tensor) -> None:
    with steer(model, plan("block.1")) as handle:
        with pytest.raises(PysteerError, match=r"block\.1 ran before the rows"):
            model(x)
        model.run(x)
        with pytest.raises(PysteerError, match=r"block\.1 ran with 3 rows; announced were 4"):
            model(x[:3])
        with pytest.raises(PysteerError, match=r"block\.1 returned \[4, 8\]"):
            model(x[:, 0])
        assert handle.report()[0].calls == STEPS
    run = torch.compile(model, backend="eager")
    with pytest.raises(PysteerError, match="never announced"), steer(model, plan("block.1")):
        run(x[:1])


def test_text_part_with_lengths(model: Toy) -> None:
    """Layout "rows" and a part of its own; lengths restrict tokens, and are kept apart from the other part."""
    with torch.no_grad(), steer(model, plan("pool", rows="cond")) as handle:
        x = torch.randn(4, WIDTH)
        plain = torch.nn.functional.linear(x, model.pool.weight, model.pool.bias)
        model.announce(2, 2, part="text")
        torch.testing.assert_close(model.pool(x), plain + torch.tensor([[1.0], [1], [0], [0]]))
        model.announce(0, 4, part="text")
        assert torch.equal(model.pool(x), plain)
        model.announce(4, 0, torch.tensor([1, 2, 1, 1]), part="text")
        torch.testing.assert_close(model.pool(x), plain + 1)
        assert handle.report()[0].tokens_touched == 2 + 0 + 4


def test_lengths_restrict_tokens(model: Toy) -> None:
    with torch.no_grad(), steer(model, plan("block.2")) as handle:
        touched = 0
        for lengths in ([1, 3], None, [2, 2, 4, 0, 1], [4], None):
            rows = len(lengths) if lengths else 2
            x = torch.randn(rows, 4, WIDTH)
            counts = torch.tensor(lengths or [4] * rows)
            model.announce(rows, 0, torch.tensor(lengths) if lengths else None)
            plain = by_hand(model, x, lambda *_: 0)[3]
            mask = (torch.arange(4) < counts[:, None])[..., None]
            torch.testing.assert_close(model(x), plain + mask)
            touched += int(counts.sum())
        assert handle.report()[0].tokens_touched == touched


def test_ensure_runs_at_every_run(model: Toy, x: Tensor) -> None:
    with torch.no_grad():
        with steer(model, plan("ffn.1")):
            model.run(x)
            old = model.blocks[1].ffn
            old.forward = lambda value: torch.tanh(value @ old.weight)
            assert_same(model.run(x), by_hand(model, x, lambda site, *_: float(site == "ffn.1")))
        del old.forward
        handle = steer(model, plan("ffn.1")).__enter__()
        model.blocks[1].ffn = FeedForward()
        with pytest.raises(PysteerError, match="replaced"):
            model.run(x)
        handle.detach()
    assert type(old) is FeedForward
    assert model.listeners == []


def test_moving_the_model_moves_its_table(model: Toy) -> None:
    handle = steer(model, plan("block.1")).__enter__()
    table = handle._parts["visual"].tables[0]
    model.to("meta")
    assert {t.device.type for t in (*table.bank.values(), table.slot, table.strength, table.visits)} == {"meta"}
    handle.detach()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), r"entries of strength: got 3; allowed: 4"),
        (torch.ones(3, 4), r"steps of strength for part visual: got 3; allowed: 4"),
        (torch.ones(1, 1, 1), r"shape of strength"),
        (torch.tensor([1.0, torch.nan, 0, 0]), r"strength: got 'NaN or infinity'"),
        (float("inf"), r"strength: got inf"),
        ("strong", r"strength: got 'strong'"),
        ({"sound": 1.0}, r"unknown part: got 'sound'; allowed: text, visual"),
    ],
)
def test_bad_strength_changes_nothing(model: Toy, x: Tensor, value: Any, error: str) -> None:
    with torch.no_grad(), steer(model, plan("block.1")) as handle:
        before = model.run(x)
        with pytest.raises(InputError, match=error):
            handle.strength = value
        assert handle.strength == 1.0
        assert_equal(model.run(x), before)


def test_bad_gate(model: Toy, x: Tensor) -> None:
    with steer(model, plan("block.1")) as handle:
        model.run(x)
        for value in (torch.ones(3), torch.ones(1, 4), 1.0, torch.full((4,), torch.nan)):
            with pytest.raises(InputError, match="gate"):
                handle.gate = value  # type: ignore[assignment]
        handle.gate = torch.ones(4)
        with pytest.raises(InputError, match=r"entries of gate: got 4; allowed: 2"):
            model.run(x[:2])


def test_bad_rows(model: Toy) -> None:
    with steer(model, plan("block.1")) as handle:
        for cond, uncond in ((2, 1), (0, 0), (-1, 0)):
            with pytest.raises(InputError, match="rows of part visual"):
                handle.rows("visual", cond, uncond)
        with pytest.raises(InputError, match="lengths of part visual"):
            handle.rows("visual", 2, 0, torch.tensor([1]))


def test_strength_per_part(model: Toy, x: Tensor) -> None:
    with torch.no_grad(), steer(model, plan("block.2", "pool"), strength={"text": 0.0}) as handle:
        plain = by_hand(model, x, lambda *_: 0)
        assert_same(model.run(x), [y + 1 for y in plain])
        model.announce(4, 0, part="text")
        pooled = model.pool(x[:, 0])
        assert torch.equal(pooled, torch.nn.functional.linear(x[:, 0], model.pool.weight, model.pool.bias))
        handle.strength = {"visual": torch.rand(STEPS, 4), "text": 2.0}
        torch.testing.assert_close(model.pool(x[:, 0]), pooled + 2)
        with pytest.raises(InputError, match=r'give parts their own: {"text": tensor}'):
            handle.strength = torch.rand(STEPS, 4)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_while_steering_is_plain(model: Toy, x: Tensor, way: Callable[[Toy], Toy]) -> None:
    plain = model.run(x)
    with steer(model, plan("block.2")) as handle:
        model.run(x)
        replica = way(model)
        assert_equal(replica.run(x[:2]), [y[:2] for y in plain])
        assert handle.report()[0].calls == STEPS
        assert_same(model.run(x), [y + 1 for y in plain])


def test_handle_is_attached_once_at_a_time(model: Toy) -> None:
    with steer(model, plan("block.1")) as handle, pytest.raises(PysteerError, match="attached already"):
        handle.__enter__()


def test_tables_made_in_inference_mode_can_be_updated_outside(model: Toy, x: Tensor) -> None:
    with torch.inference_mode():
        handle = steer(model, plan("block.2")).__enter__()
        first = model.run(x)
    handle.strength = 2.0
    with torch.no_grad():
        assert_same(model.run(x), [y + 1 for y in first])
    handle.__exit__(None, None, None)


def test_gradient_flows_through_steering(model: Toy, x: Tensor) -> None:
    gain = SiteParameters(
        "block.2", "affine_shift", None, {"gain": torch.full((1, WIDTH), 3.0), "bias": torch.zeros(1, WIDTH)}
    )
    with steer(model, Plan.build([gain])) as handle:
        handle.rows("visual", 4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        model(a).sum().backward()
    model(b).sum().backward()
    torch.testing.assert_close(a.grad, 3 * b.grad)
