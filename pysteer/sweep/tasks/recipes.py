"""A recipe of `pysteer run` as a task: every cell is a run of its own; the headline figures become columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pysteer.files import plain
from pysteer.recipes.config import config_hash, config_values
from pysteer.recipes.frame import execute, find_recipe
from pysteer.sweep.tasks.base import Engine, Outputs, Task


class RecipeTask(Task):
    """Cells are runs of a recipe in folders of their own, `runs/HASH`; a run that was interrupted continues there."""

    batch_size = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.setting = find_recipe(name).config
        self.repeats = ("seed",)  # type: ignore[misc]

    def open(self, setting: Any, folder: Path) -> Engine:
        return RecipeEngine(self.name, folder)

    def score(self) -> Mapping[str, str]:
        return {"target": "target_rate", "kept": "kept_rate"}


class RecipeEngine(Engine):
    """Runs recipes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def generate(self, settings: Sequence[Any]) -> Outputs:
        from rich.console import Console

        columns = []
        for setting in settings:
            values = config_values(setting)
            with Path("/dev/null").open("w") as nowhere:
                folder, summary = execute(
                    self.name, values=values, out=self.folder / "runs", run_name=config_hash(values),
                    console=Console(file=nowhere),
                )  # fmt: skip
            best = plain(summary.best)
            simple = {k: v for k, v in best.items() if isinstance(v, (str, int, float, bool))}
            columns.append({**{f"best_{k}" if k in values else k: v for k, v in simple.items()}, "run": folder.name})
        return Outputs(columns=columns, work=(len(settings), len(settings)))
