"""The compiled generator under steering: one set of graphs, whatever strength, schedule, gate and parameters do."""

import itertools

import pytest
import torch
import torch._dynamo
from tiny_infinity import DEPTH, SCALES, WIDTH, tiny_pipeline
from torch._dynamo.utils import counters

import pysteer
from pysteer.steering import Plan, SiteParameters

PROMPTS = ["a red circle", "a large green star on a blue background", "a cross"]
STEPS = tuple(range(len(SCALES)))


def shifts(seed: int) -> list[SiteParameters]:
    """An affine map at every ffn and pooled text, prototypes at every ca and at the last scales of every block."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def prototypes(site: str, steps: tuple[int, ...]) -> SiteParameters:
        n = len(steps)
        banks = {"weight": normal(n, 5, WIDTH), "offset": normal(n, 5), "delta": normal(n, 5, WIDTH)}
        return SiteParameters(site, "prototype_shift", steps, banks)

    plan = []
    for i in range(DEPTH):
        banks = {"gain": 1 + 0.2 * normal(len(STEPS), WIDTH), "bias": normal(len(STEPS), WIDTH)}
        plan.append(SiteParameters(f"ffn.{i}", "affine_shift", STEPS, banks))
        plan += [prototypes(f"ca.{i}", STEPS), prototypes(f"ca_block.{i}", STEPS[-2:])]
    plan.append(
        SiteParameters("pooled", "affine_shift", None, {"gain": torch.ones(1, WIDTH), "bias": normal(1, WIDTH)})
    )
    return plan


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    counters.clear()
    yield tiny_pipeline().compile(backend="eager")
    torch._dynamo.reset()


def generate(pipe) -> torch.Tensor:
    """The logits of all scales: bits would hide a small change."""
    seen: list[torch.Tensor] = []
    pipe(PROMPTS, seeds=3, decode=False, on_scale=lambda i, logits: seen.append(logits))
    return torch.cat([logits.flatten(1) for logits in seen], 1)


def test_fifty_changes_need_no_new_graph_and_all_show(compiled):
    with pysteer.steer(compiled, Plan.build(shifts(0), rows="both", strength=0.2)) as handle:
        seen = [generate(compiled)]
        graphs = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("fail_on_recompile"):
            for change in range(1, 51):
                kind = change % 4
                if kind == 0:
                    handle.strength = 0.1 + 0.02 * change
                elif kind == 1:
                    handle.strength = torch.rand(len(STEPS), 3) if change % 8 == 1 else torch.rand(3)
                elif kind == 2:
                    handle.update(Plan.build(shifts(change), rows=("cond", "uncond", "both")[change % 3]))
                else:
                    handle.gate = torch.rand(3)
                seen.append(generate(compiled))
    assert counters["stats"]["unique_graphs"] == graphs <= 4
    assert not counters["graph_break"]
    for earlier, later in itertools.pairwise(seen):
        assert not torch.allclose(earlier, later)


def test_compiled_steering_equals_eager_steering(compiled):
    plan = Plan.build(shifts(0), strength=0.2)
    unsteered = generate(compiled)
    with pysteer.steer(compiled, plan):
        fast = generate(compiled)
    plain = tiny_pipeline()
    with pysteer.steer(plain, plan):
        slow = generate(plain)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fast, unsteered)
    assert torch.equal(generate(compiled), unsteered)


def test_zero_strength_is_bit_identical_when_compiled(compiled):
    with pysteer.steer(compiled, Plan.build(shifts(0)), strength=0.0) as handle:
        off = generate(compiled)
        handle.strength = 1.0
        on = generate(compiled)
        handle.strength = 0.0
        again = generate(compiled)
    assert torch.equal(off, generate(compiled))
    assert torch.equal(off, again)
    assert not torch.equal(off, on)


@pytest.mark.slow
def test_inductor_compiles_all_scales():
    torch._dynamo.reset()
    counters.clear()
    pipe = tiny_pipeline()
    plan = Plan.build(shifts(0), rows="both", strength=0.2)
    with pysteer.steer(pipe, plan):
        eager = generate(pipe)
        pipe.compile()
        result = generate(pipe)
    assert counters["stats"]["unique_graphs"] <= 4
    torch.testing.assert_close(result, eager, rtol=1e-3, atol=1e-3)
    with torch.compiler.set_stance("force_eager"):
        assert not torch.allclose(generate(pipe), eager)
    torch._dynamo.reset()
