"""What the training scripts of the bundled generators share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path


def run_stage(description: str | None, stages: Mapping[str, str], root: Path) -> None:
    """Parse the command line and run one stage; ``stages`` maps its name to a module with add_arguments and run."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", choices=list(stages), required=True)
    stage = first.parse_known_args()[0].stage if "--stage" in " ".join(sys.argv) else None
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(stages), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--work", type=Path, default=root / "results" / "zoo-training", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=root / "pysteer" / "zoo", help="folder that receives the weights")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    module = import_module(stages[stage]) if stage else None
    if module is not None:
        module.add_arguments(parser)
    arguments = parser.parse_args()
    if module is not None:
        module.run(arguments)
