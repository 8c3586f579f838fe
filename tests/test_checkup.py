"""`pysteer doctor`: what it finds, what it says, and its exit code."""

import json

import pytest

from pysteer import checkup, cli
from pysteer.checkup import Check, check_environment


def test_every_check_says_something_and_what_is_wrong_has_a_fix():
    found = {check.name: check for check in check_environment()}
    assert {"python", "torch", "gpu", "numpy", "compiled kernels", "backends", "steering", "threads", "extras"} <= set(
        found
    )
    assert found["steering"].state == "good"
    assert found["steering"].text == "matches the formula"
    assert all(check.text for check in found.values())
    assert all(check.fix for check in found.values() if check.state == "bad")


def test_a_check_that_fails_does_not_hide_the_others(monkeypatch):
    def broken():
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(checkup, "_numpy", broken)
    found = {check.name: check for check in check_environment()}
    assert found["broken"].state == "bad"
    assert found["broken"].text == "RuntimeError: no luck"
    assert found["steering"].state == "good"


def test_sources_that_hide_the_installed_package_are_named(monkeypatch, tmp_path):
    from pysteer import environment

    (tmp_path / "pysteer").mkdir()
    (tmp_path / "pysteer" / "_C.cpython-311.so").write_bytes(b"")

    class Installed:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(environment, "extension_info", lambda: {"available": False, "reason": "no module"})
    monkeypatch.setattr(checkup.importlib.metadata, "distribution", lambda name: Installed())
    check = next(checkup._kernels())
    assert str(tmp_path) in check.text
    assert "another folder" in check.fix
    (tmp_path / "pysteer" / "_C.cpython-311.so").unlink()
    assert "no module" in next(checkup._kernels()).text


@pytest.mark.parametrize(("state", "code"), [("good", 0), ("note", 0), ("bad", 1)])
def test_the_exit_code_says_whether_something_must_be_fixed(state, code, monkeypatch, capsys):
    monkeypatch.setattr(checkup, "check_environment", lambda: [Check("thing", state, "a text", "a fix")])
    assert cli.run_command(["doctor"]) == code
    assert capsys.readouterr().out == f"{state:5} thing: a text\n      fix: a fix\n"
    assert cli.run_command(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [{"name": "thing", "state": state, "text": "a text", "fix": "a fix"}]


def test_the_closest_recipe_and_generator_are_named(capsys):
    assert cli.run_command(["run", "infinity-prototyp"]) == 2
    assert "did you mean infinity-prototype?" in capsys.readouterr().err


def test_recipes_complete_in_the_shell():
    assert cli._recipes("infinity") == ["infinity-prototype"]
    assert "methods" in cli._recipes("")
