"""`pysteer bench compare` flags what got worse beyond the noise of both results, and nothing else."""

import json

import pytest

from bench import compare
from pysteer.errors import InputError

WHERE = {"machine": {"processor": "a processor", "gpu": None, "threads": 2}}


def row(ratio, spread=0.01, **given):
    quartiles = [ratio - spread, ratio + spread]
    return {"work": "w", "contender": "pysteer", "ours": True, "ratio": ratio, "ratio_quartiles": quartiles, **given}


def found(old, new, **given):
    return compare.compare({"rows": old}, {"rows": new}, **given)


def test_a_time_that_grew_beyond_the_spread_is_worse():
    assert found([row(1.0)], [row(1.1)])["worse"]
    assert found([row(1.1)], [row(1.0)])["better"]


@pytest.mark.parametrize("new", [row(1.1, spread=0.2), row(1.015), row(1.0)])
def test_noise_and_small_changes_are_not(new):
    assert not any(found([row(1.0)], [new]).values())


def test_others_may_become_slower_and_rows_may_go():
    other = {"contender": "hooks", "ours": False}
    assert not found([row(1.0, **other)], [row(2.0, **other)])["worse"]
    assert found([row(1.0)], [])["gone"] == ["w, pysteer"]


def test_a_contender_of_ours_that_is_refused_now():
    refused = {"work": "w", "contender": "pysteer", "ours": True, "refused": "the output did not change"}
    assert found([row(1.0)], [refused])["refused"] == ["w, pysteer: the output did not change"]


def test_effects_are_better_when_higher():
    def effect(value):
        return {"method": "m", "score": {"value": value, "low": value - 0.05, "high": value + 0.05}}

    assert found([effect(0.9)], [effect(0.5)])["worse"]
    assert found([effect(0.5)], [effect(0.9)])["better"]
    assert not found([effect(0.9)], [effect(0.85)])["worse"]


def test_ops_are_compared_by_multiples_of_the_floor():
    def op(value):
        own = {"p20": value - 0.01, "p50": value, "p80": value + 0.01}
        return {"op": "o", "shape": "s", "floor": "copy", "times_floor": {"in place": own, "copy": own}}

    assert found([op(1.0)], [op(1.5)])["worse"] == [
        "o, s: in place / floor 1.000 [0.990, 1.010] -> 1.500 [1.490, 1.510]"
    ]


def test_the_command_ends_with_1_on_a_regression(tmp_path, capsys):
    for name, ratio in (("a", 1.0), ("b", 1.2)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"rows": [row(ratio)], **WHERE}]), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert end.value.code == 1
    assert capsys.readouterr().out.startswith("worse: w, pysteer")
    compare.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")])
    assert "no difference beyond the noise" in capsys.readouterr().out


def test_results_that_are_not_there():
    with pytest.raises(InputError, match="nothing is stored yet"):
        compare.main(["no-such-result", "0", "1"])
