"""The process of one contender of ours: python -m bench.worker MODULE KIND FOLDER. Started by `bench.contest`."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

from bench.serving import serve


def main() -> None:
    """Serve the works of a module."""
    module, kind, folder = sys.argv[1:]
    serve(partial(importlib.import_module(module).prepare, kind, Path(folder)))


if __name__ == "__main__":
    main()
