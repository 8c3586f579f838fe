"""Adaptive searches, estimates and the simulator."""

import pytest

from pysteer.errors import InputError
from pysteer.sweep.adaptive import SearchOptions, search
from pysteer.sweep.driver import Launch
from pysteer.sweep.estimate import estimate
from pysteer.sweep.plan import plan_sweep
from pysteer.sweep.simulate import Costs, simulate
from pysteer.sweep.store import Store

TOY = "toy:ToyTask"  # target: strength > 1; damage: strength squared
WORDS = ["strength=uniform(0,3)", "seed=range(4)", "prompt=a,b"]


def test_halving_finds_what_is_best_with_fewer_cells_than_a_grid(tmp_path):
    options = SearchOptions("halving", trials=24, wave=8, weight=0.2)
    found = search(WORDS, TOY, tmp_path, options)
    best = found.best[0].values["strength"]
    assert 1 < best < 1.5  # the least damage that reaches the target
    assert any(trial.stopped for trial in found.trials)
    cells = len(Store(tmp_path).finished())
    assert cells < 0.8 * 24 * 8
    again = search(WORDS, TOY, tmp_path, options)
    assert [t.values for t in again.trials] == [t.values for t in found.trials]
    assert len(Store(tmp_path).finished()) == cells  # nothing ran twice


def test_pareto_finds_both_ends_of_the_front(tmp_path):
    found = search(WORDS, TOY, tmp_path, SearchOptions("pareto", trials=16, wave=8))
    assert len(found.best) == 2
    high, low = found.best
    assert (high.target, low.target) == (1.0, 0.0)
    assert high.values["strength"] > 1
    assert low.values["strength"] == min(t.values["strength"] for t in found.trials)


def test_searches_that_make_no_sense():
    with pytest.raises(InputError, match="halving, pareto"):
        SearchOptions("random")
    with pytest.raises(InputError, match="samples"):
        search(["strength=1,2"], TOY, "/nonexistent", SearchOptions())


def test_an_estimate_leaves_nothing_behind(tmp_path):
    plan = plan_sweep(TOY, ["strength=linspace(0,2,5)", "seed=range(8)", "method=x,y"])
    made = estimate(plan, tmp_path / "s", Launch())
    assert (made.cells, made.finished, made.batches, made.sets) == (80, 0, 10, 2)
    assert made.seconds > 0
    assert not (tmp_path / "s").exists()
    assert any("batches: 10" in line for line in made.lines())


def test_the_simulator_agrees_with_arithmetic_and_with_failures():
    even = Costs(batch_seconds=2.0, spread=0.0, speeds=0.0, start_seconds=0.0)
    made = simulate(64 * 1000, 10, even)
    assert made.hours * 3600 == pytest.approx(200.0)
    assert made.efficiency == pytest.approx(1.0)
    few = simulate(64 * 5, 10, even)  # five GPUs have nothing to do
    assert few.efficiency == pytest.approx(0.5)
    uneven = Costs(spread=0.1, speeds=0.2, start_seconds=0.0)
    queue, slices = (simulate(64 * 4000, 16, uneven, slices=cut) for cut in (False, True))
    assert slices.efficiency < queue.efficiency - 0.05
    failing = simulate(64 * 4000, 16, even, mtbf_hours=0.05)
    assert failing.failures > 10
    assert failing.redone == failing.failures * 64
    assert failing.hours > simulate(64 * 4000, 16, even).hours
    with pytest.raises(InputError):
        simulate(0, 1)
