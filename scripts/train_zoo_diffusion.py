#!/usr/bin/env python3
"""Train the bundled generator ``diffusion-shapes``, stage by stage; it is judged by the classifier of the others.

    python scripts/train_zoo_diffusion.py --stage vae
    python scripts/train_zoo_diffusion.py --stage unet
    python scripts/train_zoo_diffusion.py --stage evaluate

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
    "vae": "zoo_diffusion.vae_stage",
    "unet": "zoo_diffusion.unet_stage",
    "evaluate": "zoo_diffusion.evaluate_stage",
}

if __name__ == "__main__":
    run_stage(__doc__, STAGES, ROOT)
