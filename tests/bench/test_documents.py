"""Tables of README and docs are those that are stored, and `pysteer bench` says when there is no checkout."""

import subprocess

import pytest
import torch
from typer.testing import CliRunner

from bench import docs, rows
from bench.summary import summary_table
from pysteer import cli
from pysteer.commands import bench as command
from pysteer.errors import InputError


@pytest.mark.parametrize("path", docs.documents(), ids=lambda path: path.name)
def test_tables_agree_with_what_is_stored(path):
    text = path.read_text(encoding="utf-8")
    assert docs.written(text) == text, f"{path.name} is out of date; run: pysteer bench table"


def test_a_figure_changed_by_hand_is_noticed(monkeypatch):
    monkeypatch.setitem(docs.TABLES, "speed", lambda: "| 1.00 |")
    text = "before\n<!-- bench: speed -->\n| 1.00 |\n<!-- /bench -->\nafter\n"
    assert docs.written(text) == text
    assert docs.written(text.replace("1.00", "0.10")) == text
    with pytest.raises(ValueError, match="no table nonsense"):
        docs.written("<!-- bench: nonsense -->\nx\n<!-- /bench -->")


def test_the_page_of_benchmarks_has_its_tables():
    text = (docs.ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name in ("speed", "rows", "effect", "language"):
        assert f"<!-- bench: {name} -->" in text
    assert "<!-- bench: summary -->" in (docs.ROOT / "README.md").read_text(encoding="utf-8")


def test_the_summary_names_the_quickest_of_each_kind():
    def row(contender, ratio, ours=False):
        one = [1.0, 1.0] if ratio == 1 else [ratio - 0.01, ratio + 0.01]
        return {"part": "p", "work": "w", "contender": contender, "ours": ours, "ratio": ratio, "ratio_quartiles": one}

    refused = {"part": "p", "work": "w", "contender": "package x", "refused": "not installed"}
    rows = [row("unsteered, compiled", 1.0), row("pysteer, compiled", 1.02, True), row("pysteer, eager", 1.2, True)]
    rows += [
        row("plain hooks, eager", 1.3),
        row("plain hooks, compiled", 1.1),
        row("repeng's way, eager", 1.5),
        refused,
    ]
    result = {"parts": ["p"], "rows": rows, "machine": {"gpu": None, "processor": "some CPU"}}
    line = summary_table([result]).splitlines()[2]
    told = ["1.02", "pysteer, compiled"], ["1.100", "plain hooks, compiled"], ["1.500", "repeng's way, eager"]
    cells = line.split("|")[3:6]
    assert all(word in cell for cell, words in zip(cells, told, strict=True) for word in words)
    assert "unsteered, compiled" in line.split("|")[2]


def test_an_installed_package_says_that_it_needs_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site/pysteer/commands/bench.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a checkout"):
        command._module("speed")


def test_the_commands_pass_their_words_on(capsys):
    runner = CliRunner()
    told = runner.invoke(cli.app, ["bench", "speed", "--help"])
    assert told.exit_code == 0
    assert "--profile" in told.output
    assert cli.run_command(["bench", "compare", "no-such-result", "0", "1"]) == 2
    assert "nothing is stored yet" in capsys.readouterr().err
    assert cli.run_command(["bench", "table", "--check"]) == 0


def test_rows_that_are_all_alike_get_no_time():
    none, change = torch.zeros(4, 6), torch.randn(4, 6)
    one = none + change[:1]
    many = torch.cat([one[:1], none[1:] + change[1:]])
    assert rows.check_rows({"none": none, "one": one, "many": many}) == ""
    assert "like the others" in rows.check_rows({"none": none, "one": one, "many": one.clone()})
    assert "did not change" in rows.check_rows({"none": none, "one": one, "many": none})
    broken = many.clone()
    broken[0] += 1
    assert "changed wrongly" in rows.check_rows({"none": none, "one": one, "many": broken})
    assert rows.shift_plans([("a", 3)], 2, seed=0)[0].entries[0].parameters.tensors["bias"].shape == (1, 3)


def test_peers_are_known_by_name():
    made = subprocess.run([docs.ROOT / "scripts/peers.sh", "nonsense"], capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "unknown package nonsense; allowed: repeng steering-vectors" in made.stderr
