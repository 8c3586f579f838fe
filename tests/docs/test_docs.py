"""The documentation holds: blocks of code run, commands exist, error messages are those of the code, links lead on."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- test: ([^>]*?) -->\n)?^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MADE = ("recipes.md", "performance.md", "api.md")


def blocks(kind):
    """(page, number, mark, text) of every block of a kind."""
    return [
        (page, number, mark, text)
        for page in PAGES
        for number, (mark, found, text) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")))
        if found == kind
    ]


def short(page):
    """The page below docs/, or README.md."""
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def name_of(block):
    return f"{short(block[0])}-{block[1]}"


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
        if mark.startswith("skip"):
            continue
        found.setdefault((short(page), mark or f"block {number}"), []).append(text)
    for (page, mark), texts in list(found.items()):
        before = mark.partition(", after ")
        if before[1]:  # goes on where a block of another page ended
            found[page, mark] = [*found[before[2], before[0]], *texts]
    return sorted(found.items())


def stand_in(mark, folder, monkeypatch):
    """Small models in the place of those that a page names: seconds instead of minutes, and nothing to download.

    Returns names that the block takes as given.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    if "zoo" in mark:
        from tiny_infinity import tiny_pipeline

        from pysteer import zoo

        monkeypatch.setattr(zoo, "load", lambda name: tiny_pipeline())
    if "tiny language model" in mark:
        from tiny_text import save_tiny_model

        import pysteer
        from pysteer.models import language

        place = save_tiny_model(folder / "lm")
        monkeypatch.setattr(language, "smollm2", lambda: language.LanguageModel.from_pretrained(place))
        return {"pysteer": pysteer}  # imported by the block before
    if "adapters" in mark:
        pytest.importorskip("diffusers")
        shutil.copytree(ROOT / "examples" / "weightspace" / "collection", folder / "collection")
    if "tiny pipeline" in mark:
        pytest.importorskip("diffusers")
        import tiny_diffusion

        tiny_diffusion.stable_diffusion().save_pretrained(folder / "path or name")
        texts = {"source_prompts": [f"a red dot {i}" for i in range(8)], "target_prompts": ["a blue dot"] * 8}
        return {**texts, "prompts": ["a red dot"]}
    return {}


@pytest.mark.parametrize("session", sessions(), ids=lambda session: "-".join(session[0]))
def test_python_blocks_run(session, tmp_path, monkeypatch):
    name, texts = session
    monkeypatch.chdir(tmp_path)
    names = stand_in(name[1], tmp_path, monkeypatch)
    for text in texts:
        exec(compile(text, "-".join(name), "exec"), names)


def files_for(mark, folder):
    """What a user would have: a model of one's own, and the files that a block of commands names."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    if "language" in mark:
        from tiny_text import save_tiny_model, sentences

        save_tiny_model(folder / "path/to/model")
        for name, about in (("plain", ""), ("football", "ball"), ("prompts", "")):
            lines = sentences(2 if name == "prompts" else 12, about, seed=1)
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    if "pipeline" in mark:
        pytest.importorskip("diffusers")
        import tiny_diffusion

        pipe = tiny_diffusion.stable_diffusion()
        pipe.save_pretrained(folder / "path/to/model")
        maps = folder / "path/to/ml-act-folder"
        maps.mkdir()
        name, norm = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("transformer_blocks.0.norm1"))
        width = norm.weight.numel()
        limits = {"q_0_100": [torch.full((width,), -50.0), torch.full((width,), 50.0)]}
        held = {"net.w1": torch.full((1, width), 2.0), "net.b1": torch.ones(1, width), "quantiles_dict_src": limits}
        torch.save(held, maps / f"unet.{name}:0.statedict")
        (folder / "prompts.txt").write_text("a red dot\n")


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks("bash") if b[2].startswith("commands")], ids=name_of)
def test_blocks_of_commands_run_one_after_the_other(block, tmp_path, monkeypatch, capsys):
    from pysteer import cli
    from pysteer.sweep.query import query

    files_for(block[2], tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in block[3].replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[1:2] == ["inspect"]:  # serves until it is stopped; tests/app opens its pages
            continue
        # The tiny model has three blocks; a picture takes it some steps less, a fit some pairs less.
        small = [word.replace("block.10", "block.1") for word in words[1:]]
        if small[:2] == ["sweep", "images"]:
            small += ["fit_pairs=8"] if "pair=red->blue" in small else ["settings={num_inference_steps: 2}"]
        assert cli.run_command(small) == 0, f"{line}: {capsys.readouterr().err}"
    store = next(path.parent for path in tmp_path.glob("results/*/sweep.json"))
    made = "text" if "language" in block[2] else "image"
    _, rows, _ = query(f"select status, strength, {made} from cells order by key", [store])
    assert {status for status, _, _ in rows} == {"ok"}
    plain, steered = ({found for _, s, found in rows if (s > 0) == on} for on in (False, True))
    assert plain
    assert steered - plain


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


def leaves(group, path=()):
    """Path and command of everything that can be called."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_help_has_examples_whose_options_exist(interface):
    for path, command in leaves(interface):
        if path[0] == "bench":  # their own help has them
            continue
        lines = [line for line in (command.help or "").splitlines() if line.startswith("  pysteer ")]
        assert lines, f"pysteer {' '.join(path)} --help has no example"
        known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        required = sum(each.required for each in command.params if each.param_type_name == "argument")
        for line in lines:
            words = shlex.split(line)[1:]
            assert tuple(words[: len(path)]) == path, line
            own = words[len(path) :]
            assert [word for word in own if word.startswith("-") and word not in known] == [], line
            assert sum(not word.startswith("-") for word in own) >= required, line


