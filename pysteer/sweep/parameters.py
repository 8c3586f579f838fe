"""Parameter sets of a sweep: fitted once, whoever needs them first, and kept in the store."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.capture import Fitted, fit
from pysteer.recipes.config import config_hash


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for this process; waits for others of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class FitRequest:
    """What is to be fitted; equal requests give equal parameters.

    Attributes:
        identity: plain values that identify the model.
        method: the method with its options.
        source, target: prompts of the two classes.
        seeds: of the noise, one per pair.
        options: further arguments of `pysteer.fit`.
    """

    identity: Any
    method: Any
    source: Sequence[str]
    target: Sequence[str]
    seeds: Sequence[int]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A hash of all of it."""
        method = [self.method.name, self.method.config()]
        return config_hash(
            self.identity, method, list(self.source), list(self.target), list(self.seeds),
            {name: value for name, value in self.options.items() if name != "batch_size"},
        )  # fmt: skip


def fitted(model: Any, request: FitRequest, folder: Path) -> Fitted:
    """The parameters of a request, from `folder/fits` where they have been fitted before, by whatever process."""
    place = folder / "fits" / request.key
    if not (place / "config.json").is_file():
        with exclusive(folder / "fits" / f"{request.key}.lock"):
            if not (place / "config.json").is_file():
                made = fit(
                    model, request.method, list(request.source), list(request.target), seeds=list(request.seeds),
                    **request.options,
                )  # fmt: skip
                with files.new_folder(place) as temporary:
                    made.save_pretrained(temporary)
    return Fitted.from_pretrained(place)
