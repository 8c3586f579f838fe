"""One rank that trains a very small VAE and goes on from a checkpoint; `test_vae_dynamics_parts.py` runs two of them.

python tests/recipes/rank_of_vae.py RANK FOLDER PORT
"""

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate.tracking import GeneralTracker

from pysteer.recipes.config import build_config, parse_words
from pysteer.recipes.vae import model
from pysteer.recipes.vae.config import VaeDynamicsConfig
from pysteer.recipes.vae.data import Images
from pysteer.recipes.vae.trainer import Trainer


class Figures(GeneralTracker):
    """Keeps what it is told; its end must not be that of the process group."""

    name = "figures"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    @property
    def tracker(self) -> list[int]:
        return self.steps

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None, **_) -> None:
        assert values["loss"] > 0
        self.steps.append(step)


def main(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()}, ACCELERATE_USE_CPU="true")
    model._WIDTHS["tiny"] = (8, 8)
    words = ["data.resolution=16", "data.batch_size=2", "training.max_train_steps=5", "model.plant=0.2", "device=cpu"]
    words += ["tracking.track_interval=2", "intervention.intervention_interval=2", "saving.save_interval_steps=3"]
    config = build_config(VaeDynamicsConfig, parse_words([*words, "logit_lens.enabled=false"]))
    pixels = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = Images(16, lambda numbers: pixels[list(numbers)], "random")
    for run in range(2):  # the second time from the checkpoint of step 3
        trainer = Trainer(config, "nudge", 0, Path(folder) / "run", images, images)
        figures = Figures()
        trainer.accelerator.log_with = [figures]
        trainer.run()
        assert bool(figures.steps) == trainer.accelerator.is_main_process
        history = [window.moments for window in trainer.observers.monitor.history.windows("train")]
        found = {"weights": [p.detach() for p in trainer.plain.parameters()], "rows": trainer.observers.nudger.rows()}
        torch.save({**found, "last": history[-1]}, f"{folder}/{rank}-{run}.pt")
    del trainer
    gc.collect()  # a parallel model that outlives the group may wait for it forever
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
