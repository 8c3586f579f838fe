"""kill -9 of workers and drivers; batches that fail, run out of memory, or kill their worker."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pysteer.errors import InputError, PysteerError
from pysteer.sweep.driver import Launch, run_sweep
from pysteer.sweep.plan import Options, plan_sweep
from pysteer.sweep.query import query
from pysteer.sweep.store import Store

TOY = "toy:ToyTask"
HERE = Path(__file__).parent


def test_killed_at_random_moments_nothing_is_lost_doubled_or_done_twice():
    done = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), "6", "3"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(
        r"(\d+) kills .*: (\d+) finished cells lost, (\d+) doubled, (\d+) missing, at most (-?\d+) cells", done.stdout
    )
    assert found is not None, done.stdout
    assert found.groups()[:4] == ("6", "0", "0", "0")
    assert int(found[5]) <= 2 * 4  # a batch per worker


def test_a_poisoned_cell_does_not_take_its_batch_mates_with_it(tmp_path):
    words = ["method=none,nan,raise", "seed=range(5)"]
    outcome = run_sweep(plan_sweep(TOY, words), tmp_path)
    assert outcome.failed == 10
    _, rows, _ = query("select method, status, error, image is null from cells order by method, seed", [tmp_path])
    by_method = {method: {row[1:] for row in rows if row[0] == method} for method in ("none", "nan", "raise")}
    assert by_method["none"] == {("ok", None, False)}
    assert by_method["nan"] == {("failed", "NaN in the picture", True)}
    assert by_method["raise"] == {("failed", "RuntimeError: this one always fails", True)}
    again = run_sweep(plan_sweep(TOY, words), tmp_path)
    assert again.ran == 0
    retried = run_sweep(plan_sweep(TOY, words), tmp_path, retry_failed=True)
    assert retried.finished_before == 5
    assert len(Store(tmp_path).finished()) == 15


def test_out_of_memory_halves_the_batch_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_ROOM", "3")
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    outcome = run_sweep(plan_sweep(TOY, ["seed=range(32)"], Options(batch_size=16)), tmp_path / "s")
    assert (outcome.ran, outcome.failed) == (32, 0)
    sizes = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert sizes[:4] == [16, 8, 4, 2]
    assert max(sizes[4:]) <= 2
    assert json.loads((tmp_path / "s" / "workers" / "local.json").read_text())["batch_limit"] == 2


def test_a_sweep_in_which_everything_fails_alike_stops(tmp_path):
    with pytest.raises(PysteerError, match="failed alike: RuntimeError: this one always fails"):
        run_sweep(plan_sweep(TOY, ["method=raise", "seed=range(400)"]), tmp_path)


def test_two_drivers_cannot_have_one_folder(tmp_path):
    from pysteer.recipes.folder import locked

    plan = plan_sweep(TOY, ["seed=1,2"])
    run_sweep(plan, tmp_path)
    with locked(tmp_path), pytest.raises(InputError, match="in use"):
        run_sweep(plan, tmp_path)


def test_a_cell_that_kills_its_worker_fails_alone(tmp_path):
    words = ["method=none,die", "seed=range(6)", "prompt=a"]
    plan = plan_sweep(TOY, [*words[:1], "seed=0", words[2]], Options(batch_size=2))
    outcome = run_sweep(plan, tmp_path, launch=Launch("processes", workers=1, threads=1, retries=1))
    assert (outcome.ran, outcome.failed) == (2, 1)
    _, rows, _ = query("select method, status, error from cells order by method", [tmp_path])
    assert rows[0][:2] == ("die", "failed")
    assert "the worker died" in rows[0][2]
    assert rows[1] == ("none", "ok", None)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"launcher": "sulrm"}, "launcher"), ({"workers": 3}, "workers with launcher local"),
        ({"partition": "gpu"}, "partition with launcher local"), ({"launcher": "ray", "minutes": 5}, "minutes"),
        ({"launcher": "processes", "workers": -1}, "workers"), ({"launcher": "slurm", "minutes": 0}, "minutes"),
    ],
)  # fmt: skip
def test_launchers_that_contradict_themselves(given, named):
    with pytest.raises(InputError, match=named):
        Launch(**given)
