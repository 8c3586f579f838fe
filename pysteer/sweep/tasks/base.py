"""What a sweep needs to know of the work it is over: the setting of a cell, and how a batch of cells is run."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pysteer.errors import InputError
from pysteer.steering.site import did_you_mean


@dataclasses.dataclass
class Outputs:
    """What a batch of B cells gave.

    Attributes:
        images: uint8 `[B, H, W, 3]` on the CPU, or None.
        texts: B texts, or None.
        columns: further values of every row, plain types.
        failed: row -> why what it gave cannot be used (NaN, say); the other rows stand.
        work: how many rows the model computed, a row-step each, and how many it would have without shared prefixes.
    """

    images: Tensor | None = None
    texts: list[str] | None = None
    columns: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    work: tuple[float, float] = (0.0, 0.0)


class Engine(ABC):
    """A loaded model that runs batches. `evaluate` is called from another thread while the next batch is generated."""

    @abstractmethod
    def generate(self, settings: Sequence[Any]) -> Outputs:
        """Run a batch of settings of one group; any error concerns the batch as a whole."""

    def evaluate(self, settings: Sequence[Any], outputs: Outputs) -> list[dict[str, Any]]:
        """Measures of every row, plain values; must not touch the model that generates."""
        return [{} for _ in settings]

    def provenance(self) -> dict[str, Any]:
        """Columns that say what ran: device, hash of the weights."""
        return {}


class Task(ABC):
    """A kind of work.

    Attributes:
        name: on the command line and in every key.
        setting: frozen dataclass of a cell, with a default for every field.
        group: fields that have to agree within a batch.
        together: fields that rows which begin alike agree in.
        sets: fields that choose a parameter set.
        repeats: fields that are no choice of a setting but repetitions of it (prompt, seed); results are averaged
            over them.
        batch_size: cells per batch unless told otherwise.
    """

    name: str
    setting: type
    group: ClassVar[Sequence[str]] = ()
    together: ClassVar[Sequence[str]] = ()
    sets: ClassVar[Sequence[str]] = ()
    repeats: ClassVar[Sequence[str]] = ()
    batch_size: int = 64
    most_sets: int = 64

    def prepare(self, values: dict[str, Any], axes: list[Any], options: Mapping[str, str]) -> None:
        """Fill in what the fields leave open, in place: `options` are words that are no field (prompts=8, say).

        Raises:
            InputError: an option that the task does not have.
        """
        for name in options:
            names = [field.name for field in dataclasses.fields(self.setting)]
            raise InputError("unknown key", value=name, allowed=", ".join(names), fix=did_you_mean(name, names))

    def options(self) -> dict[str, str]:
        """Words beside the fields, with what they mean."""
        return {}

    def check(self, settings: Sequence[Any]) -> None:  # noqa: B027 (most tasks have nothing to check)
        """Raise an `InputError` for settings that can never run; called before any work with different ones."""

    @abstractmethod
    def open(self, setting: Any, folder: Path) -> Engine:
        """Load what the group of `setting` needs; `folder` is that of the sweep."""

    def score(self) -> Mapping[str, str]:
        """Roles of measures: "target" (to be high) and "damage" (to be low) -> column."""
        return {}


def find_task(name: str) -> Task:
    """The task of a name: `images`, `texts`, a recipe of `pysteer run`, or `module:name` of one's own.

    Raises:
        InputError: there is no such task.
    """
    from pysteer.recipes.frame import recipe_modules

    known = {"images": "pysteer.sweep.tasks.images:ImagesTask", "texts": "pysteer.sweep.tasks.texts:TextsTask"}
    if name in recipe_modules():
        from pysteer.sweep.tasks.recipes import RecipeTask

        return RecipeTask(name)
    place, colon, attribute = known.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(place), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise InputError("task of a sweep", value=name, allowed="a class in a module that can be imported") from error
    if found is None:
        every = [*known, *sorted(recipe_modules())]
        allowed = f"{', '.join(every)}, or MODULE:CLASS"
        raise InputError("task of a sweep", value=name, allowed=allowed, fix=did_you_mean(name, every))
    task: Task = found() if isinstance(found, type) else found
    task.name = name
    return task
