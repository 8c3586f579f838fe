"""Launchers run the same cells alike. SLURM and Ray are skipped, with the reason, where they are not."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pysteer.errors import InputError
from pysteer.sweep.driver import Launch, run_sweep
from pysteer.sweep.plan import Options, SweepPlan, plan_sweep
from pysteer.sweep.query import query
from pysteer.sweep.status import status
from pysteer.sweep.store import Store

TOY = "toy:ToyTask"
WORDS = ["strength=linspace(0,2,4)", "seed=range(5)", "prompt=a,b"]


def plan() -> SweepPlan:
    return plan_sweep(TOY, WORDS, Options(batch_size=4))


def images(folder: Path) -> dict[str, str]:
    _, rows, _ = query("select key, image from cells where status = 'ok'", [folder])
    assert len(rows) == len(dict(rows)) == 40
    return dict(rows)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("here") / "s"
    run_sweep(plan(), folder)
    return images(folder)


def test_processes_give_the_same_images(tmp_path, here):
    seen = []
    outcome = run_sweep(
        plan(), tmp_path, launch=Launch("processes", workers=2, threads=1), show=lambda d, t: seen.append((d, t))
    )
    assert (outcome.ran, outcome.failed) == (40, 0)
    assert images(tmp_path) == here
    assert seen[-1] == (40, 40)
    found = status(tmp_path)
    assert (found.done, found.cells) == (40, 40)
    assert sum(state["done"] for state in found.workers.values()) == 40


def test_jobs_of_submitit_give_the_same_images_and_go_on(tmp_path, here, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYSTEER_SUBMITIT_CLUSTER", "local")
    outcome = run_sweep(plan(), tmp_path, launch=Launch("slurm", workers=2))
    assert (outcome.ran, outcome.failed) == (40, 0)
    assert images(tmp_path) == here


def test_a_job_that_is_queued_again_does_what_is_left(tmp_path, here):
    pytest.importorskip("submitit")
    from pysteer.sweep.launchers.slurm import Slice

    made = plan()
    store = Store(tmp_path)
    store.create(made.mark(WORDS))
    assert Slice(str(tmp_path), 0, 2, 1)() == 20
    again = Slice(str(tmp_path), 0, 2, 1).checkpoint()
    assert again.function() == 0  # what submitit calls after a time limit
    assert Slice(str(tmp_path), 1, 2, 1)() == 20
    assert images(tmp_path) == here


def test_slurm_gives_the_same_images(tmp_path, here):
    pytest.importorskip("submitit")
    if shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed (scripts/slurm_on_loopback.sh)")
    seen = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
    if "idle" not in seen.stdout and "mix" not in seen.stdout:
        pytest.skip(f"no node of SLURM is up: {(seen.stderr or seen.stdout).strip()[:80]}")
    outcome = run_sweep(plan(), tmp_path, launch=Launch("slurm", workers=2, minutes=30))
    assert (outcome.ran, outcome.failed) == (40, 0)
    assert images(tmp_path) == here


def test_ray_with_two_nodes_gives_the_same_images(tmp_path, here, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address)
    except Exception as error:
        pytest.skip(f"Ray cannot start here: {error}")
    try:
        outcome = run_sweep(plan(), tmp_path, launch=Launch("ray", workers=2))
        assert (outcome.ran, outcome.failed) == (40, 0)
        assert images(tmp_path) == here
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_ray_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="pysteer-core\\[ray\\]"):
        run_sweep(plan(), tmp_path, launch=Launch("ray"))
