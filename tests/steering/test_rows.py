"""Rows as settings: a plan per prompt, batches with the unconditional rows first, and masks of tokens."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from steering_toy import LAYERS, STEPS, WIDTH, Toy, counter, plan, shift
from torch import Tensor

from pysteer.capture import Recorder
from pysteer.errors import InputError
from pysteer.steering import Plan, SiteParameters, steer
from pysteer.steering.stack import stacked

PROMPTS = 16


def random_parameters(site: str, op: str, size: int, generator: torch.Generator) -> SiteParameters:
    """Parameters of an op with `size` prototypes or ranks."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    tensors = {
        "affine_shift": lambda: {"gain": 1 + 0.2 * draw(WIDTH), "bias": draw(WIDTH)},
        "prototype_shift": lambda: {
            "weight": draw(size, WIDTH), "offset": draw(size), "delta": draw(size, WIDTH)
        },
        "low_rank_shift": lambda: {
            "read": draw(size, WIDTH), "write": 0.2 * draw(size, WIDTH), "bias": draw(WIDTH)
        },
    }[op]()  # fmt: skip
    return SiteParameters(site, op, None, tensors)


def random_plan(row: int) -> Plan:
    """A plan that differs from those of other rows in sites, ops, sizes, order, schedule and strength."""
    generator = torch.Generator().manual_seed(row)
    ops = ["affine_shift", "prototype_shift", "low_rank_shift"]
    entries = []
    for number in range(1 + row % 4):
        site = f"{('ffn', 'block')[(row + number) % 2]}.{(row // 2 + number // 2) % LAYERS}"
        entries.append(random_parameters(site, ops[(row + number) % 3], 2 + row % 2, generator))
    sites = {entry.site for entry in entries}
    schedule = {
        site: {(None, row % STEPS)[i % 2]: (0.3 + 0.1 * row, -0.2 * (row % 3))} for i, site in enumerate(sorted(sites))
    }
    return Plan(entries, schedule)


def test_a_batch_of_plans_equals_single_runs() -> None:
    model, x = Toy().eval(), torch.randn(2 * PROMPTS, STEPS, WIDTH)
    plans = [random_plan(row) for row in range(PROMPTS)]
    with torch.no_grad():
        plain = model.run(x, PROMPTS)
        with steer(model, plans) as handle:
            together = model.run(x, PROMPTS)
            tables = len(handle.report())
        changed = 0
        for row in range(PROMPTS):
            pair = x[[row, PROMPTS + row]]
            with steer(model, plans[row]):
                alone = model.run(pair, 1)
            for step in range(STEPS):
                torch.testing.assert_close(together[step][[row, PROMPTS + row]], alone[step], rtol=1e-5, atol=1e-5)
            changed += any(not torch.equal(a[row], b[row]) for a, b in zip(together, plain, strict=True))
    assert changed == PROMPTS
    assert tables < sum(len(each.entries) for each in plans)


def test_prompts_with_the_same_parameters_share_them() -> None:
    shared, other = shift("ffn.0", 1.0, steps=(0, 1)), shift("ffn.0", 2.0, steps=(3, 1))
    plans = [Plan.build([each], strength=s) for each, s in ((shared, 1.0), (other, 2.0), (shared, 3.0))]
    (stack,) = stacked(plans)
    assert stack.sets == 4
    model, x = Toy().eval(), torch.randn(3, STEPS, WIDTH)
    with torch.no_grad():
        plain = model.run(x)
        with steer(model, plans):
            found = model.run(x)
    for step in range(STEPS):
        touched = [not torch.equal(found[step][row], plain[step][row]) for row in range(3)]
        assert touched == [step < 2, step in (1, 3), step < 2]


def test_order_is_kept_at_every_site() -> None:
    double = SiteParameters(
        "block.2", "affine_shift", None, {"gain": torch.full((1, WIDTH), 2.0), "bias": torch.zeros(1, WIDTH)}
    )
    replace = SiteParameters(
        "block.2", "prototype_shift", None,
        {"weight": torch.zeros(1, 1, WIDTH), "offset": torch.zeros(1, 1), "delta": torch.ones(1, 1, WIDTH)},
    )  # fmt: skip
    plans = [Plan.build(entries) for entries in ([double, replace], [replace, double], [double, double])]
    model, x = Toy().eval(), torch.randn(3, STEPS, WIDTH)
    with torch.no_grad():
        plain = model.run(x)
        with steer(model, plans):
            found = model.run(x)
    for y, steered in zip(plain, found, strict=True):
        expected = torch.stack([y[0] * 2 + 1, (y[1] + 1) * 2, y[2] * 4])
        torch.testing.assert_close(steered, expected)


