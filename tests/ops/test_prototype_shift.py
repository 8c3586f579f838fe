"""`prototype_shift` against its formula written out: ties, metrics, soft weights, errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, backends, get
from pysteer.ops.layouts import frame_of
from pysteer.ops.prototype_shift import precise_banks, prototype_shift
from pysteer.ops.quadratic_distance import quadratic_distance

CPU_IS_LIVE = backend_status()["cpu"].live


def table(rows: int, strength: float = 1.0) -> dict[str, Tensor]:
    """A table that steers all rows with set 1."""
    return {
        "slot": torch.ones(1, rows, dtype=torch.int32),
        "strength": torch.full((1, rows), strength),
        "clock": torch.tensor(0),
    }


def test_formula() -> None:
    spec = get("prototype_shift")
    for pull in (False, True):
        i = spec.make_inputs(Case(4, 5, 6, span=True, options={"pull": pull}))
        expected, step = i["x"].clone(), int(i["clock"])
        for row in range(4):
            which, s = int(i["slot"][step, row]), float(i["strength"][step, row])
            for token in range(*i["span"][row].tolist()):
                if which and s and token < 5:
                    x = i["x"][row, token]
                    scores = [float(w @ x + o) for w, o in zip(i["weight"][which], i["offset"][which], strict=True)]
                    delta = i["delta"][which, scores.index(max(scores))]
                    expected[row, token] += s * (delta - x if pull else delta)
        assert not torch.equal(expected, i["x"])
        torch.testing.assert_close(prototype_shift(**i), expected)


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("prototypes", [2, 3, 17, 20, 37, 64, 115, 256])
@pytest.mark.parametrize("width", [1, 3, 48, 65])
def test_the_lowest_index_wins_ties(name: str, prototypes: int, width: int) -> None:
    generator = torch.Generator().manual_seed(prototypes + width)
    # Small whole numbers: all scores are exact, in whatever order they are added up, and many are equal.
    x = torch.randint(-2, 3, (3, 29, width), generator=generator).float()
    weight = torch.randint(-2, 3, (2, prototypes, width), generator=generator).float()
    weight[:, prototypes // 2 :] = weight[:, : prototypes - prototypes // 2].clone()
    offset = torch.zeros(2, prototypes)
    delta = torch.arange(prototypes).float().view(1, -1, 1).expand(2, -1, width).contiguous()
    with backend(name):
        y = prototype_shift(x, weight, offset, delta, **table(3))
    scores = x.double() @ weight[1].double().T
    first = (scores == scores.amax(-1, keepdim=True)).float().argmax(-1)
    assert torch.equal((y - x)[..., 0].long(), first)


def test_euclid_and_mahalanobis() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 6, generator=generator)
    mu, delta = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 6, generator=generator)
    root = torch.randn(6, 6, generator=generator)
    precision = root @ root.T + 0.1 * torch.eye(6)
    for metric in (torch.eye(6), precision):
        weight = mu @ metric
        offset = -0.5 * (weight * mu).sum(-1)
        y = prototype_shift(x, weight, offset, delta, **table(2, 0.5))
        difference = x.unsqueeze(2) - mu[1]
        nearest = torch.einsum("rlkd,de,rlke->rlk", difference, metric, difference).argmin(-1)
        torch.testing.assert_close(y, x + 0.5 * delta[1][nearest])
        assert nearest.unique().numel() > 1


def test_precision_per_prototype() -> None:
    generator = torch.Generator().manual_seed(0)
    x, mu = torch.randn(2, 60, 12, generator=generator), torch.randn(2, 7, 12, generator=generator)
    factor = 0.25 * torch.randn(2, 7, 2, 12, generator=generator)
    scale, delta = torch.rand(2, 7, generator=generator) + 0.5, torch.randn(2, 7, 12, generator=generator)
    weight, offset = precise_banks(mu, factor, scale)
    squares = quadratic_distance(x, mu[1], factor[1], scale[1])
    given = {"factor": factor, "scale": scale, **table(2)}
    nearest = squares.argmin(-1)
    assert nearest.unique().numel() > 2
    assert not torch.equal(nearest, quadratic_distance(x, mu[1]).argmin(-1))
    torch.testing.assert_close(prototype_shift(x, weight, offset, delta, **given), x + delta[1][nearest])
    soft = prototype_shift(x, weight, offset, delta, temperature=0.5, **given)
    torch.testing.assert_close(soft, x + torch.softmax(-squares, -1) @ delta[1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
def test_a_row_does_not_depend_on_the_others() -> None:
    i = get("prototype_shift").make_inputs(Case(4, 40, 70, strength="one", sizes={"prototypes": 50}))
    together = prototype_shift(**i)
    for row in range(4):
        alone = {**i, "x": i["x"][row : row + 1]}
        alone["slot"], alone["strength"] = i["slot"][:, row:], i["strength"][:, row:]
        assert torch.equal(prototype_shift(**alone)[0], together[row])


@pytest.mark.skipif(not (backend_status()["triton"].live and backends.interpreted()), reason="no Triton interpreter")
def test_bf16_activations_meet_all_bits_of_the_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 9, (2, 40, 32), generator=generator).bfloat16()
    # Alike but for the bits that a sum of two bf16 numbers does not hold.
    weight = 1 + 2**-8 + torch.rand(2, 16, 32, generator=generator) * 2**-17
    delta = torch.arange(16.0).view(1, -1, 1).expand(2, -1, 32).contiguous()
    out, source, target = torch.empty(2, 40, 32), frame_of(x, -1), frame_of(torch.empty(2, 40, 32), -1)
    rest = (torch.ones(1, 2, dtype=torch.int32), torch.ones(1, 2), torch.tensor(0), None, None, None)
    launch = backends.load_kernels("prototype_shift").launch
    launch(out, x, weight, torch.zeros(2, 16), delta, *rest, False, 0.0, "none", source, target)
    scores = x.double() @ weight[1].double().T
    best = scores.gather(-1, (out - x.float())[..., :1].long()).squeeze(-1)
    assert (scores.amax(-1) - best <= 4e-7 * scores.amax(-1)).all()
    assert (scores.amax(-1) - scores.amin(-1) > 8e-7 * scores.amax(-1)).any()


def test_soft_goes_from_hard_to_mean() -> None:
    i = get("prototype_shift").make_inputs(Case(3, 8, 6, strength="one"))
    hard = prototype_shift(**i)
    torch.testing.assert_close(prototype_shift(**i, temperature=1e-4), hard)
    i["offset"].zero_()
    which = i["slot"][int(i["clock"]), :3]
    mean = i["x"] + i["delta"][which].mean(1, keepdim=True)
    torch.testing.assert_close(prototype_shift(**i, temperature=1e6), mean, rtol=1e-4, atol=1e-4)


def test_normalised_shifts() -> None:
    i = get("prototype_shift").make_inputs(Case(3, 8, 6, strength="one"))
    for pull in (False, True):
        u = prototype_shift(**i, pull=pull) - i["x"]
        unit = prototype_shift(**i, pull=pull, normalize="unit") - i["x"]
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3, 8))
        torch.testing.assert_close(unit * u.norm(dim=-1, keepdim=True), u, rtol=1e-4, atol=1e-5)
        scaled = prototype_shift(**i, pull=pull, normalize="input") - i["x"]
        torch.testing.assert_close(scaled.norm(dim=-1), i["x"].norm(dim=-1))


def test_unused_prototypes_are_never_chosen() -> None:
    i = get("prototype_shift").make_inputs(Case(3, 50, 6, strength="one"))
    i["offset"][:, 3:] = -torch.inf
    few = {name: i[name][:, :3].contiguous() for name in ("weight", "offset", "delta")}
    for options in ({}, {"temperature": 1.0}):
        torch.testing.assert_close(prototype_shift(**i, **options), prototype_shift(**{**i, **few}, **options))


def test_more_prototypes_than_the_kernels_take() -> None:
    spec = get("prototype_shift")
    i = spec.make_inputs(Case(2, 5, 6, strength="one", sizes={"prototypes": 300}))
    assert spec.implementation(**i) == "reference"
    torch.testing.assert_close(prototype_shift(**i), spec.reference(**i))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"normalize": "length"}, "normalize: got 'length'; allowed: none, unit, input"),
        ({"offset": torch.zeros(4, 7)}, r"offset: got 'float32 \[4, 7\]"),
        ({"weight": torch.zeros(4, 6)}, "weight: got"),
        ({"delta": torch.zeros(4, 8, 5)}, "delta: got"),
        ({"factor": torch.zeros(4, 8, 2, 6)}, "scale: got 'nothing'; allowed: factor and scale together"),
        ({"factor": torch.zeros(4, 8, 6), "scale": torch.ones(4, 8)}, "factor: got"),
        ({"factor": torch.zeros(4, 8, 2, 6), "scale": torch.ones(4)}, "scale: got"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("prototype_shift").make_inputs(Case(3, 8, 6))
    with pytest.raises(InputError, match=message):
        prototype_shift(**{**i, **change})


def test_autocast_does_not_lower_the_precision() -> None:
    i = get("prototype_shift").make_inputs(Case(3, 40, 64, strength="one", options={"temperature": 0.5}))
    plain = prototype_shift(**i)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototype_shift(**i), plain)


@pytest.mark.skipif(not CPU_IS_LIVE, reason="the compiled extension is not built")
@pytest.mark.parametrize("grad", [False, True])
def test_the_kernel_stays_in_a_compiled_graph(grad: bool) -> None:
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    i = get("prototype_shift").make_inputs(Case(3, 20, 16))
    x = i.pop("x").requires_grad_(grad)
    torch._dynamo.reset()
    backends._choices.clear()  # as in a process that compiles before it has run anything
    y = torch.compile(lambda x: prototype_shift(x, **i) + 0.0, backend=record, fullgraph=True)(x)
    assert f"pysteer.prototype_shift{'_ad' * grad}.default" in seen
    torch.testing.assert_close(y, prototype_shift(x, **i))
    transformed = torch.compile(torch.func.grad(lambda x: prototype_shift(x, **i).square().sum()), backend=record)
    expected = torch.func.grad(lambda x: prototype_shift(x, **i).square().sum())(x.detach())
    torch.testing.assert_close(transformed(x.detach()), expected)
