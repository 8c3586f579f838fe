"""A contest gives no time to who does not change the output, or changes it wrongly."""

import math
from types import SimpleNamespace

import torch

from bench.contest import ENOUGH, OPENING, Entry, contest, near, running, verdict
from bench.serving import Prepared, Server
from bench.speed_table import line, not_fastest

X = torch.randn(4, 5)


def hold(entries, folder, rounds=1, profile=None):
    with running(entries, folder) as field:
        return contest(
            field, "work", rounds=rounds, base="unsteered", say=lambda text: None, side_by_side=6, profile=profile
        )


def test_a_verdict_on_every_way_to_cheat():
    expected = X + 1
    assert verdict(expected + 1e-3, X, expected) == ""
    assert verdict(X, X, expected) == "the output did not change"
    assert verdict(X + 1e-6, X, expected) == "the output did not change"
    assert "changed wrongly" in verdict(X + 1.2, X, expected)
    one_row = X.clone()
    one_row[0] += 1  # the other rows were left out
    assert "changed wrongly" in verdict(one_row, X, expected)
    assert "not finite" in verdict(expected * torch.nan, X, expected)
    assert "shape" in verdict(expected[:2], X, expected)
    assert "shows nothing" in verdict(X, X, X.clone())
    assert verdict(X + 1e-4, X, None) == ""
    assert "unsteered output differs" in verdict(X + 1, X, None)


def test_processes_in_turn_and_only_the_right_ones_have_a_time(tmp_path):
    kinds = ("unsteered", "plain", "right", "idle", "wrong", "breaks")
    entries = [Entry(kind, "tests.bench.fake_work", kind, steers=kind != "unsteered") for kind in kinds]
    entries.append(Entry("absent", "package_absent", package="no-such-package"))
    entries.append(Entry("elsewhere", "tests.bench.fake_work", "right", works=("another work",)))
    rows = hold(entries, tmp_path, rounds=2, profile=tmp_path / "profiles")
    by_name = {row["contender"]: row for row in rows}
    assert list(by_name) == [*kinds, "absent"]
    timed = {name for name, row in by_name.items() if "ratio" in row}
    assert timed == {"unsteered", "plain", "right"}
    assert by_name["idle"]["refused"] == "the output did not change"
    assert "changed wrongly" in by_name["wrong"]["refused"]
    assert "cannot be prepared" in by_name["breaks"]["refused"]
    assert "scripts/peers.sh no-such-package" in by_name["absent"]["refused"]
    right = by_name["right"]
    assert right["rounds"] == 2
    assert right["ratio_quartiles"][0] <= right["ratio"] <= right["ratio_quartiles"][1]
    assert right["peak_bytes"] > 0
    assert right["calls"] > 0
    assert right["syncs"] == 1
    assert by_name["plain"]["syncs"] == 0
    assert (tmp_path / "profiles/work/right/trace.json").is_file()


