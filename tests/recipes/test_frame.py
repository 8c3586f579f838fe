"""Typed configuration, run folders, stages, progress."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import pytest
import torch
from rich.console import Console

from pysteer.errors import InputError
from pysteer.recipes import Run, Summary, execute, frame, recipe
from pysteer.recipes.config import build_config, config_hash, config_yaml, merge_values, parse_words, read_values
from pysteer.recipes.folder import locked
from pysteer.recipes.progress import Progress, clock_text, rate_text


class Mode(Enum):
    fast = "fast"
    exact = "exact"


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    scale: float = 3.0
    on: bool = False
    title: str = "title"
    folder: Path | None = None
    distance: Literal["euclidean", "mahalanobis"] = "euclidean"
    mode: Mode = Mode.exact
    strengths: tuple[float, ...] = (0.0, 1.0)
    layers: list[int] = field(default_factory=lambda: [-1])
    weights: dict[str, float] = field(default_factory=dict)
    part: Part = Part()
    either: int | str = 1


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("seed=7", "seed", 7),
        ("SEED=7.0", "seed", 7),
        ("scale=1e-3", "scale", 1e-3),
        ("scale=4", "scale", 4.0),
        ("on=true", "on", True),
        ("on=0", "on", False),
        ("title=12", "title", "12"),
        ("title=a: b=[c", "title", "a: b=[c"),
        ("title=off", "title", "off"),
        ("title=", "title", ""),
        ("folder=a/b", "folder", Path("a/b")),
        ("folder=", "folder", None),
        ("DISTANCE=MAHALANOBIS", "distance", "mahalanobis"),
        ("mode=FAST", "mode", Mode.fast),
        ("strengths=[1,2.5]", "strengths", (1.0, 2.5)),
        ("strengths=1,2.5", "strengths", (1.0, 2.5)),
        ("strengths=2", "strengths", (2.0,)),
        ("layers=[]", "layers", []),
        ("weights={a: 1}", "weights", {"a": 1.0}),
        ("either=3", "either", 3),
        ("either=x", "either", "x"),
        ("part.rate=0.25", "part", Part(rate=0.25)),
        ("part.names=[x,y]", "part", Part(names=("x", "y"))),
        ("part={rate: 2}", "part", Part(rate=2.0)),
    ],
)
def test_words_become_typed_values(word: str, name: str, value: Any) -> None:
    config = build_config(Config, parse_words([word]))
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert config != Config() or value == getattr(Config(), name)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("seed=1.5", ["seed", "1.5", "a whole number"]),
        ("seed=true", ["seed", "true"]),
        ("seed=", ["seed"]),
        ("scale=nan", ["scale", "nan", "finite"]),
        ("scale=inf", ["scale", "finite"]),
        ("on=maybe", ["on", "maybe", "true or false"]),
        ("distance=cosine", ["distance", "cosine", "euclidean, mahalanobis"]),
        ("mode=slow", ["mode", "slow", "fast, exact"]),
        ("strengths=[1,x]", ["strengths[1]", "x"]),
        ("part.rat=1", ["part.rat", "did you mean part.rate?"]),
        ("part=3", ["part", "3"]),
        ("sede=1", ["sede", "seed", "strengths"]),
        ("=1", ["=1", "key=value"]),
    ],
)
def test_wrong_words_are_one_line(word: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build_config(Config, parse_words([word]))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in words), caught.value


def test_required_key() -> None:
    @dataclass(frozen=True)
    class Needs:
        name: str

    with pytest.raises(InputError, match="missing key: got 'name'"):
        build_config(Needs, {})


def test_file_then_words(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(
        "SCALE: 2\nTITLE: shapes\nPART:\n  RATE: 0.1\n  names: [p, q]\nfolder:\nseed: ${scale}\n".replace(
            "${scale}", "9"
        )
    )
    values = merge_values(read_values(path), parse_words(["part.rate=0.2"]))
    config = build_config(Config, values)
    assert config == Config(seed=9, scale=2.0, title="shapes", part=Part(0.2, ("p", "q")))
    assert build_config(Config, {"title": None}).title == ""
    assert build_config(Config, read_values_from_text(config_yaml(config), tmp_path)) == config


def read_values_from_text(text: str, folder: Path) -> dict[str, Any]:
    (folder / "again.yaml").write_text(text)
    return read_values(folder / "again.yaml")


@pytest.mark.parametrize("content", ["a: [1", "- a\n- b\n", b"\xff\x00"])
def test_bad_file_is_one_line(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_values(path)
    assert "config.yml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hash_depends_on_values_only() -> None:
    assert config_hash(Config()) == config_hash(Config(seed=0))
    assert config_hash(Config()) != config_hash(Config(seed=1))
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Register the recipe "toy" and yield the list of what it did."""
    done: list[str] = []

    @recipe("toy", Config, prepare=lambda values, folder: {**values, "folder": str(folder)})
    def run(config: Config, run: Run) -> Summary:
        """A toy."""
        with run.stage("first") as stage:
            if not stage.done:
                done.append("first")
                stage.notes["drawn"] = torch.rand(()).item()
        with run.stage("second", inputs=stage.notes) as second:
            if not second.done:
                done.append("second")
                if config.title == "crash":
                    raise RuntimeError("crash")
                run.write_text("second.txt", "written")
        return Summary(best={"drawn": stage.notes["drawn"]}, tables={"t": [{"x": 1}]})

    yield done
    del frame.RECIPES["toy"]


def go(tmp_path: Path, *words: str, **more: Any) -> Path:
    console = Console(file=io.StringIO())
    return execute("toy", words, out=tmp_path / "results", console=console, **more)[0]


