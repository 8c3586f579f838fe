"""`sae_edit` against encoding, selecting and decoding: modes, gates, ties, free places, gradients, errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS, bits
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, backend_status, get
from pysteer.ops.sae_edit import GATES, sae_edit, scale_and_add

ALL = [*CPU_VARIANTS, *(["triton"] if backend_status()["triton"].live and not torch.cuda.is_available() else [])]
each_backend = pytest.mark.parametrize("name", ALL)
LAYOUTS = ("tokens", "channels_first")


def inputs(gate: str, layout: str = "tokens", rows: int = 3, tokens: int = 9, **more: Any) -> dict[str, Any]:
    options = {"gate": gate}
    case = Case(rows, tokens, 24, layout=layout, strength="one", options=options, **more)
    return get("sae_edit").make_inputs(case)


def table(rows: int) -> dict[str, Tensor]:
    """A table that steers all rows with set 1."""
    return {
        "slot": torch.ones(1, rows, dtype=torch.int32),
        "strength": torch.ones(1, rows),
        "clock": torch.tensor(0),
    }


@each_backend
@pytest.mark.parametrize("mode", ["multiply", "add", "set", "ablate"])
def test_is_the_difference_of_two_decodings(name: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, k, chosen = 60, 7, [3, 11, 40]
    weight, bias = torch.randn(latents, 24, generator=generator), torch.randn(latents, generator=generator)
    decoder, centre = torch.randn(latents, 24, generator=generator), torch.randn(24, generator=generator)
    x = torch.randn(4, 20, 24, generator=generator)
    value = torch.tensor([-2.0, 0.5, 3.0])

    active = torch.relu((x - centre) @ weight.T + bias)
    best = active.topk(k).indices
    code = torch.zeros_like(active).scatter(-1, best, active.gather(-1, best))
    edited = code.clone()
    here = code[..., chosen]
    new = {"multiply": here * value, "add": here + value, "set": value.expand_as(here), "ablate": here * 0}[mode]
    edited[..., chosen] = torch.where(here > 0, new, here)
    expected = x + (edited - code) @ decoder

    def two(bank: Tensor) -> Tensor:
        return torch.stack([torch.full_like(bank, torch.nan), bank])

    scale, add = scale_and_add(mode, value)
    folded = bias - weight @ centre
    banks = {
        "encoder": two(weight[chosen]),
        "encoder_bias": two(folded[chosen]),
        "decoder": two(decoder[chosen]),
        "scale": two(scale),
        "add": two(add),
        "latent": torch.tensor([[0, 0, 0], chosen], dtype=torch.int32),
    }
    with backend(name):
        y = sae_edit(x, **banks, **table(4), gate="topk", k=k, full_encoder=weight, full_bias=folded)
    assert 0 < (y != x).any(-1).float().mean() < 1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_gates(name: str, layout: str, gate: str) -> None:
    i = inputs(gate, layout, sizes={"bias": 0, "edits": 3})
    x = i["x"].movedim(i["channel_dim"], -1)
    expected = x.clone()
    for row in range(3):
        which, s = int(i["slot"][1, row]), float(i["strength"][1, row])
        for token in range(9):
            for e in range(3):
                p = float(x[row, token] @ i["encoder"][which, e] + i["encoder_bias"][which, e])
                a = p if gate == "none" else max(p, 0.0)
                is_open = gate == "none" or p > 0
                if gate in ("threshold", "topk"):
                    is_open = is_open and a > float(i["level"][which, e])
                if gate == "topk":
                    every = x[row, token] @ i["full_encoder"].T + i["full_bias"]
                    is_open = is_open and int(i["latent"][which, e]) in every.topk(i["k"]).indices
                if is_open:
                    change = (i["scale"][which, e] - 1) * a + i["add"][which, e]
                    expected[row, token] += s * change * i["decoder"][which, e]
    with backend(name):
        y = sae_edit(**i).movedim(i["channel_dim"], -1)
    assert not torch.equal(expected, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    same = (expected == x).all(-1)
    assert same.any() or gate == "none"
    assert torch.equal(y[same], x[same])


@each_backend
@pytest.mark.parametrize("width", [3, 24, 130])
def test_the_lowest_index_wins_ties(name: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    # Small whole numbers: scores are exact, and many are equal.
    x = torch.randint(-2, 3, (2, 100, width), generator=generator).float()
    full = torch.randint(-2, 3, (50, width), generator=generator).float()
    full[25:] = full[:25].clone()
    latent = torch.tensor([[0, 0], [4, 29]], dtype=torch.int32)
    banks = {
        "encoder": full[latent.long()],
        "encoder_bias": torch.full((2, 2), 0.5),
        "decoder": torch.zeros(2, 2, width),
        "scale": torch.ones(2, 2),
        "add": torch.ones(2, 2),
    }
    banks["decoder"][:, 0, 0], banks["decoder"][:, 1, 1] = 1.0, 1.0
    extra = {"full_encoder": full, "full_bias": torch.full((50,), 0.5), "latent": latent, "k": 9}
    with backend(name):
        moved = (sae_edit(x, **banks, **table(2), gate="topk", **extra) - x)[..., :2] != 0
    scores = (x @ full.T + 0.5).double() - torch.arange(50) * 1e-6
    among = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(9).indices, True) & (scores > 0)
    assert torch.equal(moved, among[..., [4, 29]])
    assert among[..., [4, 29]].any(0).any(0).all()
    assert (among[..., 4] & ~among[..., 29]).any()


@each_backend
@pytest.mark.parametrize("massive", [0, 4099, 400003])
def test_ranks_are_exact_where_bounds_are_wide(name: str, massive: int) -> None:
    """A massive channel takes the others' place in what is rounded off: the more of it, the fewer ranks are certain."""
    generator = torch.Generator().manual_seed(massive)
    latents, k, width = 2000, 300, 24
    x = torch.randint(-3, 4, (2, 90, width), generator=generator).float()
    full = torch.randint(-3, 4, (latents, width), generator=generator).float()
    x[..., 0] = massive
    full[:, 0] = 1.0
    x[0, 5, 3], x[0, 6, 3], x[1, 7, 3] = torch.inf, -torch.inf, torch.nan
    latent = torch.tensor([[0, 0], [700, 1900]], dtype=torch.int32)
    bias = torch.randint(-2, 3, (latents,), generator=generator) + 1.0
    bias[latent[1].long()] += 20
    banks = {
        "encoder": full[latent.long()],
        "encoder_bias": bias[latent.long()],
        "decoder": torch.zeros(2, 2, width),
        "scale": torch.ones(2, 2),
        "add": torch.ones(2, 2),
    }
    banks["decoder"][:, 0, 1], banks["decoder"][:, 1, 2] = 1.0, 1.0
    extra = {"full_encoder": full, "full_bias": bias, "latent": latent, "k": k}
    with backend(name):
        y = sae_edit(x, **banks, **table(2), gate="topk", **extra)
    every = (x.double().unsqueeze(2) * full.double()).sum(-1) + bias.double()
    own = every[..., [700, 1900]].unsqueeze(-2)
    earlier = torch.arange(latents).unsqueeze(1) < torch.tensor([700, 1900])
    before = (every.unsqueeze(-1) > own) | ((every.unsqueeze(-1) == own) & earlier)
    is_open = (before.sum(-2) < k) & (own.squeeze(-2) > 0)
    moved, finite = (y != x)[..., 1:3], x.isfinite().all(-1)
    assert torch.equal(moved[finite], is_open[finite])
    assert is_open[finite].any(0).all()
    assert not is_open[finite].all(0).any()
    assert torch.equal((y[~finite] != x[~finite])[:, 1:3].any(-1), is_open[~finite].any(-1))


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_k_among_many(name: str, dtype: torch.dtype, layout: str) -> None:
    i = inputs("topk", layout, rows=2, tokens=150, dtype=dtype, sizes={"latents": 3001, "k": 20, "bias": 1, "edits": 3})
    with backend(name):
        y = sae_edit(**i)
    tokens = i["x"].movedim(i["channel_dim"], -1).double()
    every = tokens @ i["full_encoder"].double().T + i["full_bias"].double()
    kth = every.topk(20).values[..., -1:]
    which = i["slot"][1, :2].long()
    own = every.gather(-1, i["latent"][which].long().unsqueeze(1).expand(-1, 150, -1))
    level, change = i["level"][which].unsqueeze(1), (i["scale"][which] - 1).abs() + i["add"][which].abs()
    is_open = (own >= kth) & (own > level) & (change != 0).unsqueeze(1)
    sure = ((own - kth).abs() > 1e-4).all(-1) & ((own - level).abs() > 1e-4).all(-1)
    moved = (y != i["x"]).movedim(i["channel_dim"], -1).any(-1)
    assert torch.equal(moved[sure], is_open.any(-1)[sure])
    assert 0.02 < moved.float().mean() < 0.5
    assert sure.float().mean() > 0.9


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_free_places_change_no_bit(name: str, layout: str, gate: str) -> None:
    i = inputs(gate, layout, tokens=40)
    i["x"].view(-1)[::3] = -0.0
    with backend(name):
        assert not torch.equal(sae_edit(**i), i["x"])
        free = {**i, "scale": torch.ones_like(i["scale"]), "add": torch.zeros_like(i["add"])}
        assert torch.equal(bits(sae_edit(**free)), bits(i["x"]))
        if gate in ("threshold", "topk"):
            closed = {**i, "level": torch.full_like(i["level"], torch.inf)}
            assert torch.equal(bits(sae_edit(**closed)), bits(i["x"]))


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edits", [1, 2, 5])
def test_gradients(name: str, layout: str, gate: str, edits: int) -> None:
    i = inputs(gate, layout, sizes={"edits": edits, "bias": 0})
    i["strength"][:, 1] = 0.0
    x = i.pop("x")
    weights = torch.randn(x.shape)
    found = []
    for chosen in (name, "reference"):
        leaf = x.clone().requires_grad_()
        with backend(chosen):
            found.append(torch.autograd.grad((sae_edit(leaf, **i) * weights).sum(), leaf)[0])
    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad((get("sae_edit").reference(leaf, **i) * weights).sum(), leaf)[0]
    for each in found:
        torch.testing.assert_close(each, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][1], weights[1])
    assert not torch.equal(found[0], weights)


