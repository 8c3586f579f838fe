"""The reader of results: runs in every state, damaged tables, paths that lead out, many rows."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from inspected import write_sweep

from pysteer.app.store import NotFound, Results
from pysteer.app.tables import Table
from pysteer.errors import InputError


def test_runs_are_found_and_what_is_wrong_is_said(results):
    runs = {run.id: run for run in Results(results).runs()}
    assert {"sweep", "dream", "vae", "weights", "doses", "waiting", "broken", "half"} <= set(runs)
    assert runs["doses"].state == "finished"
    assert runs["doses"].best == {"strength": 2.0}
    assert runs["waiting"].state == "unfinished"
    assert "continues" in runs["waiting"].problem
    assert runs["broken"].state == runs["half"].state == "broken"
    assert "summary.json" in runs["half"].problem
    assert "run.json" in runs["broken"].problem
    assert "empty" not in runs


def test_a_folder_that_is_a_run_shows_itself(results):
    found = Results(results / "doses")
    assert [run.id for run in found.runs()] == ["."]
    assert len(found.table(".", "summary:methods")) == 3


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder of results"):
        Results(tmp_path / "none")
    assert Results(tmp_path).runs() == []


@pytest.mark.parametrize("name", ["..", "../other", "/etc/passwd", "a\0b", "doses/../../x", "x" * 5000, ".hidden"])
def test_paths_that_lead_out_are_refused(results, name):
    with pytest.raises(NotFound):
        Results(results).path(name)


def test_links_that_lead_out_and_other_kinds_of_files_are_refused(tmp_path):
    root, secret = tmp_path / "results", tmp_path / "secret.png"
    root.mkdir()
    secret.write_bytes(b"secret")
    os.symlink(secret, root / "link.png")
    (root / "weights.safetensors").write_bytes(b"x")
    (root / "fine.png").write_bytes(b"x")
    found = Results(root)
    assert found.served("fine.png").read_bytes() == b"x"
    for name in ("link.png", "weights.safetensors"):
        with pytest.raises(NotFound):
            found.served(name)


def test_a_damaged_shard_is_named_and_the_others_count(tmp_path):
    write_sweep(tmp_path / "sweep")
    shard = sorted((tmp_path / "sweep" / "shards").glob("w0*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    table = Results(tmp_path).table("sweep")
    assert len(table) == 18
    assert len(table.problems) == 1
    assert shard.name in table.problems[0]


def test_a_damaged_table_is_an_input_error(results):
    with pytest.raises(InputError, match=r"metrics\.parquet cannot be read"):
        Results(results).table("doses", "metrics.parquet")


def test_a_table_is_read_again_when_a_shard_is_added(tmp_path):
    from pysteer.sweep.rows import table_of

    store = write_sweep(tmp_path / "sweep")
    found = Results(tmp_path)
    assert len(found.table("sweep")) == 36
    store.write("w2", table_of([{"key": "new", "status": "ok", "strength": 9.0}], {"strength": "double"}))
    assert len(found.table("sweep")) == 37


def test_filters_ranges_search_and_sorting():
    table = Table.of([{"a": i % 3, "b": f"word {i}", "c": i / 2 if i else None} for i in range(10)])
    assert table.chosen({"a": "1"}).tolist() == [1, 4, 7]
    assert table.chosen({"c": "1..2"}).tolist() == [2, 3, 4]
    assert table.chosen({"c": "4.."}).tolist() == [8, 9]
    assert table.chosen({}, "WORD 7").tolist() == [7]
    assert table.sort(np.arange(10), "c", True).tolist()[:2] == [9, 8]
    assert table.sort(np.arange(10), "c", True).tolist()[-1] == 0  # without a value last
    with pytest.raises(InputError, match="did you mean"):
        table.chosen({"aa": "1"})
    with pytest.raises(InputError, match="range of a"):
        table.chosen({"a": "x..y"})


def test_curves_have_the_intervals_of_the_table_or_wilsons():
    from pysteer.metrics.rates import rate

    flags = Table.of([{"s": float(i % 2), "hit": i % 4 == 1} for i in range(40)])
    one = flags.curves("s", "hit", "", np.arange(40))[""]
    wanted = rate([True] * 10 + [False] * 10)
    assert [(p.x, p.count) for p in one] == [(0.0, 20), (1.0, 20)]
    assert (one[1].value, one[1].low, one[1].high) == (wanted.value, wanted.low, wanted.high)
    given = Table.of([{"s": 1.0, "target_rate": 0.5, "target_low": 0.25, "target_high": 0.875}])
    point = given.curves("s", "target_rate", "", np.arange(1))[""][0]
    assert (point.low, point.high) == (0.25, 0.875)
    assert "target_low" not in given.measures()


def test_cells_of_a_grid_are_the_first_row_of_each_place():
    table = Table.of([{"x": i % 2, "y": "ab"[i // 2 % 2]} for i in range(8)])
    assert table.cells("x", "y", np.arange(8)) == {(0, 0): (0, 2), (0, 1): (1, 2), (1, 0): (2, 2), (1, 1): (3, 2)}


def test_a_hundred_thousand_cells_are_read_and_filtered_quickly(tmp_path):
    write_sweep(tmp_path / "sweep", cells=100_000, strengths=tuple(i / 10 for i in range(20)), images=False)
    found = Results(tmp_path)
    start = time.process_time()
    table = found.table("sweep")
    assert len(table) == 100_000
    axes = table.axes()
    assert {"strength", "method", "seed"} <= set(axes)
    table.cells("strength", "seed", table.chosen({"method": "prototype"}))
    assert time.process_time() - start < 3
    start = time.process_time()
    rows = found.table("sweep").chosen({"method": "prototype", "strength": "0.5..1"}, "prompt 17")
    table.cells("strength", "seed", rows)
    assert 0 < len(rows) < 100_000
    assert time.process_time() - start < 0.3


def test_rows_of_a_sweep_are_read_without_torch(results):
    """The first page with rows must not wait for it."""
    code = (
        "import sys\nfrom pysteer.app.store import Results\n"
        f"print(len(Results({str(results)!r}).table('sweep', 'rows')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["36", "False"]
