"""The log of a run: everything to `log.txt`, the same lines to the console."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class _ConsoleHandler(logging.Handler):
    """Prints through the rich console, so that lines and progress bars do not cut through each other."""

    def __init__(self, console: "Console") -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def open_log(folder: Path, console: "Console") -> logging.Logger:
    """A logger of its own for one run folder; `extra={"file_only": True}` keeps a line off the console."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(f"pysteer.run.{folder.name}", logging.INFO)
    to_file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    log.addHandler(_ConsoleHandler(console))
    return log


def close_log(log: logging.Logger) -> None:
    """Flush and close the handlers of `log`."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
