"""The frame every experiment runs in: registry of recipes, run folder, stages that resume, seeds, summary.

A recipe is one file in this folder:

    @dataclass(frozen=True)
    class Config:
        seed: int = 0
        prompts: int = 300

    @recipe("my-recipe", Config)
    def run(config: Config, run: Run) -> Summary:
        '''One line that `pysteer run --help` shows.'''
        with run.stage("baseline") as stage:
            if not stage.done:
                run.write_json("baseline.json", ...)
        return Summary(best={...})
"""

import ast
import dataclasses
import hashlib
import importlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pysteer
from pysteer import files
from pysteer.errors import InputError, did_you_mean
from pysteer.recipes.config import (
    build_config,
    config_hash,
    config_values,
    config_yaml,
    identity_values,
    merge_values,
    parse_words,
    read_values,
)
from pysteer.recipes.flat import csv_text, flat_rows
from pysteer.recipes.folder import claim_folder, has_results, locked, marked
from pysteer.recipes.log import close_log, open_log
from pysteer.recipes.progress import Progress, clock_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

_DECLARED = re.compile(r"^@recipe\(\s*[\"']([a-z0-9-]+)[\"']", re.MULTILINE)

Prepare = Callable[[dict[str, Any], Path], dict[str, Any]]


@dataclasses.dataclass
class Summary:
    """What a run found out; written to `summary.json`.

    Attributes:
        best: the best setting and its figures (`target_rate`, `kept_rate` and the like).
        headline: the headline figures, with their intervals.
        tables: further tables by name, each a list of rows.
    """

    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    headline: dict[str, Any] = dataclasses.field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A registered experiment: its name, its configuration and the function that runs it."""

    name: str
    config: type
    function: Callable[[Any, "Run"], Summary]
    prepare: Prepare | None = None


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str, config: type, *, prepare: Prepare | None = None
) -> Callable[[Callable[[Any, "Run"], Summary]], Callable[[Any, "Run"], Summary]]:
    """Register the decorated `run(config, run) -> Summary` as the recipe `name`.

    Args:
        name: the name on the command line.
        config: a frozen dataclass with a default for every field.
        prepare: called as `prepare(values, folder)` with the values of a `--config` file (keys in lower case) and the
            folder of that file; returns values the dataclass takes. For files in the format of other programs.
    """

    def register(function: Callable[[Any, "Run"], Summary]) -> Callable[[Any, "Run"], Summary]:
        RECIPES[name] = Recipe(name, config, function, prepare)
        return function

    return register


def recipe_modules() -> dict[str, str]:
    """Name -> module of every recipe, read from the files of this folder without importing them."""
    found = {}
    for source in sorted(Path(__file__).parent.glob("*.py")):
        for name in _DECLARED.findall(source.read_text(encoding="utf-8")):
            found[name] = f"pysteer.recipes.{source.stem}"
    return found


def recipe_notes() -> dict[str, str]:
    """Name -> first line of the docstring of every recipe, read from the files of this folder: nothing is imported."""
    found = {}
    for source in sorted(Path(__file__).parent.glob("*.py")):
        text = source.read_text(encoding="utf-8")
        if not _DECLARED.search(text):
            continue
        for node in ast.parse(text).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "recipe":
                    first = mark.args[0]
                    assert isinstance(first, ast.Constant)
                    assert isinstance(node, ast.FunctionDef)
                    found[str(first.value)] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def find_recipe(name: str) -> Recipe:
    """Import and return the recipe `name`.

    Raises:
        InputError: there is no such recipe.
    """
    modules = recipe_modules()
    if name not in RECIPES and name in modules:
        importlib.import_module(modules[name])
    if name not in RECIPES:
        known = sorted({*modules, *RECIPES})
        raise InputError("unknown recipe", value=name, allowed=", ".join(known), fix=did_you_mean(name, known))
    return RECIPES[name]


class Stage:
    """One part of a run. `done`: it was finished before, with the same configuration and inputs; skip it.

    Attributes:
        name: its name.
        done: True when its results are already in the folder.
        notes: small plain values, kept in the marker; what was put in when the stage ran is there when it is skipped.
    """

    def __init__(self, name: str, done: bool, notes: dict[str, Any]) -> None:
        self.name = name
        self.done = done
        self.notes = notes


class Run:
    """One run of a recipe: its folder, log, progress, seeds, stages and writers.

    A folder belongs to one configuration. Running the same one again continues where it stopped.

    Attributes:
        folder: the run folder.
        config: the configuration.
        log: logger that writes to `log.txt` and to the console.
        progress: `run.progress(items, "label")` iterates, `with run.progress.task("label", total) as advance:` counts.
        seed: the seed of the run (`config.seed`, or 0).
        hash: hash of recipe, configuration and package version.
    """

    def __init__(self, recipe_name: str, config: Any, folder: Path, *, console: "Console | None" = None) -> None:
        from rich.console import Console

        self.recipe = recipe_name
        self.config = config
        self.folder = folder
        self.console = console or Console()
        self.seed = int(getattr(config, "seed", 0) or 0)
        self.hash = config_hash(recipe_name, pysteer.__version__, identity_values(config))
        self.log = open_log(folder, self.console)
        self.progress = Progress(self.console)
        self.started = time.monotonic()

    def derive_seed(self, *keys: Any) -> int:
        """A seed in [0, 2**63) of its own for `keys`, for example `run.derive_seed("baseline", 7)`."""
        digest = hashlib.sha256(json.dumps([self.seed, *files.plain(keys)]).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def seed_everything(self) -> None:
        """Seed the global generators of Python, NumPy and torch with the seed of the run."""
        import numpy as np
        import torch

        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002 (libraries that draw from the global generator)
        torch.manual_seed(self.seed)

    @contextmanager
    def stage(self, name: str, inputs: Any = None, *, quiet: bool = False) -> Iterator[Stage]:
        """Run a part once: leaving the block without an error marks it as finished.

        Args:
            name: its name, letters, digits, `-` and `_`.
            inputs: plain values it depends on beside the configuration (hashes of earlier results, a file size).
            quiet: log to the file only; for many short stages under one progress bar.
        """
        where = {"file_only": quiet}
        marker = self.path(f"stages/{name}.json")
        key = config_hash(self.hash, name, inputs)
        before = files.read_json(marker, "stage marker") if marker.is_file() else {}
        stage = Stage(name, before.get("key") == key, dict(before.get("notes", {})) if before.get("key") == key else {})
        if stage.done:
            self.log.info("%s: finished before, skipped", name, extra=where)
            yield stage
            return
        marker.unlink(missing_ok=True)
        self.log.info("%s: started", name, extra=where)
        start = time.monotonic()
        yield stage
        seconds = time.monotonic() - start
        files.write_json(marker, {"key": key, "seconds": round(seconds, 3), "notes": stage.notes})
        self.log.info("%s: finished in %s", name, clock_text(seconds), extra=where)

    def path(self, name: str | Path) -> Path:
        """The path of a file of this run; its folder is made.

        Raises:
            InputError: the name leads out of the run folder.
        """
        target = self.folder / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise InputError("file of a run", value=str(name), allowed="a path inside the run folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write_json(self, name: str | Path, value: Any) -> Path:
        """Write plain values (see `files.plain`) as JSON."""
        return files.write_json(self.path(name), value)

    def write_text(self, name: str | Path, text: str) -> Path:
        """Write text as UTF-8."""
        return files.write_text(self.path(name), text)

    def write_parquet(self, name: str | Path, rows: Any) -> Path:
        """Write rows (list of dicts), columns (dict of lists) or a `pyarrow.Table`."""
        return files.write_parquet(self.path(name), rows)

    def write_image(self, name: str | Path, image: Any) -> Path:
        """Write a PIL image or uint8 pixels `[H, W, 3]`."""
        return files.write_image(self.path(name), image)

    def write_safetensors(self, name: str | Path, tensors: Any, metadata: Mapping[str, str] | None = None) -> Path:
        """Write tensors by name."""
        return files.write_safetensors(self.path(name), tensors, metadata)

    def write_figure(self, name: str | Path, figure: "Figure", dpi: int = 150) -> Path:
        """Write a matplotlib figure; the suffix chooses the format, and a PNG gets its SVG and CSV beside it."""
        from pysteer.report.drawn import drawn

        if Path(name).suffix == ".png":
            return files.write_bytes(self.path(name), drawn(figure, dpi=dpi, tight=True))
        with files.atomic_path(self.path(name)) as temporary:
            figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
        return self.path(name)

    def close(self) -> None:
        """Close the log; the run cannot be used afterwards."""
        close_log(self.log)


def resolve_config(
    found: Recipe, words: Sequence[str] = (), config_file: Path | None = None, values: Mapping[str, Any] | None = None
) -> Any:
    """Make the configuration of a recipe: defaults, then the file, then `values`, then the `key=value` words."""
    from_file: dict[str, Any] = {}
    if config_file is not None:
        from_file = merge_values(read_values(config_file))
        if found.prepare is not None:
            from_file = found.prepare(from_file, config_file.parent)
    return build_config(found.config, merge_values(from_file, values or {}, parse_words(words)))


def execute(
    name: str,
    words: Sequence[str] = (),
    *,
    config_file: Path | None = None,
    values: Mapping[str, Any] | None = None,
    out: Path = Path("results"),
    run_name: str | None = None,
    overwrite: bool = False,
    console: "Console | None" = None,
) -> tuple[Path, Summary]:
    """Run a recipe and write its folder.

    Args:
        name: the recipe.
        words: `key=value` overrides.
        config_file: YAML file with values.
        values: further values, between the file and the words.
        out: folder of all runs.
        run_name: name of this run's folder, the recipe's name when None.
        overwrite: replace a run of another configuration in that folder.
        console: where to print.

    Returns:
        The run folder and the summary.

    Raises:
        InputError: anything given that cannot be used; a folder made for it is removed again unless a stage finished.
    """
    found = find_recipe(name)
    config = resolve_config(found, words, config_file, values)
    folder = claim_folder(Path(out), run_name or name, marked(found.name, config), overwrite)
    with locked(folder):
        run = Run(name, config, folder, console=console)
        try:
            summary = _run_and_log(found, run)
        except InputError:
            run.close()
            if not has_results(folder):
                shutil.rmtree(folder)
            raise
        finally:
            run.close()
    return folder, summary


def _run_and_log(found: Recipe, run: Run) -> Summary:
    files.write_text(run.path("config.yaml"), config_yaml(run.config))
    # Not on the console: what a recipe refuses right away is then one line and nothing else.
    start = "%s with pysteer %s, configuration %s"
    run.log.info(start, run.recipe, pysteer.__version__, run.hash, extra={"file_only": True})
    try:
        run.seed_everything()
        summary = found.function(run.config, run)
    except KeyboardInterrupt:
        run.log.warning("interrupted; the same command continues after the last finished stage")
        raise
    except InputError as error:
        run.log.error("%s", error, extra={"file_only": True})
        raise
    except Exception:
        run.log.exception("failed", extra={"file_only": True})
        raise
    seconds = round(time.monotonic() - run.started, 3)
    head = {"recipe": run.recipe, "name": run.folder.name, "pysteer": pysteer.__version__, "config_hash": run.hash}
    run.write_json("summary.json", {**head, **config_values(summary), "seconds": seconds})
    for name, rows in summary.tables.items():
        if rows:
            run.write_text(f"tables/{name}.csv", csv_text(flat_rows(files.plain(rows))))
    run.log.info("finished in %s", clock_text(seconds))
    return summary
