"""`lowrank_features` against the product itself: singular values, exact quantiles, zeros, errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS
from torch import Tensor

from pysteer.errors import InputError
from pysteer.ops import Case, backend, get
from pysteer.ops.lowrank_features import lowrank_features, lowrank_products

NAMES = pytest.mark.parametrize("name", CPU_VARIANTS)


def products(up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """The products themselves, in fp64."""
    return scale.double().reshape(-1, 1, 1) * (up.double() @ down.double())


@NAMES
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_agrees_with_the_product(name: str, rank: int) -> None:
    i = get("lowrank_features").make_inputs(Case(3, 45, 70, sizes={"rank": rank}))
    with backend(name):
        summary, singular, quantiles = lowrank_features(**i, quantiles=(0, 0.1, 0.5, 0.987, 1))
    full = products(**i)
    values = torch.linalg.svdvals(full)
    torch.testing.assert_close(singular, values[:, :rank], rtol=1e-6, atol=1e-6)
    flat = full.flatten(1)
    share = values / values.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1)
    right = [flat.sum(1), flat.mean(1), flat.std(1, correction=0), flat.norm(dim=1), values[:, 0], values.sum(1)]
    torch.testing.assert_close(summary, torch.stack([*right, entropy.exp()], 1), rtol=1e-6, atol=1e-6)
    exact = flat.quantile(torch.tensor([0, 0.1, 0.5, 0.987, 1], dtype=torch.float64), dim=1).T
    torch.testing.assert_close(quantiles, exact, rtol=1e-5, atol=1e-6)


@NAMES
@pytest.mark.parametrize("rank", [1, 2])
def test_every_order_statistic_of_whole_numbers(name: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    up = torch.randint(-2, 3, (4, 7, rank), generator=generator).float()
    down = torch.randint(-2, 3, (4, rank, 6), generator=generator).float()
    up[1] = up[1].abs()
    down[1] = down[1].abs()
    up[2] = 0
    steps = torch.arange(42, dtype=torch.float64) / 41
    with backend(name):
        found = lowrank_features(up, down, torch.ones(4), quantiles=steps.tolist()).quantiles
    torch.testing.assert_close(found, (up @ down).flatten(1).sort(1).values.double())


@NAMES
def test_a_product_of_zeros(name: str) -> None:
    for rank in (1, 4):
        with backend(name):
            found = lowrank_features(torch.zeros(2, 5, rank), torch.randn(2, rank, 9), torch.ones(2))
        assert all(each.eq(0).all() for each in found)


@NAMES
def test_values_that_are_not_finite(name: str) -> None:
    up, down = torch.ones(1, 3, 1), torch.arange(1.0, 5.0).reshape(1, 1, 4)
    up[0, 0, 0] = torch.inf
    with backend(name):
        found = lowrank_features(up, down, torch.ones(1), quantiles=(0.0, 0.5)).quantiles
    assert found[0].tolist() == [1.0, 3.5]


def test_small_singular_values() -> None:
    generator = torch.Generator().manual_seed(4)
    up = torch.randn(2, 90, 4, generator=generator) * torch.tensor([1.0, 1e-1, 1e-3, 1e-5])
    down = torch.randn(2, 4, 60, generator=generator)
    found = lowrank_features(up, down, torch.ones(2), quantiles=()).singular_values
    full = torch.linalg.svdvals(products(up, down, torch.ones(2)))[:, :4]
    torch.testing.assert_close(found, full, rtol=1e-5, atol=0)


def test_one_adapter_does_not_depend_on_the_others() -> None:
    i = get("lowrank_features").make_inputs(Case(5, 33, 40))
    whole = lowrank_features(**i).quantiles
    alone = lowrank_features(**{name: each[2:3] for name, each in i.items()}).quantiles
    assert torch.equal(whole[2:3], alone)


def test_inner_products_of_the_products() -> None:
    i = get("lowrank_features").make_inputs(Case(6, 20, 30, sizes={"rank": 3}))
    flat = products(**i).flatten(1)
    torch.testing.assert_close(lowrank_products(**i), flat @ flat.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(5, 3)}, r"up: got \[5, 3\]"),
        ({"down": torch.zeros(3, 2, 9)}, r"down: got \[3, 2, 9\]; allowed: \[3, 4, 'n'\]"),
        ({"scale": torch.zeros(2)}, r"scale: got \[2\]"),
        ({"up": torch.zeros(3, 8, 4, dtype=torch.int64)}, "up: got 'torch.int64"),
        ({"quantiles": (0.5, 1.5)}, "quantiles: got 1.5; allowed: 0 to 1"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("lowrank_features").make_inputs(Case(3, 8, 6))
    with pytest.raises(InputError, match=message):
        lowrank_features(**{**i, **change})
