"""Features equal what comes out of the formed changes, and do not depend on how a change was factorised."""

import numpy as np
import pytest
import torch
from small_adapters import write

from pysteer.errors import InputError
from pysteer.weightspace import FAMILIES, Adapter, LoraSet, LowRank, canonical_set, delta_gram, features, nearest, pca


@pytest.fixture
def adapters(folder):
    write(folder / "class-0" / "wide.safetensors", 100, rank=3)
    return LoraSet.open(folder)


def _turned(adapters, seed=0):
    """The same changes from other factors: up M, inverse(M) down, and a scale moved from one to the other."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(len(adapters)):
        layers = {}
        for name, it in adapters.adapter(index).layers.items():
            m = torch.randn(it.rank, it.rank, generator=generator) + 2 * torch.eye(it.rank)
            layers[name] = LowRank(torch.linalg.inv(m) @ it.down, it.up @ m * 4, it.scale / 4)
        made.append(Adapter(layers, str(index)))
    return LoraSet.of(made, adapters.labels)


def _deltas(adapters):
    return [torch.stack([adapters.adapter(i).layers[layer].delta() for i in range(len(adapters))]).double()
            for layer in adapters.layers]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_finite_and_a_row_per_adapter(adapters, family):
    found = features(adapters, family)
    values = found.values if found.values is not None else found.products
    assert len(values) == len(adapters)
    assert bool(values.isfinite().all())
    assert found.values is None or found.size == values.shape[1]


@pytest.mark.parametrize("family", ["canonical", "delta", "output", "input", "delta-stats", "spectral"])
def test_families_of_the_change_do_not_see_the_factors(adapters, family):
    one, two = features(adapters, family), features(_turned(adapters), family)
    first, second = (f.values if f.values is not None else f.products for f in (one, two))
    keep = slice(None)
    torch.testing.assert_close(first[:, keep].double(), second[:, keep].double(), rtol=2e-3, atol=2e-4)
    assert not torch.allclose(features(adapters, "flat").values, features(_turned(adapters), "flat").values, atol=0.1)


def test_statistics_of_changes(adapters):
    found = features(adapters, "delta-stats").values.view(len(adapters), len(adapters.layers), 5)
    for number, delta in enumerate(_deltas(adapters)):
        x = delta.flatten(1)
        wanted = torch.stack([x.mean(1), x.std(1, correction=0), x.quantile(0.5, 1), x.amin(1), x.amax(1)], 1)
        torch.testing.assert_close(found[:, number].double(), wanted, rtol=1e-4, atol=1e-5)


def test_statistics_of_the_flat_vector(adapters):
    """They are computed, and not the flat vector again."""
    x = torch.from_numpy(np.array(adapters.rows)).double()
    found = features(adapters, "stats7-flat").values.double()
    unit = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    wanted = [x.mean(1), x.std(1, correction=0), x.quantile(0.5, 1), x.amin(1), x.amax(1), unit.pow(3).mean(1),
              unit.pow(4).mean(1) - 3]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)
    assert features(adapters, "stats-flat").size == 5


def test_inner_products_of_changes(adapters):
    flat = torch.cat([delta.flatten(1) for delta in _deltas(adapters)], 1)
    torch.testing.assert_close(delta_gram(adapters), flat @ flat.T, rtol=1e-5, atol=1e-5)
    written = []
    for delta in _deltas(adapters):
        u, s, _ = torch.linalg.svd(delta, full_matrices=False)
        written.append(((u * s[:, None]) @ u.mT).flatten(1))
    both = torch.cat(written, 1)
    torch.testing.assert_close(delta_gram(adapters, side="output"), both @ both.T, rtol=1e-4, atol=1e-4)
    cosines, index = nearest(adapters, 2)
    unit = torch.nn.functional.normalize(flat, dim=1)
    wanted = (unit @ unit.T).fill_diagonal_(-2).topk(2, 1)
    assert torch.equal(index, wanted.indices)
    torch.testing.assert_close(cosines, wanted.values, rtol=1e-5, atol=1e-6)


def test_canonical_factors_give_the_change(adapters):
    for one, two in zip(_deltas(adapters), _deltas(canonical_set(adapters)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("method", ["gram", "covariance", "streaming"])
def test_principal_components(method, standardise):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator) @ torch.randn(8, 90, generator=generator)
    x = x + 0.05 * torch.randn(60, 90, generator=generator) + 5
    found = pca(x, 6, method=method, standardise=standardise)
    centred = (x - x.mean(0)).double()
    centred = centred / centred.std(0, correction=0) if standardise else centred
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.singular_values, s[:6], rtol=1e-5, atol=0)
    assert found.total == pytest.approx(float(s.square().sum()), rel=1e-5)
    cosines = (found.components.double() * vt[:6]).sum(1).abs()
    assert float(cosines.min()) > 0.9999
    torch.testing.assert_close(found.transform(x).square().sum(0).double(), s[:6].square(), rtol=1e-4, atol=0)


def test_the_route_follows_the_sizes():
    wide, tall = torch.randn(20, 50), torch.randn(80, 9)
    assert pca(wide, 3).method == "gram"
    assert pca(tall, 3).method == "covariance"
    assert "20 rows of 50" in pca(wide, 3).reason
    from pysteer.weightspace.components import choose

    assert choose(50_000, 99_648)[0] == "streaming"
    with pytest.raises(InputError, match="k"):
        pca(wide, 20)


def test_part_of_the_rows():
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    some = list(range(5, 25))
    torch.testing.assert_close(pca(x, 3, index=some).singular_values, pca(x[some], 3).singular_values)
