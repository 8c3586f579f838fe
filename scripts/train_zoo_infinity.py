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

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from zoo_training import run_stage  # noqa: E402  (found through the path set above)

# Each module has add_arguments(parser) and run(arguments). One file per stage: a new stage is a new row here.
STAGES = {
    "tokenizer": "zoo_infinity.tokenizer_stage",
    "decoder": "zoo_infinity.decoder_stage",
    "classifier": "zoo_infinity.classifier_stage",
    "transformer": "zoo_infinity.transformer_stage",
    "evaluate": "zoo_infinity.evaluate_stage",
}

if __name__ == "__main__":
    run_stage(__doc__, STAGES, ROOT)
