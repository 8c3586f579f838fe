"""Several processes on one stage: started here, one per GPU where there are GPUs, or by SLURM and the like."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from pysteer import files
from pysteer.dream.parts import Share
from pysteer.errors import InputError, PysteerError
from pysteer.processes import run_together
from pysteer.recipes.config import build_config, read_values
from pysteer.recipes.dreaming.config import DreamRecipeConfig
from pysteer.recipes.dreaming.studio import Studio
from pysteer.recipes.folder import MARK
from pysteer.recipes.frame import Run

# Where launchers say which process this is and how many there are.
_VARIABLES = (
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def share_of_environment() -> Share:
    """The share that SLURM, torchrun or mpirun gave this process; all of the work where none did."""
    for rank, world in _VARIABLES:
        if rank in os.environ and world in os.environ:
            try:
                return Share(int(os.environ[rank]), int(os.environ[world]))
            except ValueError as error:
                value = f"{os.environ[rank]}, {os.environ[world]}"
                raise InputError(f"{rank} and {world}", value=value, allowed="whole numbers") from error
    return Share()


def work_on(folder: Path, stage: str, share: Share) -> None:
    """Do one process's share of a stage of the run in `folder`.

    Raises:
        InputError: no dream run there, or a stage that is not shared.
    """
    from pysteer.recipes.dream import SHARED, work

    if stage not in SHARED:
        raise InputError("stage to share", value=stage, allowed=", ".join(SHARED))
    mark = files.read_json(folder / MARK, "marker of a run folder")
    if mark.get("recipe") != "dream":
        raise InputError("run to work on", value=str(folder), allowed="a run of the recipe dream")
    config = build_config(DreamRecipeConfig, read_values(folder / "config.yaml"))
    run = Run("dream", config, folder)
    try:
        work(Studio(config, run, share), stage)
    finally:
        run.close()


def run_workers(run: Run, stage: str, count: int, device: torch.device) -> None:
    """Start `count` processes on a stage and wait for them.

    Raises:
        PysteerError: one of them failed; what the others finished is kept.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    threads = max(1, torch.get_num_threads() // count)
    command = [sys.executable, "-m", "pysteer.cli", "dream-worker", str(run.folder), stage]
    commands, environments = [], []
    for rank in range(count):
        commands.append([*command, "--rank", str(rank), "--world", str(count)])
        own = {"CUDA_VISIBLE_DEVICES": str(rank % gpus)} if gpus else {}
        environments.append({"OMP_NUM_THREADS": str(threads), **own})
    codes = run_together(commands, environments)
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        raise PysteerError(
            f"stage {stage}: workers {', '.join(map(str, failed))} of {count} failed; fix: see their messages above, "
            "then give the same command again, finished work is kept"
        )
