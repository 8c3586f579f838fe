"""One rank that watches a group norm; `test_ranks.py` runs two of them.

python tests/dynamics/rank_of_monitor.py RANK FOLDER
"""

import gc
import sys

import torch
import torch.distributed as dist
from torch import nn

from pysteer.dynamics import Monitor


def batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(rank + 1, 4, 3, 3, generator=generator) for _ in range(2)]


def watch(rank: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.GroupNorm(2, 4)))
    with Monitor(model, "norm", every=1) as monitor:
        for x in batches(rank):
            model(x).sum().backward()
        if rank == 1:
            model.eval()(torch.ones(1, 4, 3, 3))  # validation on one rank alone
        windows = monitor.step(1)
    return [window.moments for window in windows]


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meet")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(watch(rank), f"{folder}/{rank}.pt")
    # The parallel model has to be gone before the group: if it is the last to hold the group, it waits for a thread
    # of gloo, with the lock of the interpreter, for which that thread waits.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
