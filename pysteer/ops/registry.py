"""What is known about every op, found by looking at the files of this folder.

A file `pysteer/ops/<op>.py` takes part by defining `SPEC`, an `OpSpec` or a `SteeringSpec`. Tests and benchmarks take
their parameters from here.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError

LAYOUTS = ("tokens", "rows", "channels_first", "channels_last")
STRENGTHS = ("zero", "one", "mixed")


@dataclass(frozen=True)
class Case:
    """One input for an op.

    Attributes:
        rows, tokens, width: R, L and D. Layout "rows" has no token dimension and takes L = 1.
        dtype: of the activation.
        layout: one of `LAYOUTS`.
        strength: "zero" (nothing may change), "one", or "mixed" (rows differ in strength and slot, some are off).
        span: whether only a part of the tokens is touched.
        device: where the tensors live.
        options: options of the op, for instance `{"pull": True}`.
        sizes: further sizes that the op knows, for instance `{"prototypes": 64}`.
        seed: of the random values.
    """

    rows: int
    tokens: int
    width: int
    dtype: torch.dtype = torch.float32
    layout: str = "tokens"
    strength: str = "mixed"
    span: bool = False
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class OpSpec:
    """One op as the tests and benchmarks see it.

    Attributes:
        name: of the op, its files and its functions.
        function: the public function; its first argument is the activation (or the first of its inputs), options
            are keywords. Returns a tensor or a tuple of tensors, all fresh.
        reference: the same in plain torch; defines the result. Computes in fp64 where the `wide` inputs are fp64.
        make_inputs: builds the keyword arguments of `function` for a case.
        implementation: name of the backend that `function` would use for these keyword arguments now.
        backends: for every backend what it serves, in words; the rest falls to the reference.
        variants: sets of options to test, each with a short name.
        sizes: further sizes to test, for instance numbers of prototypes.
        gradients: inputs that the op differentiates itself (all others go through the reference); none: the op has
            no gradient, and says so where one is asked for.
        defaults: values of the arguments of the registered operator that `make_inputs` leaves out.
        wide: inputs that are given in fp64 to compute the truth.
        layouts: those of `LAYOUTS` that the op takes.
        rowwise: further inputs with one entry per row of the first of `wide`, which get shorter together with it.
        compare: asserts that `result` is right, from `(result, truth, inputs, limit)` with `truth` in fp64 and `limit`
            a row of the table of tolerances; left out, every element of every tensor is held against `limit`.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Case], dict[str, Any]]
    implementation: Callable[..., str]
    backends: Mapping[str, str]
    variants: Mapping[str, Mapping[str, Any]]
    sizes: tuple[Mapping[str, int], ...] = ({},)
    gradients: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    wide: tuple[str, ...] = ("x",)
    layouts: tuple[str, ...] = LAYOUTS
    rowwise: tuple[str, ...] = ()
    compare: Callable[[Any, Any, dict[str, Any], Any], None] | None = None


def _never(x: Tensor, **_: Any) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=x.device)


@dataclass(frozen=True)
class SteeringSpec(OpSpec):
    """An op that changes an activation as the steering table says: its result is like `x`.

    `function(x, *banks, slot, strength, clock, span=None, *, ..., out=None)`; rows and tokens that the table leaves
    alone come back bit for bit.

    Attributes:
        unsure: from the keyword arguments, a mask that broadcasts against `x`: where rounding decides between two
            choices, so that two right implementations may differ.
        shared: tensor arguments without parameter sets, which all rows have in common.
    """

    gradients: tuple[str, ...] = ("x",)
    unsure: Callable[..., Tensor] = _never
    shared: tuple[str, ...] = ()


@cache
def steering_specs() -> dict[str, SteeringSpec]:
    """Return the specs of the ops that steer, by name."""
    return {name: spec for name, spec in specs().items() if isinstance(spec, SteeringSpec)}


@cache
def specs() -> dict[str, OpSpec]:
    """Return the spec of every op in this folder, by name; those that steer are `SteeringSpec`s."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        spec = getattr(import_module(f"pysteer.ops.{module.name}"), "SPEC", None)
        if isinstance(spec, OpSpec):
            found[spec.name] = spec
    return found


def get(name: str) -> OpSpec:
    """Return the spec of one op.

    Raises:
        InputError: no op has this name.
    """
    try:
        return specs()[name]
    except KeyError:
        raise InputError("unknown op", value=name, allowed=", ".join(specs())) from None


def activation(case: Case) -> tuple[Tensor, int]:
    """Return a random activation for a case, as the layout wants it, and its channel dimension."""
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.rows, case.tokens, case.width, generator=generator)
    x = x.to(device=case.device, dtype=case.dtype)
    if case.layout == "rows":
        return x[:, 0].contiguous(), -1
    if case.layout == "channels_first":
        return x.transpose(1, 2).contiguous(), 1
    if case.layout == "channels_last":
        return x.transpose(1, 2).unsqueeze(2), 1  # [R, D, 1, L] with channels closest together in memory
    return x, -1


def tables(case: Case, sets: int, steps: int = 3) -> dict[str, Tensor | None]:
    """Return random slot, strength, clock and span for a case, with spare rows and steps.

    Rows of the "mixed" strength go through: on, on with another set, slot 0, strength 0, negative strength.
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    capacity = case.rows + 2
    slot = torch.randint(1, sets, (steps, capacity), generator=generator, dtype=torch.int32)
    strength = torch.rand(steps, capacity, generator=generator) + 0.5
    now = steps - 2
    if case.strength == "zero":
        strength[now] = 0.0
    elif case.strength == "one":
        strength[now] = 1.0
    else:
        rows = torch.arange(capacity) % 5
        slot[now, rows == 2] = 0
        strength[now, rows == 3] = 0.0
        strength[now, rows == 4] = -0.75
    span = None
    if case.span:
        start = torch.arange(capacity, dtype=torch.int32) % max(case.tokens // 2, 1)
        span = torch.stack([start, start + (case.tokens + 1) // 2], 1).to(torch.int32)
    found = {"slot": slot, "strength": strength, "clock": torch.tensor(now), "span": span}
    return {name: None if tensor is None else tensor.to(case.device) for name, tensor in found.items()}
