"""Pages of the documentation that are made from the code: a hook of mkdocs, and a command that prints them.

python scripts/docs_pages.py recipes | performance | api

Parts of pages that are kept (methods, families, recipes) are made by `docs_blocks.py`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def recipes_page() -> str:
    """All recipes with what they do, and the way to the page and the notebook of each."""
    sys.path.insert(0, str(ROOT))
    from pysteer.recipes.frame import recipe_notes

    parts = [
        "# Recipes",
        "A recipe is a whole experiment. `pysteer run NAME key=value ...` runs it, `pysteer run NAME --keys` lists its "
        "keys, and the same command continues a run that was interrupted; `--json` prints the summary for a program. "
        "Every page has all keys, and the recipe in small as a notebook.",
        "| recipe | what it does |\n|---|---|\n"
        + "\n".join(f"| [{name}](recipes/{name}.md) | {note} |" for name, note in sorted(recipe_notes().items())),
    ]
    return "\n\n".join(parts) + "\n"


def performance_page() -> str:
    """What is stored in bench/results, with the machine and versions it was measured on."""
    sys.path.insert(0, str(ROOT))
    from bench.performance import page

    return page()


_PUBLIC = (
    "pysteer.steer", "pysteer.fit", "pysteer.Examples", "pysteer.Fitted", "pysteer.Plan", "pysteer.SiteParameters",
    "pysteer.Site", "pysteer.bake", "pysteer.bake_lora", "pysteer.InputError",
)  # fmt: skip


def api_page() -> str:
    """The public names with their docstrings, by mkdocstrings."""
    sys.path.insert(0, str(ROOT))
    import pysteer

    parts = ["# API", "What `import pysteer` offers. Internal modules carry their own docstrings."]
    for name in _PUBLIC:
        found = getattr(pysteer, name.partition(".")[2])
        parts.append(f"::: {found.__module__}.{found.__qualname__}")
    return "\n\n".join(parts) + "\n"


PAGES = {"recipes": recipes_page, "performance": performance_page, "api": api_page}


NOTEBOOKS = ROOT / "examples" / "notebooks"


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages that are made here, and the notebooks to load down."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, f"{name}.md", content=make()))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for every page: make its parts again, show its notebook, mend links that leave the folder."""
    return site_page(markdown, page.file.src_uri)


def site_page(markdown: str, source: str) -> str:
    """What the site shows of the page `source`, a path below docs/."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import docs_blocks

    text = docs_blocks.fill(markdown)
    folder, name = Path(source).parent, Path(source).stem
    if folder.name == "recipes":
        text = text.replace("\n## Keys\n", f"{notebook_part(name)}\n## Keys\n")

    def mend(link: re.Match[str]) -> str:
        place = (ROOT / "docs" / folder / link[2]).resolve()
        if place.is_relative_to(ROOT / "docs") or not place.exists():
            return link[0]
        if place.parent == NOTEBOOKS:
            return f"[{link[1]}]({'../' * len(folder.parts)}notebooks/{place.name})"
        return f"{link[1]} (`{place.relative_to(ROOT)}` of the repository)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:)([^)#\s]+)\)", mend, text)


def notebook_part(name: str) -> str:
    """The cells of the notebook of a recipe as Markdown, its headings and its own links left out."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = ["\n\n## The notebook"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
        elif not source.startswith("`examples/"):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", source)
            parts.append("\n".join(line for line in plain.splitlines() if not line.startswith("#")).strip())
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked not in PAGES:
        sys.exit(f"say which page: {', '.join(PAGES)}")
    print(PAGES[asked](), end="")
