"""The store: whole or not at all, damage is set aside, merging neither loses nor doubles."""

import errno

import pyarrow.parquet as pq
import pytest
import torch

from pysteer import files
from pysteer.errors import InputError
from pysteer.sweep.driver import run_sweep
from pysteer.sweep.plan import plan_sweep
from pysteer.sweep.query import query, results
from pysteer.sweep.rows import column_types, table_of
from pysteer.sweep.status import status
from pysteer.sweep.store import Store, StoreFull

TOY = "toy:ToyTask"
WORDS = ["strength=linspace(0,2,5)", "seed=range(4)", "prompt=a,b"]


def rows(first: int, count: int) -> list[dict]:
    return [{"key": f"{i:032x}", "status": "ok", "strength": float(i)} for i in range(first, first + count)]


def write(store: Store, writer: str, first: int, count: int):
    return store.write(writer, table_of(rows(first, count), {"key": "string", "status": "string"}))


def test_a_sweep_that_was_killed_while_its_folder_was_made_goes_on(tmp_path):
    folder, plan = tmp_path / "sweep", plan_sweep(TOY, ["strength=0,1", "prompt=a"])
    folder.mkdir()
    (folder / ".sweep.0123456789ab.tmp.json").write_text('{"half')
    assert run_sweep(plan, folder).ran == 2
    assert not list(folder.glob(".sweep.*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        run_sweep(plan, tmp_path / "mine")


def test_merging_keeps_every_row_once_even_when_it_is_cut_off(tmp_path, monkeypatch):
    store = Store(tmp_path)
    for i in range(20):
        write(store, "w0", 10 * i, 10)
    before = store.finished()
    real = type(tmp_path).unlink
    monkeypatch.setattr(type(tmp_path), "unlink", lambda self, **kw: real(self, **kw) if "tmp" in self.name else None)
    store.merge("w0")  # as if killed between writing and removing
    monkeypatch.undo()
    assert len(list((tmp_path / "shards").iterdir())) == 21
    assert len(store.shards()) == 1
    assert store.finished() == before
    write(store, "w1", 1000, 3)
    store.merge("", least=2)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    table = pq.read_table(store.shards()[0])
    assert len(table) == 203 == len(set(table["key"].to_pylist()))


def test_a_shard_that_is_not_what_was_written_is_set_aside_and_reported(tmp_path):
    plan = plan_sweep(TOY, WORDS)
    run_sweep(plan, tmp_path / "s")
    store = Store(tmp_path / "s")
    shard = store.shards()[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    _, _, damaged = query("select 1", [tmp_path / "s"]) if len(store.shards()) > 1 else ([], [], store.check())
    assert [each.name for each in damaged] == [shard.name]
    assert (tmp_path / "s" / "quarantine" / shard.name).is_file()
    assert any(shard.name in line for line in status(tmp_path / "s").damaged)
    outcome = run_sweep(plan, tmp_path / "s")
    assert outcome.ran == 8
    assert len(store.finished()) == len(plan)


def test_a_truncated_shard_of_a_running_sweep_costs_only_its_own_cells(tmp_path):
    plan = plan_sweep(TOY, WORDS)
    store = Store(tmp_path)
    run_sweep(plan, tmp_path)
    write(store, "x", 0, 1)
    victim = next(path for path in store.shards() if path.name.startswith("x-"))
    victim.write_bytes(victim.read_bytes()[:-9])
    outcome = run_sweep(plan, tmp_path)
    assert [each.name for each in outcome.damaged] == [victim.name]
    assert outcome.ran == 0


def test_a_full_disk_stops_with_the_fix_and_keeps_what_is_finished(tmp_path, monkeypatch):
    plan = plan_sweep(TOY, WORDS)
    real, count = files.write_bytes, {"n": 0}

    def full(path, data):
        count["n"] += 1
        if "shards" in str(path) and count["n"] > 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(StoreFull, match=r"No space left.*make room"):
        run_sweep(plan, tmp_path / "s")
    monkeypatch.undo()
    store = Store(tmp_path / "s")
    kept = store.finished()
    assert 0 < len(kept) < len(plan)
    assert not list((tmp_path / "s").rglob(".*.tmp*"))
    outcome = run_sweep(plan, tmp_path / "s")
    assert outcome.finished_before == len(kept)
    assert outcome.recovered > 0
    assert len(store.finished()) == len(plan)


def test_a_folder_that_cannot_be_written_or_is_something_else(tmp_path):
    plan = plan_sweep(TOY, WORDS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="other files"):
        run_sweep(plan, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other files"):
        run_sweep(plan, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def test_images_are_kept_once_by_content(tmp_path):
    store = Store(tmp_path)
    a, b = torch.zeros(4, 4, 3, dtype=torch.uint8), torch.ones(4, 4, 3, dtype=torch.uint8)
    names = store.put_images([a, b, a])
    assert names[0] == names[2] != names[1]
    assert len(list((tmp_path / "images").rglob("*.png"))) == 2
    assert store.put_images([b.clone()]) == [names[1]]


def test_rows_have_the_types_of_their_fields_and_answer_questions(tmp_path):
    from toy import ToySetting

    assert column_types(ToySetting)["strength"] == "double"
    assert column_types(ToySetting)["seed"] == "int64"
    run_sweep(plan_sweep(TOY, WORDS), tmp_path / "one")
    run_sweep(plan_sweep(TOY, ["strength=3"]), tmp_path / "two")
    _, found, _ = query("select count(*), (select count(*) from two) from cells", [tmp_path / "one", tmp_path / "two"])
    assert found == [(40, 1)]
    with pytest.raises(InputError, match="question"):
        query("select nothing from cells", [tmp_path / "one"])
    table = results(tmp_path / "one")
    assert [row.setting["strength"] for row in table.rows][:2] == [1.5, 2.0]
    assert table.rows[0].count == 8
    assert [row.setting["strength"] for row in table.front] == [0.0, 1.5]
    assert table.rows[0].interval is not None
    assert table.rows[0].interval[0] < 1
    _, found, _ = query("select pysteer, weights, schema, device from cells limit 1", [tmp_path / "one"])
    assert found[0][1:] == ("toy", 1, "cpu")


def test_the_page_shows_settings_front_and_images(tmp_path):
    from pysteer.sweep.page import write_page

    run_sweep(plan_sweep(TOY, WORDS), tmp_path / "s", words=WORDS)
    page = write_page(tmp_path / "s").read_text(encoding="utf-8")
    assert "40 of 40 cells in 5 settings" in page
    assert page.count("data:image/png;base64,") == 3  # the figure in light and dark, the images
    front = (tmp_path / "s" / "figures" / "front.csv").read_text(encoding="utf-8").splitlines()
    assert front[0] == "setting,damage,target,on_front"
    assert sum(line.endswith(",True") for line in front) == 2
    assert (tmp_path / "s" / "figures" / "front.svg").is_file()
    assert "strength 1.5" in page
    assert "pysteer sweep toy:ToyTask strength=linspace(0,2,5)" in page
