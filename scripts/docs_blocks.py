"""The parts of the pages of methods, families and recipes that are made from the code.

python scripts/docs_blocks.py write | check

A page holds `<!-- made: KIND NAME -->` ... `<!-- /made -->`; what stands between is replaced. The build of the site
does the same, and a test fails where a page that is kept says something else.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"<!-- made: (\w+) ([\w-]+) -->\n.*?<!-- /made -->", re.DOTALL)
_MEANING = {
    "pairs": "pairs (same noise, prompts that differ in one word)",
    "unpaired": "unpaired sets",
    "negatives": "negatives that stay as they are",
    "moments": "stored means and variances alone (`pysteer capture --moments`)",
}


def method_block(name: str) -> str:
    """Formula and paper from the docstring, what the method is fitted from as tried out, and its options."""
    from pysteer.methods import REGISTRY

    kind = REGISTRY[name]
    prose = re.split(r"^(?:Args|Attributes):\n", inspect.getdoc(kind) or "", maxsplit=1, flags=re.MULTILINE)[0]
    method = _made(kind)
    takes = [_MEANING[what] for what, works in _accepts(method).items() if works]
    tensors = ", ".join(f"`{key}` {_shape(shape)}" for key, shape in method.shapes.items())
    facts = [
        f"- Fitted from: {'; '.join(takes) or 'nothing, its parameters are given'}.",
        f"- Op with the default options: [`{method.op}`](../ops.md), per parameter set {tensors}.",
        f"- Folds into the weights (`pysteer.bake`): {_folds(method)}.",
    ]
    return "\n\n".join([f"`pysteer.methods.{kind.__name__}`", _spaced(prose.strip()), "\n".join(facts), _options(kind)])


def _spaced(prose: str) -> str:
    """Markdown wants an empty line before a list that follows a paragraph."""
    return re.sub(r"^(?!- | |\n)(.+)\n(?=- )", r"\1\n\n", prose, flags=re.MULTILINE)


def _made(kind: Any) -> Any:
    if kind.name != "sae_steering":
        return kind()
    import torch

    from pysteer.models.sae import SparseAutoencoder

    decoder = torch.eye(16)
    return kind(sae=SparseAutoencoder(decoder.clone(), torch.zeros(16), decoder, torch.zeros(16), "topk", 4))


def _sets() -> tuple[Any, Any, Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    source, noise, negatives = (torch.randn(12, 5, 16, generator=draw) for _ in range(3))
    return source + 1, source + 0.3 * noise + torch.linspace(-1, 2, 16), negatives


def _accepts(method: Any) -> dict[str, bool]:
    """What a fit takes, found out by asking it."""
    from pysteer.errors import InputError
    from pysteer.methods import VectorSteering
    from pysteer.ops.channel_moments import ChannelMoments, channel_moments

    source, target, negatives = _sets()
    tries = {
        "pairs": lambda: method.fit_site(source, target),
        "unpaired": lambda: method.fit_site(source, target, paired=False),
        "negatives": lambda: method.fit_site(source, target, negatives=negatives),
        "moments": lambda: method.fit_moments(*(ChannelMoments.of(channel_moments(x)) for x in (source, target))),
    }
    found = {}
    for what, attempt in tries.items():
        try:
            attempt()
        except InputError:
            found[what] = False
        else:
            found[what] = not isinstance(method, VectorSteering)
    return found


def _folds(method: Any) -> str:
    """ "yes", or why the weights cannot hold it."""
    import torch

    import pysteer
    from pysteer.errors import InputError
    from pysteer.methods import VectorSteering
    from pysteer.steering.folding.maps import map_of

    source, target, _ = _sets()
    given = isinstance(method, VectorSteering)
    fit = method.given(torch.ones(16), 0.0) if given else method.fit_site(source, target)
    banks = {key: tensor[None] for key, tensor in fit.tensors.items()}
    entry = pysteer.SiteParameters("here", method.op, None, banks, dict(fit.options), dict(fit.shared))
    try:
        map_of(pysteer.Plan.build([entry]).entries[0], steps=1, strength=1.0, both=False)
    except InputError as error:
        words = re.search(rf"'{method.op}: (.*?)'; allowed: .*?; fix: (.*)", " ".join(str(error).split()))
        return f"no: {words[1].replace(f'because of {method.op}', 'it is not linear')}; {words[2]}" if words else "no"
    return "yes, with the default options"


def _shape(shape: tuple[str, ...]) -> str:
    return "`[" + ", ".join(shape) + "]`"


def _options(kind: type) -> str:
    from pysteer.recipes.config import describe_fields

    rows = describe_fields(kind)
    if not rows:
        return "No options."
    return table(["option", "default", "values", "meaning"], [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> list[str]:
    default = row["default"]
    shown = "" if default in (None, "") else f"`{default if isinstance(default, str) else json.dumps(default)}`"
    return [f"`{row['key']}`", shown, row["allowed"], row["note"]]


def _cell(text: str) -> str:
    """Text for a cell: bars and angle brackets are escaped, bars in code as entities, which every reader takes."""

    def code(found: re.Match[str]) -> str:
        return f"<code>{found[1].replace('<', '&lt;').replace('|', '&#124;')}</code>" if "|" in found[1] else found[0]

    parts = re.split(r"(`[^`]*`)", text)
    plain = [p if p.startswith("`") else p.replace("|", "\\|").replace("<", "&lt;") for p in parts]
    return "".join(re.sub(r"^`([^`]*)`$", code, part) for part in plain)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def family_block(name: str) -> str:
    """What the module of the family says about its sites, rows and clock."""
    module = importlib.import_module(f"pysteer.families.{name}")
    text = inspect.getdoc(module) or ""
    kind = next(
        found
        for found in vars(module).values()
        if inspect.isclass(found) and getattr(found, "name", None) == name and found.__module__ == module.__name__
    )
    return f"{inspect.getdoc(kind)}\n\n{_spaced(text)}"


def recipe_block(name: str) -> str:
    """What a recipe does, its notebook, and every key with type, default and note."""
    from pysteer.recipes.config import describe_fields
    from pysteer.recipes.frame import find_recipe

    found = find_recipe(name)
    module = inspect.getdoc(inspect.getmodule(found.function)) or ""
    words = re.sub(r"^Recipe `[\w-]+`: (.)", lambda start: start[1].upper(), module)
    notebook = f"Small, as a notebook: [`examples/notebooks/{name}.ipynb`](../../examples/notebooks/{name}.ipynb)."
    rows = [_row(row) for row in describe_fields(found.config)]
    run = f"```text\npysteer run {name}\npysteer run {name} --keys    # the table below, from the command line\n```"
    return "\n\n".join([words, run, notebook, "## Keys", table(["key", "default", "values", "meaning"], rows)])


MAKERS = {"method": method_block, "family": family_block, "recipe": recipe_block}


def fill(text: str) -> str:
    """A page with its made parts made again."""
    sys.path.insert(0, str(ROOT))
    return _BLOCK.sub(lambda m: f"<!-- made: {m[1]} {m[2]} -->\n{MAKERS[m[1]](m[2]).strip()}\n<!-- /made -->", text)


def pages() -> list[Path]:
    """The pages that have made parts."""
    return [path for path in sorted(DOCS.rglob("*.md")) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def main(asked: str) -> int:
    """Write all pages, or only say which are stale."""
    if asked not in ("write", "check"):
        print("say write or check", file=sys.stderr)
        return 2
    stale = [path for path in pages() if fill(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{'written' if asked == 'write' else 'stale'}: {path.relative_to(ROOT)}")
        if asked == "write":
            path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    return int(asked == "check" and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
