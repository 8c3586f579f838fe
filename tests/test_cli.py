"""The command line: what it prints, its exit codes, and that it starts quickly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pysteer
from pysteer import cli
from pysteer.recipes import frame
from pysteer.recipes.config import read_values

RECIPE = '''
"""A recipe for the tests."""
import time
from dataclasses import dataclass
from pysteer.errors import InputError
from pysteer.recipes.frame import Run, Summary, recipe

@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 3
    wait: float = 0.0
    fail: bool = False
    infinity: str | None = None

@recipe("toy", Config)
def run(config: Config, run: Run) -> Summary:
    """Count to a number."""
    if config.fail:
        raise InputError("steps", value=config.steps, allowed="something else")
    for step in run.progress(range(config.steps), "steps"):
        with run.stage(f"step-{step}") as stage:
            if not stage.done:
                time.sleep(config.wait)
                run.write_json(f"steps/{step}.json", {"step": step})
    return Summary(best={"steps": config.steps, "rate": 0.5})
'''


@pytest.fixture
def toy() -> Iterator[None]:
    """Make the recipe "toy" available in this process.

    It joins the registry rather than a copy of it: a recipe imported meanwhile must stay registered, for it is imported
    once.
    """
    exec(compile(RECIPE, "toy", "exec"), {"__name__": "toy"})
    yield
    del frame.RECIPES["toy"]


def call(*arguments: str) -> int:
    return cli.run_command(list(arguments))


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"pysteer {pysteer.__version__}\n"
    assert call("--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("run", "env", "grid", "convert"))
    assert call() == 0


def test_help_starts_without_torch(root: Path) -> None:
    code = "import sys; from pysteer.cli import run_command; run_command(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nonsense"], ["unknown recipe", "'nonsense'", "toy"]),
        (["run", "toy", "stpes=4"], ["unknown key", "'stpes'", "did you mean steps?"]),
        (["run", "toy", "steps=four"], ["steps", "'four'", "a whole number"]),
        (["run", "toy", "steps"], ["'steps'", "key=value"]),
        (["run", "toy", "fail=yes"], ["steps", "got 3", "something else"]),
        (["run", "toy", "--config", "nowhere.yml"], ["not found", "nowhere.yml"]),
        (["run", "toy", "--name", "../up"], ["run name", "../up"]),
        (["run", "toy", "--nonsense"], ["unknown key", "nonsense"]),
        (["nonsense"], ["nonsense"]),
        (["convert", "nowhere.pth", "out"], ["not found", "nowhere.pth"]),
        (["convert", "nowhere.pth", "out", "--kind", "x"], ["kind of weights", "'x'", "infinity-vae"]),
        (["convert", "nowhere.pth", "out", "--kind", "infinity-vae", "--pn", "1M"], ["options of infinity-vae", "pn"]),
        (["convert", "nowhere.pth", "out", "--vae", "v.pth"], ["--text-encoder"]),
    ],
)
@pytest.mark.usefixtures("toy")
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    printed, shown = capfd.readouterr()
    shown = shown.strip()
    assert printed == ""
    assert "\n" not in shown
    assert all(word in shown for word in words), shown
    assert not list(tmp_path.glob("results/*"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("toy")
def test_run_writes_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "toy", "STEPS=2", "--out", str(tmp_path), "--name", "mine", "--infinity", "w.yml") == 0
    shown = capsys.readouterr().out
    assert "steps: 2/2" in shown
    assert "best: steps 2, rate 0.500" in shown
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert summary["best"] == {"steps": 2, "rate": 0.5}
    assert read_values(tmp_path / "mine" / "config.yaml")["infinity"] == "w.yml"


@pytest.mark.usefixtures("toy")
def test_run_prints_its_summary_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "toy", "steps=2", "--out", str(tmp_path), "--json")
    assert call(*arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "folder": str(tmp_path / "toy"),
        **json.loads((tmp_path / "toy" / "summary.json").read_text()),
    }
    assert json.loads(printed.out)["best"] == {"steps": 2, "rate": 0.5}
    assert "finished in" in printed.err
    assert call("run", "toy", "fail=true", "--out", str(tmp_path / "other"), "--json") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("toy")
def test_lists_are_json_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*arguments: str) -> Any:
        assert call(*arguments, "--json") == 0, arguments
        return json.loads(capsys.readouterr().out)

    keys = {row["key"]: row for row in asked("run", "toy", "--keys")}
    assert (keys["steps"]["default"], keys["steps"]["allowed"]) == (3, "a whole number")
    assert keys["infinity"]["default"] is None
    names = {row["name"]: row["note"] for row in asked("run")}
    assert set(names) == set(frame.recipe_modules())
    for name, note in names.items():  # read without importing, and yet what the function says
        assert note == (frame.find_recipe(name).function.__doc__ or "").strip().splitlines()[0]
    assert "clusters" in {row["key"] for row in asked("fit", "prototype", "out", "--keys")}
    assert all(row["note"] for row in asked("fit", "linear_act", "out", "--keys"))
    assert "strength" in {row["key"] for row in asked("sweep", "images", "--keys")}
    assert asked("convert", "--kind", "ml-act", "--keys")
    files = asked("grid", str(tmp_path / "setup"), "strength_cond=1,2", "--dry-run")
    assert len(files) == 2
    assert not (tmp_path / "setup").exists()
    found = asked("data", "list", "--folder", str(tmp_path))
    assert found["concepts"]
    assert not any(each["here"] for each in found["data_sets"])


@pytest.mark.usefixtures("toy")
def test_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "toy", "--keys") == 0
    assert "steps=3  (a whole number)" in capsys.readouterr().out.splitlines()
    assert call("grid", "--keys") == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'scales=["all"]  (a list of text)' in lines
    assert "    strengths of the conditional rows." in lines


def test_grid_writes_setup_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "setup"
    assert call("grid", str(folder), "strength_cond=1,2", "layers=all,0-1", "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert not folder.exists()
    assert call("grid", str(folder), "strength_cond=1,2", "layers=all,0-1") == 0
    assert capsys.readouterr().out == f"4 setup files in {folder}\n"
    assert len(list(folder.iterdir())) == 4
    assert call("grid") == 2
    assert call("grid", str(folder / "more"), "layers=9") == 2
    assert not (folder / "more").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_continues(number: int, code: int, tmp_path: Path, root: Path) -> None:
    source = tmp_path / "toy.py"
    source.write_text(RECIPE)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import toy; from pysteer.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "toy", "steps=4", "wait=0.7", "--out", str(tmp_path / "out")]
    started = subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(root)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    )
    marker = tmp_path / "out" / "toy" / "stages" / "step-0.json"
    deadline = time.monotonic() + 60
    while not marker.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(number)
    shown = started.communicate(timeout=30)[0].decode()
    assert started.returncode == code, shown
    folder = tmp_path / "out" / "toy"
    assert not (folder / "summary.json").exists()
    assert not list(folder.rglob("*.tmp*"))
    again = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert again.returncode == 0, again.stderr
    assert "step-0: finished before, skipped" in again.stdout
    assert "step-3: started" in again.stdout
    assert sorted(path.name for path in (folder / "steps").iterdir()) == [f"{i}.json" for i in range(4)]


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pysteer"] == pysteer.__version__
    assert found["packages"]["torch"].startswith("2.")
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert found["backends"]["reference"]["live"]
    for status in found["backends"].values():
        assert status["live"] or status["reason"]
    assert call("env") == 0
    assert "backend reference" in capsys.readouterr().out


def test_capture_and_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.json"
    captions = {word: [f"a {size} {word} circle" for size in ("small", "large")] for word in ("red", "blue")}
    prompts.write_text(json.dumps(captions))
    asked = ["capture", "infinity-shapes", str(tmp_path / "kept"), "--prompts", str(prompts), "--sites", "ca.1,pooled"]
    assert cli.run_command([*asked, "--steps", "1,2", "--pool", "tokens"]) == 0
    assert "4 prompts at 3 places" in capsys.readouterr().out
    both = ["--source", str(tmp_path / "kept"), "--target", str(tmp_path / "kept")]
    labels = ["--source-label", "red", "--target-label", "blue"]
    assert cli.run_command(["fit", "linear_act", str(tmp_path / "fitted"), "support=all", *both, *labels]) == 0
    fitted = pysteer.Fitted.from_pretrained(tmp_path / "fitted")
    assert [(entry.site, entry.steps) for entry in fitted.parameters] == [("pooled", (0,)), ("ca.1", (1, 2))]
    assert fitted.method.config()["support"] == "all"
    capsys.readouterr()
    for words, message in (
        (["fit", "linear_act", str(tmp_path / "x"), "suport=all", *both], "support"),
        (["fit", "nothing", str(tmp_path / "x"), *both], "linear_act"),
        (["fit", "aura", str(tmp_path / "x")], "--source"),
        (["fit", "aura", str(tmp_path / "x"), *both, "--source-label", "green"], "green"),
        ([*asked, "--pool", "median"], "median"),
        ([*asked, "--steps", "one"], "steps"),
        ([*asked, "--positions", "1:x"], "positions"),
    ):
        assert cli.run_command(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("pysteer: ")
        assert message in error
