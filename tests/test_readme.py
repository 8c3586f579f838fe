"""The README says what was measured."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import headline  # noqa: E402 (the benchmarks are not installed)
from bench.record import stored  # noqa: E402

RATE = {"value": 0.9605, "low": 0.932, "high": 0.9774, "n": 304}
RESULT = {
    "settings": [
        {
            "pair": "circle-to-square",
            "label": "text",
            "target_rate": RATE,
            "kept_rate": 0.9934,
            "kept_lowest": "size",
            "change_outside": 0.0312,
            "prompts": 304,
        },
        {
            "pair": "circle-to-square",
            "label": "unsteered",
            "target_rate": {**RATE, "n": 0},
            "kept_rate": None,
            "kept_lowest": "",
            "change_outside": None,
            "prompts": 304,
        },
    ],
    "images": {"generated": 10, "seconds": 2.0},
    "machine": {"processor": "a processor", "threads": 2},
    "versions": {"torch": "2"},
    "date": "2026-01-01T00:00:00",
}


def test_the_table_shows_rates_with_intervals():
    lines = headline.table(RESULT).splitlines()
    assert lines[2] == "| circle → square | text | 96.0 [93.2, 97.7] | 99.3 (size) | 0.031 |"
    assert lines[3] == "| circle → square | unsteered | - | - | - |"
    assert "304 prompts" in lines[-1]


def test_only_the_text_between_the_marks_is_replaced():
    text = f"before\n{headline.START}\nold\n{headline.END}\nafter\n"
    once = headline.readme_text(text, RESULT)
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert headline.readme_text(once, RESULT) == once


def test_the_readme_shows_the_newest_stored_run():
    results = stored("headline")
    if not results:
        pytest.skip("no run of the main experiment is stored")
    text = headline.README.read_text(encoding="utf-8")
    assert headline.readme_text(text, results[-1]) == text
