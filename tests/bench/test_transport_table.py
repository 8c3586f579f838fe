"""A comparison of methods by `act-text` is stored and shown as it was found."""

import json
from pathlib import Path

import pytest

from bench import transport
from pysteer.errors import InputError


def _score(value: float, ratio: float) -> dict[str, object]:
    return {
        "concept_rate": {"value": value, "low": value / 2, "high": (1 + value) / 2, "n": 40}, "perplexity": 10 * ratio,
        "perplexity_ratio": ratio, "perplexity_ratio_low": ratio - 0.1, "perplexity_ratio_high": ratio + 0.1,
    }  # fmt: skip


def _run(folder: Path) -> Path:
    rows = [
        {"method": "mean_difference", "place": "block.14", "strength": 2.5, "readable": True, **_score(0.5, 1.25)},
        {"method": "aura", "place": "block.14", "strength": 1.0, "readable": False, **_score(0.0, 3.0)},
    ]
    folder.mkdir()
    summary = {
        "best": rows[0], "headline": {"unsteered": _score(0.25, 1.0), "best": rows[0]}, "seconds": 1.0,
        "tables": {"methods": rows, "search": []},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    config = {"task": {"name": "music"}, "method": {}, "generation": {}, "search": {}, "seed": 0}
    (folder / "run.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    return folder


def test_every_method_has_a_line(tmp_path: Path):
    row = transport.methods([str(_run(tmp_path / "run"))])[0]
    lines = transport._method_lines(row, "a processor")
    assert lines[2] == "| mean difference | block.14 | 2.5 | 50.0 [25.0, 75.0] | 1.25 [1.15, 1.35] |"
    assert lines[3].startswith("| aura (not readable) | block.14 | 1 | 0.0 [0.0, 50.0] | 3.00")
    assert "40 texts per strength, unsteered 25.0 [12.5, 62.5] %" in lines[-1]


def test_one_run_is_compared(tmp_path: Path):
    with pytest.raises(InputError, match="one, of act-text"):
        transport.methods(["a", "b"])
