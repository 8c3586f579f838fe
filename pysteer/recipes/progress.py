"""Progress with rate and time left: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")


class Advance(Protocol):
    """What a task is told: `advance()` one unit done, `advance(3)` three."""

    def __call__(self, units: float = 1) -> None: ...


def clock_text(seconds: float) -> str:
    """Seconds as `8 s`, `2:05` or `1:02:05`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def rate_text(done: float, seconds: float) -> str:
    """Units per second, or seconds per unit when slower than one a second."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


class Show(Protocol):
    """What a task is told when it counts by itself: units done so far, and their number where it is known."""

    def __call__(self, done: float, total: float | None = None) -> None: ...


class Progress:
    """Makes the tasks of one run.

    Args:
        console: where to draw; bars when it is a terminal, otherwise a line every `every` seconds.
        every: seconds between two plain lines of a task.
    """

    def __init__(self, console: "Console", every: float = 15.0) -> None:
        self.console = console
        self.every = every

    def __call__(self, items: Iterable[Item], label: str, total: float | None = None) -> Iterator[Item]:
        """Iterate over `items`, one unit each; `total` defaults to their number where they have one."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.task(label, total) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Show a task of `total` units (None when unknown) while the block runs."""
        with self.follow(label, total) as show:
            done = 0.0

            def advance(units: float = 1) -> None:
                nonlocal done
                done += units
                show(done, total)

            yield advance

    @contextmanager
    def follow(self, label: str, total: float | None = None) -> Iterator[Show]:
        """Show a task that says how far it is: the block gets `show(done, total)`, as `fit(progress=...)` takes it."""
        with self._bar(label, total) if self.console.is_terminal else self._lines(label, total) as show:
            yield show

    @contextmanager
    def _bar(self, label: str, total: float | None) -> Iterator[Show]:
        from rich import progress as rich

        class Rate(rich.ProgressColumn):
            def render(self, task: rich.Task) -> str:
                return rate_text(task.completed, task.finished_time or task.elapsed or 0.0)

        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            Rate(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=self.console) as bars:
            task = bars.add_task(label, total=total)
            yield lambda done, total=None: bars.update(task, completed=done, total=total)

    @contextmanager
    def _lines(self, label: str, total: float | None) -> Iterator[Show]:
        start = shown = time.monotonic()
        now = (0.0, total)

        def show(done: float, total: float | None = None) -> None:
            nonlocal now, shown
            now = (done, total)
            if time.monotonic() - shown >= self.every and (total is None or done < total):
                shown = time.monotonic()
                self._print(label, *now, shown - start)

        yield show
        self._print(label, *now, time.monotonic() - start)

    def _print(self, label: str, done: float, total: float | None, seconds: float) -> None:
        parts = [f"{done:g}" if total is None else f"{done:g}/{total:g}", rate_text(done, seconds)]
        parts.append(f"{clock_text(seconds)} gone")
        if total is not None and 0 < done < total:
            parts.append(f"{clock_text(seconds / done * (total - done))} left")
        line = f"{label}: {', '.join(part for part in parts if part)}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
