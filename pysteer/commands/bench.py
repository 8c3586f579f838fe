"""`pysteer bench`: the benchmarks of a checkout; they are not part of the installed package."""

import importlib
import sys
from pathlib import Path
from typing import Any

import typer

from pysteer.errors import InputError

bench_app = typer.Typer(
    name="bench",
    help="Measure what steering costs and achieves, against others (needs a checkout).",
    no_args_is_help=True,
)
app = typer.Typer()
app.add_typer(bench_app)
_ANY: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _module(name: str) -> Any:
    """A module of `bench`, found beside the package of an editable install or in the working folder."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "record.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(f"bench.{name}")
    raise InputError(
        "pysteer bench",
        value="an installed package",
        allowed="a checkout: the benchmarks are not part of the package",
        fix="clone the repository, pip install -e '.[test]' there, and run pysteer bench in it",
    )


def _run(name: str, words: list[str]) -> None:
    try:
        _module(name).main(words)
    except SystemExit as end:  # argparse ends the process for --help and for a wrong option
        raise typer.Exit(end.code if isinstance(end.code, int) else 1 if end.code else 0) from end


@bench_app.command("speed", context_settings=_ANY)
def speed(context: typer.Context) -> None:
    """What steering costs: contenders in processes of their own, in turn (--quick, --part, --rounds, --profile)."""
    _run("speed", context.args)


@bench_app.command("effect", context_settings=_ANY)
def effect(context: typer.Context) -> None:
    """What steering achieves: SteerBench (--quick, --generator, --concept, --method, --limit)."""
    _run("effect", context.args)


@bench_app.command("compare", context_settings=_ANY)
def compare(context: typer.Context) -> None:
    """Regressions beyond the noise between two stored results: speed -2 -1, or two files."""
    _run("compare", context.args)


@bench_app.command("table", context_settings=_ANY)
def table(context: typer.Context) -> None:
    """Write the stored results into the documentation, or with --check say where it disagrees."""
    _run("docs", context.args)