def test_plans_change_in_a_compiled_model_without_a_new_graph() -> None:
    model, x = Toy().eval(), torch.randn(4, STEPS, WIDTH)
    backend, graphs = counter()
    plans = [random_plan(row) for row in range(4)]
    other = copy.deepcopy(model)
    with torch.no_grad(), steer(model, plans) as handle:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        model.announce(4)
        compiled(x[:, :2])
        made = len(graphs)
        seen = []
        for turn in range(50):
            handle.update(plans[turn % 4 :] + plans[: turn % 4])
            handle.strength = 0.1 + torch.rand(4)
            found = compiled(x[:, :2])
            if turn < 4:
                torch.testing.assert_close(found, model(x[:, :2]))
                for row in range(4):
                    with steer(other, plans[(row + turn) % 4], strength=float(handle.strength[row])):
                        other.announce(1)
                        torch.testing.assert_close(found[row : row + 1], other(x[row : row + 1, :2]))
            seen.append(found)
        assert len(graphs) == made
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_update_from_one_plan_to_many_and_back() -> None:
    model, x = Toy().eval(), torch.randn(2, STEPS, WIDTH)
    first, second = plan("block.2", value=1.0), plan("block.2", value=5.0)
    with torch.no_grad():
        plain = model.run(x)
        with steer(model, [first, second]) as handle:
            for given, amounts in (
                ([first, second], (1, 5)), (first, (1, 1)), ([second, first], (5, 1)), ([second, Plan()], (5, 0)),
            ):  # fmt: skip
                handle.update(given)
                found = model.run(x)
                for y, steered in zip(plain, found, strict=True):
                    torch.testing.assert_close(steered, y + torch.tensor(amounts)[:, None, None])
            with pytest.raises(InputError, match="plans"):
                handle.update([first, second, first])
            with pytest.raises(InputError, match="does not have"):
                handle.update([first + second, first])
            with pytest.raises(InputError, match="parameter sets"):
                handle.update([first, Plan.build([shift("block.2", 1.0, steps=(0, 1, 2))])])


def test_a_batch_of_another_size_is_refused_before_it_runs() -> None:
    model = Toy().eval()
    with (
        pytest.raises(InputError, match="plans"),
        steer(model, [plan("block.0"), plan("block.1")]),
    ):
        model.run(torch.randn(3, STEPS, WIDTH))
    with pytest.raises(InputError, match="plan"):
        steer(model, [plan("block.0"), "block.1"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="without entries"):
        steer(model, [])


@pytest.mark.parametrize("uncond_first", [False, True])
@pytest.mark.parametrize("rows", ["cond", "uncond"])
def test_roles_follow_the_order_of_the_batch(uncond_first: bool, rows: str) -> None:
    model, x = Toy().eval(), torch.randn(6, STEPS, WIDTH)
    halves = {"cond": slice(3, 6), "uncond": slice(0, 3)} if uncond_first else {
        "cond": slice(0, 3), "uncond": slice(3, 6)
    }  # fmt: skip

    def run() -> Tensor:
        for listener in list(model.listeners):
            listener("visual", 3, 3, None, uncond_first)
        model.clock.fill_(2)
        return model(x)

    with torch.no_grad():
        plain = run()
        strength = torch.tensor([1.0, 0.0, 2.0])
        with steer(model, plan("block.2", rows=rows), strength=strength):
            found = run()
        expected = plain.clone()
        expected[halves[rows]] += strength[:, None, None]
        torch.testing.assert_close(found, expected)
        with Recorder(model, ["block.2"], rows=rows) as recorder:
            run()
        assert torch.equal(recorder.get("block.2", 2), plain[halves[rows]])


@pytest.fixture
def masked() -> Callable[[Toy, Tensor, Tensor], tuple[Tensor, int]]:
    def run(model: Toy, x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        with steer(model, plan("block.2"), positions=mask) as handle:
            model.announce(len(x))
            model.clock.fill_(0)
            return model(x), handle.report()[0].tokens_touched

    return run


def test_a_mask_says_which_tokens_are_steered(masked: Callable[..., tuple[Tensor, int]]) -> None:
    model, x = Toy().eval(), torch.randn(3, 5, WIDTH)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        plain = model(x)
        found, touched = masked(model, x, mask)
        torch.testing.assert_close(found, plain + mask.unsqueeze(-1))
        assert torch.equal(found[~mask], plain[~mask])
        assert touched == 7
        other, _ = masked(model, x[:, :4], mask)  # of another length, so the mask is not about these tokens
        assert torch.equal(other, model(x[:, :4]))
    with pytest.raises(InputError, match="positions"):
        masked(model, x[:2], mask)
    with pytest.raises(InputError, match="positions"):
        masked(model, x, mask.float())
    with pytest.raises(InputError, match="positions"), Recorder(model, ["block.0"], positions=mask):
        pass


def test_an_update_cannot_change_the_order_at_a_site() -> None:
    double = SiteParameters(
        "block.2", "affine_shift", None, {"gain": torch.full((1, WIDTH), 2.0), "bias": torch.zeros(1, WIDTH)}
    )
    replace = random_parameters("block.2", "prototype_shift", 2, torch.Generator().manual_seed(0))
    model = Toy().eval()
    with torch.no_grad(), steer(model, Plan.build([double, replace])) as handle:
        model.run(torch.randn(1, STEPS, WIDTH))
        with pytest.raises(InputError, match="not in this order"):
            handle.update(Plan.build([replace, double]))
