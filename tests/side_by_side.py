"""Ranks of a process group, each a Python of its own: a fork of the tests' process may wait forever for a thread that
only the parent has."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run_ranks(script: Path, *words: str, count: int = 2, seconds: float = 200) -> None:
    """Run `script RANK words…` for every rank at once.

    Raises:
        AssertionError: a rank failed, or was not done after `seconds`; the others are ended then.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [
            subprocess.Popen([sys.executable, str(script), str(rank), *words], env=environment, stderr=errors)
            for rank in range(count)
        ]
        until = time.monotonic() + seconds
        try:
            while (codes := [rank.poll() for rank in ranks]) != [0] * count:
                if any(codes) or time.monotonic() > until:
                    for rank in ranks:
                        rank.send_signal(signal.SIGABRT)  # one that still waits says where
                        rank.wait(30)
                    errors.seek(0)
                    said = "".join(line for line in errors if not line.startswith("Extension modules"))
                    raise AssertionError(f"{script.name}: exit codes {codes}, errors: {said[-3000:]}")
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
