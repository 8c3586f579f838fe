"""wandb and tensorboard, where they are wanted and installed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pysteer.errors import InputError
from pysteer.recipes.config import config_values
from pysteer.recipes.transport.settings import TrackingSettings


class Trackers:
    """Passes metrics on.

    Args:
        settings: which trackers.
        folder: of the run.
        config: its configuration, which wandb shows.

    Raises:
        InputError: a tracker that is wanted is not installed.
    """

    def __init__(self, settings: TrackingSettings, folder: Path, config: Any) -> None:
        self._wandb: Any = None
        self._board: Any = None
        if settings.wandb != "disabled":
            _need("wandb", "tracking.wandb=disabled")
            wandb: Any = importlib.import_module("wandb")
            self._wandb = wandb.init(
                project=settings.wandb_project,
                name=folder.name,
                dir=str(folder),
                mode=settings.wandb,
                config=config_values(config),
            )
        if settings.tensorboard:
            _need("tensorboard", "tracking.tensorboard=false")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def log(self, group: str, strength: float, values: dict[str, float]) -> None:
        """Metrics of one setting, against the strength."""
        named = {f"{group}/{name}": value for name, value in values.items() if value == value}
        if self._wandb is not None:
            self._wandb.log({**named, f"{group}/strength": strength})
        if self._board is not None:
            for name, value in named.items():
                # Steps are whole numbers: thousandths of a strength.
                self._board.add_scalar(name, value, global_step=round(1000 * strength))

    def close(self) -> None:
        """Write what is held back."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


def _need(package: str, off: str) -> None:
    if find_spec(package) is None:
        raise InputError(f"tracker {package}", value="not installed", fix=f"pip install {package}, or {off}")
