"""Damaged and malicious files: each either loads or is refused by an InputError, at once, and nothing in it runs."""

import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import mutations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loaders import LOADERS

from pysteer.errors import InputError

SECONDS = 2.0  # of processor time
MEGABYTES = 400  # that the memory of the process may grow
OPTIONS: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


class Hangs(BaseException):
    """Raised into a loader that does not come back; not an Exception, so that no loader can take it for its own."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Hangs


def peak() -> float:
    """Most memory that the process ever held, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1024 if sys.platform == "linux" else used / 1024**2


def test_the_default_run_damages_ten_thousand_files() -> None:
    assert sum(loader.examples for loader in LOADERS.values()) >= 10_000


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_load_or_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = LOADERS[name]
    folder = tmp_path / "files"
    folder.mkdir()
    loader.write(folder)
    whole = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    try:
        loader.read(folder)
    except InputError:  # some go on to files that are too large for here
        assert name in ("pipeline index", "kind of model")
    monkeypatch.chdir(tmp_path)
    before, outcomes = peak(), {"loaded": 0, "refused": 0}

    @settings(max_examples=loader.examples, **OPTIONS)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        file, content = data.draw(mutations.damaged(whole))
        (folder / file).write_bytes(content)
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        try:
            loader.read(folder)
            outcomes["loaded"] += 1
        except InputError:
            outcomes["refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            (folder / file).write_bytes(whole[file])
        assert time.process_time() - begun < SECONDS
        assert peak() - before < MEGABYTES
        assert not (tmp_path / mutations.CANARY).exists()

    previous = signal.signal(signal.SIGALRM, _stop)
    try:
        run()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert sum(outcomes.values()) >= loader.examples * 0.9
    assert outcomes["refused"] > 0
