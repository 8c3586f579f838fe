"""Under torch.compile(fullgraph=True) content changes cost no recompile and no graph break, and change the output."""

from typing import Any

import pytest
import torch
from steering_toy import LAYERS, STEPS, WIDTH, Toy, counter, plan, shift
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pysteer.steering import Plan, SiteParameters, steer

SETS, CLUSTERS = 2, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, STEPS, WIDTH)


def prototypes(site: str) -> SiteParameters:
    tensors = {
        "weight": torch.randn(SETS, CLUSTERS, WIDTH),
        "offset": torch.randn(SETS, CLUSTERS),
        "delta": torch.randn(SETS, CLUSTERS, WIDTH),
    }
    return SiteParameters(site, "prototype_shift", (1, 3), tensors, {"temperature": 0.5})


def affine(site: str) -> SiteParameters:
    tensors = {"gain": torch.randn(SETS, WIDTH), "bias": torch.randn(SETS, WIDTH)}
    return SiteParameters(site, "affine_shift", (1, 3), tensors)


def random_plan(alike: bool = False) -> Plan:
    """A mixture of ops; `alike` gives every block the same: blocks compiled one by one share their graphs."""
    sites = [affine("ffn.0"), prototypes("ffn.1"), affine("block.2"), prototypes("block.2")]
    if alike:
        sites = [prototypes(f"ffn.{i}") for i in range(LAYERS)]
    strengths = iter(torch.rand(16).add(0.1).tolist())
    schedule: dict[str, Any] = {
        entry.site: {step: (next(strengths), next(strengths)) for step in (1, 3)} for entry in sites
    }
    return Plan(sites, schedule)


def change(handle: Any, i: int, alike: bool) -> None:
    """One of: another schedule and other parameters, strength in its three forms, a gate."""
    if i % 5 == 0:
        handle.update(random_plan(alike))
    elif i % 5 == 1:
        handle.strength = 0.1 + i / 10
    elif i % 5 == 2:
        handle.strength = torch.rand(2)
    elif i % 5 == 3:
        handle.strength = torch.rand(STEPS, 2)
    else:
        handle.gate = torch.rand(2)


@pytest.mark.parametrize("way", ["model", "blocks"])
def test_fifty_changes(model: Toy, x: Tensor, way: str) -> None:
    backend, graphs = counter()
    run = model
    if way == "model":
        run = torch.compile(model, fullgraph=True, backend=backend)
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
    plain = model.run(x, 2, run)
    with torch.no_grad(), steer(model, random_plan(way == "blocks")) as handle:
        model.run(x, 2, run)
        made, last = len(graphs), model.run(x, 2, run)
        for i in range(50):
            with torch.compiler.set_stance("fail_on_recompile"):
                change(handle, i, way == "blocks")
                now = model.run(x, 2, run)
            for step in range(STEPS):
                assert torch.equal(now[step], last[step]) == (step in (0, 2)), "only steps 1 and 3 are steered"
            last = now
        assert len(graphs) == made
        for got, want in zip(last, model.run(x, 2) if way == "model" else last, strict=True):
            torch.testing.assert_close(got, want)
        handle.strength = 0.0
        zero = model.run(x, 2, run)
        assert {entry.steps for entry in handle.report()} == {(0, 1, 2, 3)}
        assert all(entry.calls == STEPS * (53 + (way == "model")) for entry in handle.report())
    assert all(torch.equal(a, b) for a, b in zip(zero, plain, strict=True))


def test_a_new_table_of_the_same_shapes_needs_no_graph(model: Toy, x: Tensor) -> None:
    run = torch.compile(model, fullgraph=True, backend="eager")
    plain = model.run(x, 0, run)
    with steer(model, plan("ffn.1", value=1.0)):
        model.run(x, 0, run)
        first = model.run(x, 0, run)
    with torch.compiler.set_stance("fail_on_recompile"):
        with steer(model, plan("ffn.1", value=2.0), capacity=4):
            second = model.run(x, 0, run)
        assert all(torch.equal(a, b) for a, b in zip(model.run(x, 0, run), plain, strict=True))
    for a, b, c in zip(plain, first, second, strict=True):
        assert not torch.allclose(a, b)
        assert not torch.allclose(b, c)


def test_compiled_counts_match_eager_ones(model: Toy, x: Tensor) -> None:
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    mixed = Plan.build([shift("ffn.0", steps=(1, 2))]) + plan("block.1", rows="uncond")
    reports = []
    for call in (None, run):
        with steer(model, mixed) as handle:
            model.run(x, 2, call)
            reports.append(handle.report())
    assert reports[0] == reports[1]
    assert [entry.tokens_touched for entry in reports[0]] == [2 * (2 + 3), 2 * (1 + 2 + 3 + 4)]


def test_growing_batches_recompile_a_bounded_number_of_times(model: Toy) -> None:
    backend, graphs = counter()
    run = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with steer(model, plan("block.2")):
        for rows in (2, 3, 4, 8, 5, 32, 7, 64, 33):
            x = torch.randn(rows, STEPS, WIDTH)
            for got, want in zip(model.run(x, 0, run), model.run(x), strict=True):
                torch.testing.assert_close(got, want)
    assert len(graphs) <= 6


def test_checkpoint_under_compile(model: Toy, x: Tensor) -> None:
    block = model.blocks[0]

    def compiled(value: Tensor) -> Tensor:
        return checkpoint(block, value, use_reentrant=False)

    gain = SiteParameters(
        "ffn.0", "affine_shift", None, {"gain": torch.full((1, WIDTH), 3.0), "bias": torch.ones(1, WIDTH)}
    )
    with steer(model, Plan.build([gain])) as handle:
        handle.rows("visual", 4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        block(a).square().sum().backward()
        torch.compile(compiled, fullgraph=True, backend="aot_eager")(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    c = x.clone().requires_grad_()
    block(c).square().sum().backward()
    assert not torch.allclose(a.grad, c.grad)


def test_clock_moved_before_backward_is_loud(model: Toy, x: Tensor) -> None:
    """Eager autograd keeps the clock for the backward pass; a changed clock must not give wrong gradients silently."""
    gain = SiteParameters(
        "ffn.0", "affine_shift", None, {"gain": torch.full((1, WIDTH), 3.0), "bias": torch.ones(1, WIDTH)}
    )
    with steer(model, Plan.build([gain])) as handle:
        handle.rows("visual", 4)
        y = x.clone().requires_grad_()
        loss = model(y).sum()
        model.clock.fill_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inductor(x: Tensor) -> None:
    model = Toy(blocks=1).eval()
    run = torch.compile(model, fullgraph=True)
    model.clock.fill_(1)
    with torch.no_grad(), steer(model, Plan.build([affine("ffn.0"), prototypes("block.0")])) as handle:
        handle.rows("visual", 4)
        steered = run(x)
        torch.testing.assert_close(steered, model(x))
        handle.strength = 0.0
        with torch.compiler.set_stance("fail_on_recompile"):
            zero = run(x)
        assert [(entry.calls, entry.tokens_touched) for entry in handle.report()] == [(3, 2 * 4 * STEPS)] * 2
        assert not torch.allclose(steered, zero)
    with torch.no_grad():
        assert torch.equal(run(x), zero)