def test_second_derivative() -> None:
    for gate in GATES:
        i = inputs(gate, tokens=2)
        x = i.pop("x").double().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, i=i: sae_edit(x, **i).square(), (x,))


def test_edits_that_do_nothing_yet_can_be_learned() -> None:
    i = inputs("relu")
    i["scale"], i["add"] = torch.ones_like(i["scale"]), torch.zeros_like(i["add"])
    for name in ("scale", "add"):
        leaf = i[name].clone().requires_grad_()
        sae_edit(**{**i, name: leaf}).square().sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad != 0).any()


@pytest.mark.parametrize("name", [each for each in ALL if each != "reference"])
def test_the_ranking_stores_no_scores_of_all_latents(name: str) -> None:
    i = inputs("topk", rows=1, tokens=16, sizes={"latents": 200, "k": 5})
    spec = get("sae_edit")
    with backend(name):
        assert spec.implementation(**i) == name
        largest = 0
        empty = torch.empty

        def watched(*shape: Any, **options: Any) -> Tensor:
            nonlocal largest
            made = empty(*shape, **options)
            largest = max(largest, made.numel())
            return made

        torch.empty = watched
        try:
            sae_edit(**i)
        finally:
            torch.empty = empty
    assert largest <= 16 * 24


@pytest.mark.parametrize(
    ("gate", "change", "message"),
    [
        ("relu", {"gate": "gelu"}, "gate: got 'gelu'; allowed: none, relu, threshold, topk"),
        ("relu", {"encoder": torch.zeros(4, 24)}, "encoder: got"),
        ("relu", {"encoder": torch.zeros(4, 0, 24)}, "encoder: got"),
        ("relu", {"decoder": torch.zeros(4, 3, 24)}, "decoder: got"),
        ("relu", {"scale": torch.zeros(4, 2).double()}, "scale: got"),
        ("relu", {"add": torch.zeros(3, 2)}, "parameter sets in add: got 3"),
        ("threshold", {"level": None}, "level: got 'None'"),
        ("threshold", {"level": torch.zeros(4, 3)}, "level: got"),
        ("topk", {"full_encoder": None}, "full_encoder: got 'None'"),
        ("topk", {"full_encoder": torch.zeros(12, 23)}, r"full_encoder: got 'float32 \[12, 23\]"),
        ("topk", {"full_bias": torch.zeros(11)}, r"full_bias: got 'float32 \[11\]"),
        ("topk", {"latent": torch.zeros(4, 2, dtype=torch.int64)}, r"latent: got 'int64 \[4, 2\]"),
        ("topk", {"k": 0}, "k: got 0; allowed: 1 to 12"),
        ("topk", {"k": 13}, "k: got 13; allowed: 1 to 12"),
    ],
)
def test_errors_name_the_argument(gate: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sae_edit(**{**inputs(gate), **change})


def test_modes_are_named() -> None:
    with pytest.raises(InputError, match="mode: got 'scale'; allowed: multiply, add, set, ablate"):
        scale_and_add("scale", torch.zeros(2))
