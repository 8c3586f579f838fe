"""Directions are what their formulas say in the space of formed changes; edits move adapters by just that."""

import pytest
import torch
from small_adapters import write

from pysteer.errors import InputError
from pysteer.weightspace import Directions, LoraSet, negate, read_adapter


@pytest.fixture
def directions(folder):
    write(folder / "class-0" / "wide.safetensors", 100, rank=3)
    return Directions(LoraSet.open(folder))


def _flat(adapter):
    return torch.cat([it.delta().flatten() for it in adapter.layers.values()]).double()


def _all(directions):
    adapters = directions.adapters
    return torch.stack([_flat(adapters.adapter(i)) for i in range(len(adapters))])


def test_difference_of_means(directions):
    x, labels = _all(directions), directions.adapters.labels
    mask = torch.tensor([label == "class-1" for label in labels])
    direction = directions.between("class-1", "class-0")
    wanted = x[mask].mean(0) - x[~mask].mean(0)
    torch.testing.assert_close(_flat(directions.adapter(direction, rank=9)), wanted, rtol=1e-4, atol=1e-5)
    assert directions.length(direction) == pytest.approx(float(wanted.norm()), rel=1e-5)
    same = directions.between("class-1").coefficients
    torch.testing.assert_close(same, direction.coefficients)


def test_components(directions):
    x = _all(directions)
    centred = x - x.mean(0)
    _, s, vt = torch.linalg.svd(centred, full_matrices=False)
    for number in (0, 3):
        made = _flat(directions.adapter(directions.component(number), rank=9))
        wanted = vt[number] * s[number] / len(x) ** 0.5
        assert float(torch.nn.functional.cosine_similarity(made, wanted, dim=0).abs()) > 0.9999
        assert float(made.norm()) == pytest.approx(float(wanted.norm()), rel=1e-4)
    with pytest.raises(InputError, match="component"):
        directions.component(len(x))


def test_probe_is_the_ridge_normal(directions):
    x, labels = _all(directions), directions.adapters.labels
    y = torch.tensor([1.0 if label == "class-1" else -1.0 for label in labels]).double()
    centred = x - x.mean(0)
    penalty = 0.5 * centred.square().sum(1).mean()
    normal = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(x.shape[1]), centred.T @ (y - y.mean()))
    direction = directions.probe("class-1", "class-0", penalty=0.5)
    made = _flat(directions.adapter(direction, rank=9))
    assert float(torch.nn.functional.cosine_similarity(made, normal, dim=0)) > 0.9999
    # At t = 1 the score moves by the gap between the class means.
    gap = (x[y > 0].mean(0) - x[y < 0].mean(0)) @ normal
    assert float(made @ normal) == pytest.approx(float(gap), rel=1e-4)


def test_random_control_is_as_long(directions):
    like = directions.between("class-1", "class-0")
    one, two = directions.random(0, like), directions.random(1, like)
    assert directions.length(one) == pytest.approx(directions.length(like))
    assert not torch.allclose(one.coefficients, two.coefficients)


def test_edit_moves_by_t_and_interpolation_goes_between(directions):
    x = _all(directions)
    direction = directions.between("class-1", "class-0")
    step = _flat(directions.adapter(direction, rank=9))
    moved = _flat(directions.edit(3, direction, 0.7, rank=9))
    torch.testing.assert_close(moved, x[3] + 0.7 * step, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_flat(directions.edit(3, direction, 0.0, rank=9)), x[3], rtol=1e-4, atol=1e-5)
    half = _flat(directions.interpolate(2, 5, 0.25, rank=9))
    torch.testing.assert_close(half, 0.75 * x[2] + 0.25 * x[5], rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_the_best_of_that_rank(directions):
    direction = directions.between("class-1", "class-0")
    whole, cut = directions.edit(0, direction, 1.0, rank=9), directions.edit(0, direction, 1.0, rank=1)
    for name, it in cut.layers.items():
        assert it.rank == 1
        s = torch.linalg.svdvals(whole.layers[name].delta())
        error = (whole.layers[name].delta() - it.delta()).norm()
        torch.testing.assert_close(error, s[1:].square().sum().sqrt(), rtol=1e-4, atol=1e-5)


def test_samples_have_the_mean_and_spread_of_the_class(directions):
    x = _all(directions)[[i for i, label in enumerate(directions.adapters.labels) if label == "class-1"]]
    drawn = torch.stack([_flat(directions.sample("class-1", seed, rank=9)) for seed in range(200)])
    none = _flat(directions.sample("class-1", 0, rank=9, spread=0.0))
    torch.testing.assert_close(none, x.mean(0), rtol=1e-4, atol=1e-5)
    spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
    assert float((drawn - none).square().sum(1).mean().sqrt()) == pytest.approx(float(spread), rel=0.15)


def test_negated_adapter_undoes(directions):
    given = directions.adapters.adapter(0)
    torch.testing.assert_close(_flat(given) + _flat(negate(given)), torch.zeros_like(_flat(given)))


def test_an_edited_adapter_is_an_ordinary_file(directions, tmp_path):
    made = directions.edit(0, directions.between("class-1", "class-0"), 1.0, rank=2)
    again = read_adapter(made.save(tmp_path / "edited.safetensors"))
    torch.testing.assert_close(_flat(again), _flat(made))
    with pytest.raises(InputError, match="class"):
        directions.between("no such class")
