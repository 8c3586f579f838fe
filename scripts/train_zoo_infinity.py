#!/usr/bin/env python3
"""Train the bundled generator ``infinity-shapes`` and its classifier, stage by stage.

    python scripts/train_zoo_infinity.py --stage tokenizer
    python scripts/train_zoo_infinity.py --stage decoder
    python scripts/train_zoo_infinity.py --stage classifier
    python scripts/train_zoo_infinity.py --stage transformer
    python scripts/train_zoo_infinity.py --stage evaluate

Every stage runs a fixed number of steps from a seed, on a CPU or a GPU, and goes on from its checkpoint in ``--work``
when it is started again. Weights are written to ``--out`` (by default into the package).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

# Each module has add_arguments(parser) and run(arguments). One file per stage: a new stage is a new row here.
STAGES = {
    "tokenizer": "zoo_infinity.tokenizer_stage",
    "decoder": "zoo_infinity.decoder_stage",
    "classifier": "zoo_infinity.classifier_stage",
    "transformer": "zoo_infinity.transformer_stage",
    "evaluate": "zoo_infinity.evaluate_stage",
}


def main() -> None:
    """Parse the command line and run one stage."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--stage", choices=list(STAGES), required=True)
    stage = first.parse_known_args()[0].stage if "--stage" in " ".join(sys.argv) else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "zoo-training", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "pysteer" / "zoo", help="folder that receives the weights")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    module = import_module(STAGES[stage]) if stage else None
    if module is not None:
        module.add_arguments(parser)
    arguments = parser.parse_args()
    if module is not None:
        module.run(arguments)


if __name__ == "__main__":
    main()
