"""The documentation holds: blocks of code run, commands exist, error messages are those of the code, links lead on."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- test: ([^>]*?) -->\n)?^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MADE = ("recipes.md", "performance.md", "api.md")
# Blocks of the README that are run by hand: real weights, and what scripts/demo.sh and the recipes' tests cover.
_LONG = {"README.md": "the whole generator, minutes on two cores; quickstart.md runs the same in small"}


def blocks(kind):
    """(page, number, mark, text) of every block of a kind."""
    return [
        (page, number, mark, text)
        for page in PAGES
        for number, (mark, found, text) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")))
        if found == kind
    ]


def name_of(block):
    return f"{block[0].name}-{block[1]}"


@pytest.mark.parametrize("block", blocks("python"), ids=name_of)
def test_python_blocks_compile_and_import_what_exists(block):
    tree = ast.parse(block[3])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pysteer"):
            module = __import__(node.module, fromlist=["x"])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def sessions():
    """Blocks that are run, one after the other where they share a session."""
    found = {}
    for page, number, mark, text in blocks("python"):
        if page.name in _LONG or mark.startswith("skip"):
            continue
        found.setdefault((page.name, mark or f"block {number}"), []).append(text)
    return sorted(found.items())


@pytest.mark.parametrize("session", sessions(), ids=lambda session: "-".join(session[0]))
def test_python_blocks_run(session, tmp_path, monkeypatch):
    name, texts = session
    monkeypatch.chdir(tmp_path)
    if "zoo" in name[1]:  # the same program on a generator of random weights: seconds instead of minutes
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_infinity import tiny_pipeline

        from pysteer import zoo

        monkeypatch.setattr(zoo, "load", lambda name: tiny_pipeline())
    names = {}
    for text in texts:
        exec(compile(text, "-".join(name), "exec"), names)


def commands():
    """Every `pysteer ...` command line of the pages."""
    found = []
    for page, number, _, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["pysteer"]:
                found.append((page.name, number, words[1:]))
    return found


@pytest.fixture(scope="module")
def interface():
    import typer.main

    from pysteer import cli

    return typer.main.get_command(cli.app)


def test_commands_and_options_of_the_pages_exist(interface):
    seen = 0
    for page, number, words in commands():
        where = f"{page} block {number}: pysteer {' '.join(words)}"
        if words[0].startswith("--"):
            assert words[0] in {option for each in interface.params for option in each.opts}, where
            continue
        assert words[0] in interface.commands, where
        command = interface.commands[words[0]]
        if hasattr(command, "commands"):
            assert words[1] in command.commands, where
            command = command.commands[words[1]]
        if (command.context_settings or {}).get("ignore_unknown_options"):  # passes its words on
            continue
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, where
                seen += 1
    assert seen > 5


def test_examples_in_the_help_are_commands_with_options_that_exist(interface):
    seen = 0
    for name, command in interface.commands.items():
        for line in (command.help or "").splitlines():
            for example in line.strip().split(", pysteer "):
                words = shlex.split(example.removeprefix("pysteer ")) if line.strip().startswith("pysteer ") else []
                if not words:
                    continue
                assert words[0] == name, example
                known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
                assert [word for word in words if word.startswith("--") and word not in known] == [], example
                seen += 1
    assert seen >= 8


def test_keys_of_recipes_on_the_pages_exist():
    from pysteer.recipes.frame import find_recipe, recipe_modules, resolve_config

    checked = 0
    for _, _, words in commands():
        if words[0] == "run" and len(words) > 1 and words[1] in recipe_modules():
            given = [w for w in words[2:] if "=" in w and not w.startswith("-")]
            resolve_config(find_recipe(words[1]), given)
            checked += 1
    assert checked


def test_bash_blocks_are_correct_shell():
    for page, number, mark, text in blocks("bash"):
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name} block {number}: {done.stderr}"
        if mark.startswith("skip"):
            assert len(mark.partition(",")[2].split()) >= 2, f"{page.name} block {number} is skipped without a reason"


def test_messages_of_the_faq_are_in_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pysteer").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) >= 10
    for heading in headings:
        if "torchvision" in heading:  # a message of torch
            continue
        pieces = [
            piece.strip(" :(),;") for piece in re.split(r"\.\.\.|\bN\b|got NaN or infinity|\(No space.*\)", heading)
        ]
        for piece in (p for p in pieces if len(p) > 3 and p not in ("got",)):
            core = piece.removesuffix(": got").strip()
            assert core in source, f"{heading}: {core!r}"


def test_pages_link_to_what_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")) and target not in _MADE:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_recipe_reference_names_every_key_of_every_recipe():
    import docs_pages

    from pysteer.recipes.config import config_values
    from pysteer.recipes.frame import find_recipe, recipe_modules

    text = docs_pages.recipes_page()
    for name in recipe_modules():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for key in config_values(find_recipe(name).config()):
            assert f"`{key}" in section, f"{name}: {key}"
    for line in text.splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_performance_page_shows_stored_figures_alone():
    import json

    import docs_pages

    text = docs_pages.performance_page()
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert f"## {path.stem}" in text
        stored = json.loads(path.read_text(encoding="utf-8"))
        newest = max(stored if isinstance(stored, list) else [stored], key=lambda result: str(result.get("date", "")))
        assert str(newest.get("date", ""))[:10] in text


def test_methods_page_names_every_method():
    from pysteer.methods import REGISTRY

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in REGISTRY if f"`{name}`" not in text] == []


def test_the_picture_of_the_steering_table_is_that_of_a_table():
    import steering_table_picture

    assert steering_table_picture.TARGET.read_text(encoding="utf-8") == steering_table_picture.draw()
