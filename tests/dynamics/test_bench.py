"""The page of the docs says what was measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench import dynamics
from bench.record import stored

RESULT = {
    "rounds": 3,
    "monitoring": [
        {"contender": "no monitor", "cpu_ms": 80.0, "cpu_ratio": 1.0, "wall_ms": 81.0, "wall_ratio": 1.0},
        {"contender": "ours", "cpu_ms": 82.0, "cpu_ratio": 1.025, "wall_ms": 83.0, "wall_ratio": 1.0312},
    ],
    "weights": [{"contender": "ours", "cpu_ms": 2.0, "times_faster": 61.26}],
    "machine": {"processor": "a processor", "threads": 2},
    "versions": {"torch": "2"},
    "date": "2026-01-01T00:00:00",
}


def test_the_tables_show_what_was_measured():
    lines = dynamics.table(RESULT).splitlines()
    assert lines[3] == "| ours | 82.0 | +2.5 % | 83.0 | +3.1 % |"
    assert lines[7] == "| ours | 2.00 | 61.3 |"
    assert "3 rounds" in lines[-1]


def test_the_page_shows_the_newest_results():
    if not stored("dynamics") or not stored("vae-dynamics"):
        pytest.skip("nothing is stored")
    text = dynamics.DOCS.read_text(encoding="utf-8")
    assert dynamics.docs_text(text) == text


def test_what_is_measured_gives_the_same_figures_as_the_usual_way():
    rows = dynamics.weights(1)
    assert [row["contender"] for row in rows] == ["usual way", "usual way without its message", "pysteer, three modes"]
    assert all(row["cpu_ms"] > 0 for row in rows)