def test_processes_do_several_works_and_rounds_end_when_patience_does(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.contest.NEAR", math.inf)
    entries = [
        Entry(kind, "tests.bench.fake_work", kind, steers=kind != "unsteered") for kind in ("unsteered", "plain")
    ]
    entries.append(Entry("once", "tests.bench.fake_work", "once"))
    with running(entries, tmp_path) as field:
        processes = [each.process.pid for each in field.contenders]
        works = {}
        for work, patience in (("first", 0.0), ("second", 1e9)):
            works[work] = contest(
                field, work, rounds=5, base="unsteered", patience=patience, say=lambda text: None
            )  # fmt: skip
        assert processes == [each.process.pid for each in field.contenders]
    assert [row["rounds"] for row in works["first"]] == [ENOUGH] * 3
    assert [row.get("rounds") for row in works["second"]] == [5, 5, None]
    assert "cannot be prepared" in works["second"][2]["refused"]  # it failed in one work, not in the other


def test_those_far_from_the_base_are_not_timed_in_every_round(tmp_path, monkeypatch):
    entries = [
        Entry(kind, "tests.bench.fake_work", kind, steers=kind != "unsteered") for kind in ("unsteered", "plain")
    ]
    monkeypatch.setattr("bench.contest.near", lambda each, base: each is base)
    rows = hold(entries, tmp_path, rounds=9)
    assert [row["rounds"] for row in rows] == [9, OPENING - 1]


def test_who_is_near():
    base, close, far, gone = (SimpleNamespace(refused="", seconds=[9.0, t, t, t]) for t in (1.0, 1.01, 2.0, 1.0))
    gone.refused = "its process ended"
    assert [near(each, base) for each in (base, close, far, gone)] == [True, True, False, False]
    assert not near(close, gone)


def test_long_runs_are_profiled_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.contest.LONG", -1.0)
    entries = [
        Entry(kind, "tests.bench.fake_work", kind, steers=kind != "unsteered") for kind in ("unsteered", "plain")
    ]
    rows = hold(entries, tmp_path)
    assert all("ratio" in row and row["calls"] is None and row["peak_bytes"] > 0 for row in rows)
    assert not (tmp_path / "profiles").exists()


def test_what_a_package_prints_while_it_is_imported_is_no_answer(tmp_path):
    entries = [
        Entry(kind, "tests.bench.fake_work", kind, steers=kind != "unsteered") for kind in ("unsteered", "plain")
    ]
    entries.append(Entry("talks", "tests.bench.talking_work", "right"))
    rows = hold(entries, tmp_path)
    assert [row.get("refused") for row in rows] == ["", "", ""]
    assert "ratio" in rows[2]


def test_a_failing_reference_refuses_everybody(tmp_path):
    entries = [Entry(kind, "tests.bench.fake_work", kind) for kind in ("unsteered", "breaks", "right")]
    rows = hold(entries, tmp_path)
    assert all("ratio" not in row for row in rows)
    assert "nothing to compare with" in rows[2]["refused"]


def test_setup_is_not_timed_and_failures_are_answers(tmp_path):
    heard, order = [], []

    def prepare(name):
        if name == "bad":
            raise ValueError("no such work")
        return Prepared(lambda: order.append("run"), lambda: torch.ones(2), 1, setup=lambda: order.append("setup"))

    server = Server(prepare, heard.append)
    server.serve([f"prepare good {tmp_path / 'a.safetensors'}\n", "round\n", "prepare bad x\n", "round\n"])
    assert order[-2:] == ["setup", "run"]
    assert heard[0]["units"] == 1
    assert heard[1]["seconds"] >= 0
    assert heard[2]["failed"].startswith("ValueError: no such work")
    assert "nothing is prepared" in heard[3]["failed"]


ROW = {"work": "w", "ratio_quartiles": [1.0, 1.1], "per_second": 3.0, "refused": ""}


def test_tables_say_where_pysteer_is_not_the_fastest():
    ours = {**ROW, "contender": "pysteer", "ours": True, "ratio": 1.05}
    close = {**ROW, "contender": "hooks", "ratio": 1.02}
    clear = {**ROW, "contender": "other", "ratio": 0.9, "ratio_quartiles": [0.89, 0.91]}
    slow = {**ROW, "contender": "slow", "ratio": 2.0}
    plain = {**ROW, "contender": "unsteered, eager", "ratio": 0.5}
    itself = {**ROW, "contender": "the activation itself", "ratio": 0.1}
    found = not_fastest([ours, close, clear, slow, plain, itself])
    assert found == ["w: hooks 1.020 against 1.050, within the spread", "w: other 0.900 against 1.050"]
    refused = {"work": "w", "contender": "pysteer", "ours": True, "refused": "the output did not change"}
    assert not_fastest([refused, slow]) == ["w: pysteer has no time"]
    assert "no time: the output did not change" in line(refused)
    assert "not measured (no GPU)" in line({"work": "w", "contender": "pysteer", "not_measured": "no GPU"})
    assert "1.050 [1.000, 1.100]" in line(ours)
