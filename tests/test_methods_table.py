"""The stored comparison of methods as a table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import methods_table

RATE = {"value": 0.9605, "low": 0.932, "high": 0.9774, "n": 144}
ROW = {
    "pair": "red-to-blue", "label": "prototype", "strength": 1.25, "target_rate": RATE, "kept_rate": 0.9934,
    "kept_lowest": "size", "change_outside": 0.0312, "feature_distance": 1234.5, "prompts": 144, "setting": "prototype",
}  # fmt: skip
METHOD = {**ROW, "method": "prototype", "options": {}, "place": "ca", "reaches": True}
SUMMARY = {"tables": {"methods": [METHOD, {**METHOD, "pair": "a-to-b"}], "references": [{**ROW, "label": "unsteered"}]}}


def test_rows_stand_pair_by_pair_and_the_good_ones_are_bold():
    rows = methods_table.rows_of(SUMMARY)
    assert [(row["pair"], row["label"]) for row in rows] == [
        ("red-to-blue", "prototype"),
        ("red-to-blue", "unsteered"),
        ("a-to-b", "prototype"),
    ]
    result = {
        "rows": rows, "generator": "g", "reach": 0.85, "keep": 0.95, "images": {"generated": 10, "seconds": 2.0},
        "machine": {"processor": "a processor", "threads": 2}, "versions": {"torch": "2"},
        "date": "2026-01-01T00:00:00",
    }  # fmt: skip
    lines = methods_table.table(result).splitlines()
    assert lines[2] == "| **prototype** | ca | 1.25 | 96.0 [93.2, 97.7] | 99.3 (size) | 1234 | 0.031 |"
    assert lines[3].startswith("| unsteered |  | 1.25 |")
    assert lines[5].startswith("| a → b: method |")
    assert "144 fresh prompts" in lines[-1]


def test_the_newest_rows_of_every_generator_and_pair():
    def run(generator: str, number: int, *pairs: str) -> dict[str, object]:
        return {"generator": generator, "n": number, "rows": [{"pair": pair} for pair in pairs]}

    found = methods_table.newest([run("a", 1, "x", "y"), run("b", 2, "x"), run("a", 3, "x"), run("b", 4, "x")])
    assert [(result["n"], [row["pair"] for row in result["rows"]]) for result in found] == [
        (1, ["y"]),
        (3, ["x"]),
        (4, ["x"]),
    ]
