"""Several runs of one model side by side, so that a site can be fitted from all of them before any goes on.

Fitting site after site with the earlier ones steered takes, done plainly, a run of all data per site. Here every batch
runs once: it waits at each site until all batches have arrived, gets its steered activation and goes on. A batch that
waits holds no more than the activations that its forward pass holds at that place.

Only one batch runs at a time, so results do not depend on timing.
"""

import threading
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

from torch import Tensor

from pysteer.capture.taps import PartRows
from pysteer.errors import PysteerError
from pysteer.steering.site import Site


class Arrival(NamedTuple):
    """What a batch holds at a site: its activation as the module returned it, and its rows."""

    site: Site
    step: int
    x: Tensor
    rows: PartRows


class _Stopped(BaseException):
    """Ends a batch that waits when another one has failed."""


class _Run:
    """One batch in a thread of its own, which runs only between `resume` and the next arrival or the end."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._arrival: Arrival | None = None
        self._answer: Tensor | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._work = work
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                self._work()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._arrival = None
        self._paused.release()

    def see(self, site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
        """Called in the thread of the run: hand over what there is, wait for the answer."""
        mine = copy(rows)
        self._arrival = Arrival(site, step, x, mine)
        self._paused.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped
        vars(rows).update(vars(mine))  # other runs have announced theirs in the meantime
        assert self._answer is not None
        return self._answer

    def resume(self, answer: Tensor | None = None) -> Arrival | None:
        """Go on to the next site; None when the run is over."""
        self._answer = answer
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._arrival

    def stop(self) -> None:
        """End the run where it waits."""
        self._stopped = True
        self._go.release()
        self.thread.join()


def in_lockstep(
    works: Sequence[Callable[[], Any]],
    decide: Callable[[list[Arrival]], list[Tensor]],
    installed: Callable[[Callable[..., Tensor]], Any],
) -> None:
    """Run `works` side by side.

    Args:
        works: one call per batch, all of which visit the same sites in the same order.
        decide: gets what all batches hold at a site, returns what each goes on with.
        installed: `installed(see)` is a context in which the model passes activations through `see`.

    Raises:
        PysteerError: the batches did not visit the same sites.
    """
    current: dict[int, _Run] = {}

    def see(site: Site, step: int, x: Tensor, rows: PartRows) -> Tensor:
        return current[threading.get_ident()].see(site, step, x, rows)

    runs: list[_Run] = []
    with installed(see):
        try:
            for work in works:
                runs.append(_Run(work))
                assert runs[-1].thread.ident is not None
                current[runs[-1].thread.ident] = runs[-1]
            arrivals = [run.resume() for run in runs]
            while any(arrivals):
                places = {None if a is None else (a.site.name, a.step) for a in arrivals}
                if len(places) != 1:
                    raise PysteerError(f"batches of one fit visit different sites: {sorted(map(str, places))}")
                answers = decide([a for a in arrivals if a is not None])
                arrivals = [run.resume(answer) for run, answer in zip(runs, answers, strict=True)]
        finally:
            for run in runs:
                if run.thread.is_alive():
                    run.stop()
