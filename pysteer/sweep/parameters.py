"""Parameter sets of a sweep: fitted once, whoever needs them first, and kept in the store."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.capture import Examples, Fitted, fit
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


class Fitter:
    """Parameters for the cells of one process, read or fitted once; fits at once on the same examples run these once.

    Args:
        model: what is fitted.
        folder: of the sweep; parameters are kept in `fits`.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._fits: dict[str, Fitted] = {}
        self._examples: tuple[str, Examples] | None = None

    def parameters(self, request: FitRequest) -> Fitted:
        """The parameters of a request, read where they have been fitted before, by whatever process.

        Equal requests give the same object, so that their cells share it in the bank.
        """
        if request.key not in self._fits:
            place = self.folder / "fits" / request.key
            if not (place / "config.json").is_file():
                with exclusive(self.folder / "fits" / f"{request.key}.lock"):
                    if not (place / "config.json").is_file():
                        made = self._fit(request)
                        with files.new_folder(place) as temporary:
                            made.save_pretrained(temporary)
            self._fits[request.key] = Fitted.from_pretrained(place)
        return self._fits[request.key]

    def forget_examples(self) -> None:
        """Free the activations of the last examples, before the model needs the memory for something else."""
        self._examples = None

    def _fit(self, request: FitRequest) -> Fitted:
        options = dict(request.options)
        prompts = list(request.source), list(request.target)
        if options.pop("sequential", False):  # steers its own run; kept activations would only take memory
            return fit(self.model, request.method, *prompts, seeds=list(request.seeds), sequential=True, **options)
        own = {name: options.pop(name) for name in ("shared", "control", "rows", "fit_seed") if name in options}
        pools = ("tokens", "mean") if request.method.pooled else ("tokens",)  # tokens that there are serve both
        keys = [config_hash(request.identity, *prompts, list(request.seeds), options, pool) for pool in pools]
        if self._examples is None or self._examples[0] not in keys:
            self._examples = None  # before others are made
            made = Examples(self.model, *prompts, seeds=list(request.seeds), pool=pools[-1], **options)
            self._examples = keys[-1], made
        return self._examples[1].fit(request.method, **own)