def test_examples_of_the_help_stand_on_lines_of_their_own():
    from typer.testing import CliRunner

    from pysteer import cli

    shown = CliRunner().invoke(cli.app, ["run", "--help"], env={"COLUMNS": "100"}).output.splitlines()
    assert "pysteer run methods generator=diffusion-shapes" in [line.strip() for line in shown]


def test_a_missing_module_is_answered_with_the_extra_that_brings_it():
    import tomllib

    from pysteer import cli

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {"sklearn": "scikit-learn"}
    for module, extra in cli.EXTRAS.items():
        named = [re.split(r"[<>=\[;]", line)[0] for line in extras[extra]]
        assert packages.get(module, module) in named, f"{module} is not in the extra {extra}"


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


def test_pages_of_recipes_name_every_key():
    import docs_pages

    from pysteer.recipes.config import config_values
    from pysteer.recipes.frame import find_recipe, recipe_modules

    overview = docs_pages.recipes_page()
    for name in recipe_modules():
        assert f"(recipes/{name}.md)" in overview
        text = (ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")
        for key in config_values(find_recipe(name).config()):
            assert f"`{key}" in text, f"{name}: {key}"
        for line in text.splitlines():
            if line.startswith("| `"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_performance_page_shows_stored_figures_and_how_to_measure_them():
    import json

    import docs_pages

    text = docs_pages.performance_page()
    from bench.performance import MEASURED

    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert path.stem in MEASURED, f"say in bench/performance.py what {path.name} is"
        part = text.partition(f"`bench/results/{path.stem}.json`")[2].partition("\n## ")[0]
        newest = max(json.loads(path.read_text(encoding="utf-8")), key=lambda result: str(result.get("date", "")))
        assert str(newest["date"])[:10] in part, path.stem
        in_words = path.stem == "sweep_size"  # few enough for sentences
        assert "\n|---" in part or (in_words and "cells are planned" in part), f"{path.stem} shows no figures"


def test_commands_of_the_performance_page_exist(interface):
    sys.path.insert(0, str(ROOT))
    from bench.performance import MEASURED

    for name, entry in MEASURED.items():
        words = entry.command.split()
        if words[0] == "pysteer":
            assert words[1] in interface.commands, name
        else:
            assert words[:2] == ["python", "-m"], name
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), name
        assert not entry.page or (ROOT / "docs" / entry.page).is_file(), name


def test_methods_page_names_every_method():
    from pysteer.methods import REGISTRY

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in REGISTRY if f"[`{name}`](methods/{name}.md)" not in text] == []


def families():
    from pysteer.families import base

    with pytest.raises(base.InputError):
        base.find_family(object())  # imports all of them
    return [family.name for family in base._FAMILIES if family.__class__.__module__.startswith("pysteer.")]


def test_every_method_family_and_recipe_has_a_page_in_the_menu_that_is_not_stale():
    import docs_blocks

    from pysteer.methods import REGISTRY
    from pysteer.recipes import recipe_modules

    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    wanted = {
        ("method", "methods"): REGISTRY,
        ("family", "families"): families(),
        ("recipe", "recipes"): recipe_modules(),
    }
    for (kind, folder), names in wanted.items():
        pages = sorted(path.stem for path in (ROOT / "docs" / folder).glob("*.md"))
        assert pages == sorted(names), folder
        for name in pages:
            text = (ROOT / "docs" / folder / f"{name}.md").read_text(encoding="utf-8")
            assert f"<!-- made: {kind} {name} -->" in text
            assert docs_blocks.fill(text) == text, f"{folder}/{name}.md is stale: python scripts/docs_blocks.py write"
            assert f"- {folder}/{name}.md\n" in menu
            if kind != "recipe":
                assert "## Example" in text
                assert len(text.partition("raps\n")[2].strip()) > 100  # what goes wrong, said by hand


def test_a_page_that_is_stale_is_found(tmp_path, monkeypatch, capsys):
    import docs_blocks

    page = tmp_path / "docs" / "methods" / "aura.md"
    page.parent.mkdir(parents=True)
    kept = (ROOT / "docs" / "methods" / "aura.md").read_text(encoding="utf-8")
    page.write_text(kept.replace("AUROC is above 0.5", "AUROC is above 0.4"), encoding="utf-8")
    monkeypatch.setattr(docs_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(docs_blocks, "DOCS", tmp_path / "docs")
    assert docs_blocks.main("check") == 1
    assert capsys.readouterr().out == "stale: docs/methods/aura.md\n"
    assert docs_blocks.main("write") == 0
    assert page.read_text(encoding="utf-8") == kept
    assert docs_blocks.main("check") == 0


def test_the_site_shows_notebooks_and_no_link_that_leaves_it():
    import docs_pages

    text = docs_pages.site_page((ROOT / "docs" / "recipes" / "sae.md").read_text(encoding="utf-8"), "recipes/sae.md")
    assert "](../notebooks/sae.ipynb)" in text
    assert 'execute("sae", words' in text
    for page in PAGES[1:]:
        shown = docs_pages.site_page(page.read_text(encoding="utf-8"), short(page))
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", shown):
            if not target.startswith(("http", "mailto:")) and "notebooks/" not in target:
                assert (page.parent / target).resolve().is_relative_to(ROOT / "docs"), f"{short(page)}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("material", "mkdocstrings", "mkdocs"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("methods/prototype", "families/diffusers", "recipes/sae", "recipes", "api", "performance"):
        assert (tmp_path / "site" / f"{name}.html").stat().st_size > 5000


def test_the_picture_of_the_steering_table_is_that_of_a_table():
    import steering_table_picture

    assert steering_table_picture.TARGET.read_text(encoding="utf-8") == steering_table_picture.draw()
