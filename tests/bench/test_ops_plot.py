"""The plot of the ops shows what is stored: all of it, drawn again when a figure changes, the same each time."""

import copy

from bench import docs
from bench.record import stored
from bench.table import digest, newest, plot, points, timed


def test_the_plot_of_the_documentation_is_of_what_is_stored():
    assert not docs.picture_is_stale(), "docs/ops.svg is out of date; run: pysteer bench table"
    text = docs.PICTURE.read_text(encoding="utf-8")
    for row in newest(stored("ops")):
        assert f"{row['op']}  {row['shape']}" in text


def test_a_changed_figure_makes_it_stale(monkeypatch):
    changed = copy.deepcopy(stored("ops"))
    changed[-1]["rows"][0]["times_floor"]["eager"]["p50"] *= 2
    assert digest(changed) != digest(stored("ops"))
    monkeypatch.setattr(docs, "stored", lambda name: changed)
    assert docs.picture_is_stale()


def test_the_same_results_give_the_same_file_and_a_wrong_row_is_left_out(tmp_path):
    results = copy.deepcopy(stored("ops")[-1:])
    results[0]["rows"] = results[0]["rows"][:3]
    gone = results[0]["rows"][1]
    del gone["times_floor"]
    for name in ("a.svg", "b.svg"):
        plot(results, tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert digest(results) in text
    assert gone["shape"] not in text
    kept = [row for row in newest(results) if timed(row)]
    assert len(kept) == 2
    assert all(points(row)["op"] > 0 for row in kept)
