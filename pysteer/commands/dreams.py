"""The command that lets a process take its share of a stage of a dream run."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("dream-worker")
def dream_worker(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of the recipe dream.")],
    stage: Annotated[str, typer.Argument(help="capture, prior or deep_dream.")],
    rank: Annotated[
        int | None, typer.Option(help="Number of this process.  [default: as SLURM or torchrun say]")
    ] = None,
    world: Annotated[int | None, typer.Option(help="How many processes there are.")] = None,
) -> None:
    """Do this process's share of a stage of `pysteer run dream`, beside others that do theirs.

    Start them with srun or torchrun; afterwards `pysteer run dream stage=prior` checks that all is there.

    pysteer dream-worker results/dream prior, pysteer dream-worker results/dream prior --rank 0 --world 4
    """
    from pysteer.dream.parts import Share
    from pysteer.errors import InputError
    from pysteer.recipes.dreaming.workers import share_of_environment, work_on

    if (rank is None) != (world is None):
        raise InputError("rank and world", value=f"{rank}, {world}", allowed="both or neither")
    share = share_of_environment() if rank is None or world is None else Share(rank, world)
    work_on(folder, stage, share)