def test_run_folder_and_resume(calls: list[str], tmp_path: Path) -> None:
    folder = go(tmp_path, "seed=5")
    assert folder == tmp_path / "results" / "toy"
    assert calls == ["first", "second"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["recipe"] == summary["name"] == "toy"
    assert summary["tables"] == {"t": [{"x": 1}]}
    assert (folder / "tables" / "t.csv").read_text() == "x\n1\n"
    assert "seed: 5" in (folder / "config.yaml").read_text()
    assert "second: finished" in (folder / "log.txt").read_text()
    assert go(tmp_path, "seed=5") == folder
    assert calls == ["first", "second"]
    assert json.loads((folder / "summary.json").read_text())["best"] == summary["best"]


def test_same_seed_same_draws(calls: list[str], tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        folder = go(tmp_path, f"seed={seed}", run_name=name)
        drawn.append(json.loads((folder / "summary.json").read_text())["best"]["drawn"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_configuration_is_refused(calls: list[str], tmp_path: Path) -> None:
    folder = go(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"scale: 3.0 there, 4.0 now.*--name.*--overwrite"):
        go(tmp_path, "scale=4")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert go(tmp_path, "scale=4", run_name="other").name == "other"
    go(tmp_path, "scale=4", overwrite=True)
    assert "scale: 4.0" in (folder / "config.yaml").read_text()
    assert len(calls) == 6


def test_crash_keeps_finished_stages(calls: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="crash"):
            go(tmp_path, "title=crash")
    assert calls == ["first", "second", "second"]
    folder = tmp_path / "results" / "toy"
    assert not (folder / "summary.json").exists()
    assert "RuntimeError: crash" in (folder / "log.txt").read_text()


def test_foreign_folder_is_left_alone(calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "results" / "toy").mkdir(parents=True)
    (tmp_path / "results" / "toy" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        go(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in the way"):
        execute("toy", out=tmp_path / "file", console=Console(file=io.StringIO()))
    assert calls == []
    assert [path.name for path in (tmp_path / "results" / "toy").iterdir()] == ["thesis.txt"]


def test_folder_is_held_by_one_process(calls: list[str], tmp_path: Path) -> None:
    folder = go(tmp_path)
    with locked(folder), pytest.raises(InputError, match="in use by another process"):
        go(tmp_path)


def test_leftovers_of_a_killed_process_go(calls: list[str], tmp_path: Path) -> None:
    folder = go(tmp_path)
    (folder / ".second.0123456789ab.tmp.txt").write_text("half")
    go(tmp_path)
    assert not list(folder.rglob("*.tmp*"))
    assert (folder / "second.txt").read_text() == "written"


def test_config_file_is_prepared(calls: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("SEED: 3\n")
    folder = go(tmp_path, "seed=4", config_file=tmp_path / "c.yml", values={"scale": 9})
    resolved = (folder / "config.yaml").read_text()
    assert f"folder: {tmp_path}" in resolved
    assert "seed: 4" in resolved
    assert "scale: 9.0" in resolved


def test_run_writers_and_seeds(tmp_path: Path) -> None:
    run = Run("toy", Config(seed=3), tmp_path, console=Console(file=io.StringIO()))
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    assert run.write_figure("figures/line.png", figure).stat().st_size > 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["line.csv", "line.png", "line.svg"]
    assert run.write_figure("figures/line.pdf", figure).read_bytes().startswith(b"%PDF")
    plt.close(figure)
    with pytest.raises(InputError, match="inside the run folder"):
        run.write_text("../outside.txt", "x")
    assert run.derive_seed("a", 1) == run.derive_seed("a", 1) != run.derive_seed("a", 2)
    assert 0 <= run.derive_seed("a") < 2**63
    run.close()


def test_progress_lines_tell_rate_and_time_left() -> None:
    stream = io.StringIO()
    progress = Progress(Console(file=stream, width=200), every=0.0)
    assert list(progress([1, 2, 3], "images")) == [1, 2, 3]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("images: 1/3, ")
    assert "/s" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("images: 3/3, ")


def test_progress_follows_a_task_that_counts_by_itself() -> None:
    stream = io.StringIO()
    with Progress(Console(file=stream, width=200), every=0.0).follow("fit") as show:
        show(1, 2)
        show(2, 2)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["fit: 1/2", "fit: 2/2"]


def test_progress_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(Console(file=stream, force_terminal=True, width=120))
    with progress.task("images", 4) as advance:
        advance(4)
    assert "4/4" in stream.getvalue()


def test_times_in_words() -> None:
    assert [clock_text(value) for value in (0.2, 59, 61, 3725)] == ["0 s", "59 s", "1:01", "1:02:05"]
    assert [rate_text(10, 4), rate_text(1, 4), rate_text(0, 4)] == ["2.5/s", "4.0 s each", ""]


@dataclass(frozen=True)
class HowAndWhat:
    amount: int = 1
    workers: int = field(default=1, metadata={"identity": False})


def test_fields_that_say_how_and_not_what_leave_the_folder_to_the_same_run(tmp_path):
    seen = []

    def run(config, run):
        with run.stage("work") as stage:
            seen.append((config.workers, stage.done))
        return Summary()

    recipe("how-and-what", HowAndWhat)(run)
    for words in (["workers=1"], ["workers=3"]):
        execute("how-and-what", words, out=tmp_path, console=Console(file=io.StringIO()))
    assert seen == [(1, False), (3, True)]
    with pytest.raises(InputError, match="another run"):
        execute("how-and-what", ["amount=2"], out=tmp_path, console=Console(file=io.StringIO()))
