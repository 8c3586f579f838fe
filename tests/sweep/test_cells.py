"""Axes, cells, keys and packing."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from toy import ToySetting

from pysteer.errors import InputError
from pysteer.sweep.axes import parse_axes
from pysteer.sweep.cells import key_of, make_cells
from pysteer.sweep.packing import batches, count_batches, in_order
from pysteer.sweep.plan import Options, plan_of_mark, plan_sweep

TOY = "toy:ToyTask"
BASE = dataclasses.asdict(ToySetting())


def cells_of(words, **more):
    fixed, axes = parse_axes(words, ToySetting)
    return make_cells("toy", {**BASE, **fixed}, axes, **more)


def test_a_grid_is_every_combination_once():
    cells = cells_of(["strength=0,0.5,1", "seed=range(4)", "prompt=a,b", "model=z"])
    seen = {(c["strength"], c["seed"], c["prompt"], c["model"]) for c in map(cells.config, range(len(cells)))}
    assert seen == set(itertools.product([0.0, 0.5, 1.0], range(4), ["a", "b"], ["z"]))
    assert len(cells) == 24


def test_keys_are_of_the_resolved_configuration_alone():
    wide, narrow = cells_of(["strength=1,2", "seed=3,4"]), cells_of(["seed=4", "strength=2"])
    assert narrow.cell(0).key == wide.cell(3).key == key_of("toy", wide.config(3))
    assert len({cell.key for cell in map(wide.cell, range(4))}) == 4
    assert key_of("other", wide.config(3)) != wide.cell(3).key
    reordered = dict(reversed(list(wide.config(3).items())))
    assert key_of("toy", reordered) == wide.cell(3).key


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=range(2,6,2)", (2, 4)), ("strength=linspace(0,1,3)", (0.0, 0.5, 1.0)),
        ("strength=logspace(0.01,1,3)", (0.01, 0.1, 1.0)), ('prompt=["a, b", c]', ("a, b", "c")),
        ("prompt=f(x,y),z", ("f(x,y)", "z")),
    ],
)  # fmt: skip
def test_axes_as_written(word, values):
    _, axes = parse_axes([word], ToySetting)
    assert axes[0].values == values


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["strength="], "no values"), (["seed=range(0)"], "no values"), (["strength=1", "strength=2"], "given twice"),
        (["strenght=1"], "did you mean strength"), (["strength=1,1"], "twice"), (["strength=x"], "strength"),
        (["seed=range(1,2,0)"], "range"), (["strength"], "key=value"), (["strength=uniform(2,1)"], "lower one first"),
        (["strength=loguniform(0,1)"], "above 0"), (["seed=linspace(0,1,3)"], "whole number"),
    ],
)  # fmt: skip
def test_wrong_axes_are_refused_by_name(words, named):
    with pytest.raises(InputError, match=named):
        cells_of(words)


def test_zip_and_its_errors():
    cells = cells_of(["strength=1,2", "seed=5,6", "prompt=a,b"], zipped=[["strength", "seed"]])
    assert {(c["strength"], c["seed"]) for c in map(cells.config, range(len(cells)))} == {(1.0, 5), (2.0, 6)}
    assert len(cells) == 4
    for zipped in ([["strength", "model"]], [["strength", "seed"], ["seed", "prompt"]]):
        with pytest.raises(InputError):
            cells_of(["strength=1,2", "seed=5,6", "prompt=a,b"], zipped=zipped)
    with pytest.raises(InputError, match="equally many"):
        cells_of(["strength=1,2", "seed=5,6,7"], zipped=[["strength", "seed"]])


@pytest.mark.parametrize("sampling", ["random", "sobol"])
def test_samples_are_within_the_range_and_combined_with_the_rest(sampling):
    words = ["strength=uniform(1,3)", "method=choice(x,y)", "seed=range(3)"]
    cells = cells_of(words, samples=32, sampling=sampling)
    found = [cells.config(i) for i in range(len(cells))]
    points = {(c["strength"], c["method"]) for c in found}
    assert len(cells) == 96
    assert len(points) == 32
    assert {c["method"] for c in found} == {"x", "y"}
    assert all(1 <= c["strength"] <= 3 for c in found)
    if sampling == "sobol":  # one point in every 32nd of the range: what random points do not do
        bins = {int((c["strength"] - 1) / 2 * 32) for c in found}
        assert len(bins) == 32
    again = cells_of(words, samples=32, sampling=sampling)
    assert (again.keys == cells.keys).all()
    with pytest.raises(InputError, match="samples"):
        cells_of(words)
    with pytest.raises(InputError, match="samples"):
        cells_of(["seed=1,2"], samples=3)


def test_packing_fills_batches_and_keeps_alike_rows_together():
    cells = cells_of(["strength=1,2,3", "seed=range(5)", "prompt=a,b", "model=m,n"])
    order, groups = in_order(cells, ["model"], ["prompt", "seed"], ["method"], 64)
    assert sorted(order.tolist()) == list(range(60))
    made = list(batches(order, groups, 8))
    assert [len(b) for b in made] == [8, 8, 8, 6, 8, 8, 8, 6]
    assert count_batches(groups, 8) == 8
    for rows in made:
        assert len({cells.config(int(r))["model"] for r in rows}) == 1
    flat = [(c["model"], c["prompt"], c["seed"]) for c in (cells.config(int(r)) for r in order)]
    assert len([k for k, _ in itertools.groupby(flat)]) == 20  # each (model, prompt, seed) in one piece


def test_a_bank_holds_no_more_sets_than_it_has_room_for():
    cells = cells_of(["method=a,b,c,d,e", "seed=range(4)"])
    order, groups = in_order(cells, [], ["seed"], ["method"], 2)
    for rows in batches(order, groups, 100):
        assert len({cells.config(int(r))["method"] for r in rows}) <= 2


def test_a_plan_comes_back_from_its_mark(tmp_path):
    plan = plan_sweep(TOY, ["strength=uniform(0,1)", "seed=1,2"], Options(samples=5, sampling="sobol", batch_size=3))
    again = plan_of_mark(json.loads(json.dumps(plan.mark(["x=1"]))))
    assert (again.cells.keys == plan.cells.keys).all()
    assert (again.order == plan.order).all()
    left = np.ones(len(plan), bool)
    parts = [plan.slice(left, i, 3) for i in range(3)]
    assert (sum(part.astype(int) for part in parts) == 1).all()
