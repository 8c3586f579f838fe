"""Plans, sites and families: what is refused, with one line that names the value, what was allowed and the fix."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from steering_toy import WIDTH, FeedForward, Toy, ToyFamily, plan, shift

from pysteer.errors import InputError
from pysteer.families import find_family
from pysteer.steering import Plan, Site, SiteParameters, steer
from pysteer.steering.site import brief


def changed(name: str, value: Any) -> SiteParameters:
    entry = shift("ffn.1", steps=(0, 1))
    entry.tensors[name] = value
    return entry


def poisoned(value: float) -> SiteParameters:
    entry = shift("ffn.1", steps=(0, 1))
    entry.tensors["bias"][1, 3] = value
    return entry


WIDE = dict.fromkeys(("gain", "bias"), torch.ones(1, 9))
BAD = {
    "unknown site": (
        lambda: plan("fnn.1"),
        r"unknown site: got 'fnn\.1'; allowed: ffn\.0\.\.2, .*did you mean ffn\.1\?",
    ),
    "wrong width": (
        lambda: Plan.build([SiteParameters("ffn.1", "affine_shift", None, WIDE)]),
        r"ffn\.1 \(width 8\) do not fit: .*9.*8",
    ),
    "step too late": (
        lambda: Plan.build([shift("ffn.1", steps=(0, 4))]),
        r"step of site ffn\.1: got 4; allowed: 0\.\.3",
    ),
    "step of the other part": (
        lambda: Plan.build([shift("pool", steps=(1,))]),
        r"step of site pool: got 1; allowed: 0\.\.0",
    ),
    "step not a number": (lambda: Plan([shift("ffn.1")], {"ffn.1": {"a": (1, 1)}}), r"step of site ffn\.1: got 'a'"),
    "step twice": (lambda: Plan.build([shift("ffn.1", steps=(1, 1))]), r"steps: got \(1, 1\)"),
    "NaN": (lambda: Plan.build([poisoned(torch.nan)]), r"ffn\.1 for affine_shift, bias: got 'NaN or infinity'"),
    "Inf": (lambda: Plan.build([poisoned(torch.inf)]), r"bias: got 'NaN or infinity'"),
    "minus Inf": (lambda: Plan.build([poisoned(-torch.inf)]), r"bias: got 'NaN or infinity'"),
    "integers": (lambda: Plan.build([changed("gain", torch.ones(2, WIDTH, dtype=torch.int64))]), r"gain: got 'int64"),
    "too few sets": (
        lambda: Plan.build([changed("gain", torch.ones(1, WIDTH))]),
        r"gain: .*\[1, 8\].*allowed: .*\[2, ",
    ),
    "missing tensor": (
        lambda: Plan.build([SiteParameters("ffn.1", "affine_shift", None, {"gain": torch.ones(1, WIDTH)})]),
        r"tensors: got 'gain'; allowed: gain, bias",
    ),
    "unknown op": (lambda: Plan.build([SiteParameters("ffn.1", "afine", None, {})]), "unknown op: got 'afine'"),
    "unknown option": (
        lambda: Plan.build([SiteParameters("ffn.1", "affine_shift", None, shift("ffn.1").tensors, {"pul": True})]),
        r"option: got 'pul'",
    ),
    "no parameters for a step": (
        lambda: Plan([shift("ffn.1", steps=(0, 1))], {"ffn.1": {2: (1.0, 0.0)}}),
        r"ffn\.1: no parameters for step: got 2; allowed: 0, 1",
    ),
    "strength NaN": (lambda: Plan([shift("ffn.1")], {"ffn.1": {2: (torch.nan, 0.0)}}), r"strengths of site ffn\.1"),
    "no entries": (lambda: Plan(), "plan without entries"),
    "schedule without parameters": (
        lambda: Plan([shift("ffn.1")], {"ffn.2": {0: (1, 1)}}),
        r"site without parameters: got 'ffn\.2'; allowed: ffn\.1",
    ),
    "rows": (lambda: plan("ffn.1", rows="conds"), "rows: got 'conds'; .*did you mean cond"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_plans_attach_nothing(model: Toy, what: str) -> None:
    make, error = BAD[what]
    with pytest.raises(InputError, match=error) as caught, steer(model, make()):
        pass
    assert "\n" not in str(caught.value)
    assert model.listeners == []
    assert all(type(block.ffn) is FeedForward for block in model.blocks)


def test_minus_infinity_marks_unused_prototypes(model: Toy) -> None:
    tensors = {
        "weight": torch.zeros(1, 2, WIDTH),
        "offset": torch.tensor([[0.0, -torch.inf]]),
        "delta": torch.ones(1, 2, WIDTH),
    }
    good = SiteParameters("block.2", "prototype_shift", None, tensors)
    x = torch.randn(2, 4, WIDTH)
    plain = model.run(x)
    with steer(model, Plan.build([good])):
        for found, expected in zip(model.run(x), plain, strict=True):
            torch.testing.assert_close(found, expected + 1)
    bad = SiteParameters("block.2", "prototype_shift", None, {**tensors, "delta": tensors["delta"] * -torch.inf})
    with pytest.raises(InputError, match="delta: got 'NaN or infinity'"), steer(model, Plan.build([bad])):
        pass


def test_update_takes_other_parameters_and_schedules(model: Toy) -> None:
    x = torch.randn(2, 4, WIDTH)
    plain = model.run(x)
    with steer(model, plan("block.2", "ffn.0", value=0.0)) as handle:
        for found, expected in zip(model.run(x), plain, strict=True):
            torch.testing.assert_close(found, expected)
        handle.update(Plan([shift("block.2", 2.0)], {"block.2": {1: (1.0, 0.0), 2: (0.5, 0.0)}}))
        for found, expected, amount in zip(model.run(x), plain, (0, 2, 1, 0), strict=True):
            torch.testing.assert_close(found, expected + amount)
        now = model.run(x)
        for make, error in (
            (plan("block.1"), r"got 'affine_shift at block\.1'.*superset"),
            (Plan.build([shift("block.2", steps=(0, 1))]), "parameter sets: got 2; allowed: at most 1"),
            (plan("block.2", "block.2"), "does not have"),
            (plan("block.9"), "unknown site"),
        ):
            with pytest.raises(InputError, match=error):
                handle.update(make)
        assert all(torch.equal(a, b) for a, b in zip(model.run(x), now, strict=True))


def test_plan_properties() -> None:
    merged = plan("ffn.0") + plan("pool", rows="cond")
    assert [entry.site for entry in merged.parameters] == ["ffn.0", "pool"]
    assert merged.schedule == {"ffn.0": {None: (1.0, 1.0)}, "pool": {None: (1.0, 0.0)}}
    assert Plan.build([shift("ffn.0", steps=(1, 3))], strength=2.0).schedule == {
        "ffn.0": {1: (2.0, 0.0), 3: (2.0, 0.0)}
    }


def test_site_names_in_short() -> None:
    assert brief(["ffn.0", "ffn.1", "ffn.2", "ca.0", "pooled", "x.1", "x.3"]) == "ffn.0..2, ca.0, pooled, x.1, x.3"
    with pytest.raises(InputError, match="layout of site a: got 'token'"):
        Site("a", "a", layout="token")


def test_find_family(model: Toy) -> None:
    assert isinstance(find_family(model), ToyFamily)
    with pytest.raises(InputError, match=r"no family knows this model: got 'Linear'; allowed: .*toy"):
        find_family(torch.nn.Linear(1, 1))


def test_importing_steering_and_looking_for_families_imports_no_model_library() -> None:
    code = (
        "import sys, pysteer.steering, pysteer.families\n"
        "try: pysteer.families.find_family(object())\n"
        "except ValueError: pass\n"
        "print([name for name in ('transformers', 'diffusers', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
