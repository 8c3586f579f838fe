"""Commands that run at once, one process each."""

import os
import subprocess
from collections.abc import Mapping, Sequence


def run_together(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> list[int]:
    """Run every command with its additions to the environment, wait for all, and return their exit codes.

    One that fails leaves the others alone; an interrupted wait ends all of them.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, added in zip(commands, environments, strict=True):
            processes.append(subprocess.Popen(command, env={**os.environ, **added}))
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
