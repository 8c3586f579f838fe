"""Windows of two processes are merged, on both alike."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pysteer.dynamics import Monitor


def _batches(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(rank + 1, 4, 3, 3, generator=generator) for _ in range(2)]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.GroupNorm(2, 4)))
    with Monitor(model, "norm", every=1) as monitor:
        for x in _batches(rank):
            model(x).sum().backward()
        if rank == 1:
            model.eval()(torch.ones(1, 4, 3, 3))  # validation on one rank alone
        windows = monitor.step(1)
    torch.save([window.moments for window in windows], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.start_processes(_worker, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = nn.Sequential(nn.GroupNorm(2, 4))
    with Monitor(model, "norm", every=1) as monitor:
        for rank in range(2):
            for x in _batches(rank):
                model(x)
        (alone,) = monitor.step(1)
    torch.testing.assert_close(first[0], alone.moments, rtol=1e-12, atol=1e-12)
    assert torch.equal(first[0][[0, 3, 4, 6, 7]], alone.moments[[0, 3, 4, 6, 7]])
    assert first[1][0].tolist() == [9.0] * 4
