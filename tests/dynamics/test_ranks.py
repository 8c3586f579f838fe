"""Windows of two processes are merged, on both alike."""

from pathlib import Path

import rank_of_monitor
import torch
from side_by_side import run_ranks
from torch import nn

from pysteer.dynamics import Monitor


def test_two_processes(tmp_path):
    run_ranks(Path(rank_of_monitor.__file__), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == len(second) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = nn.Sequential(nn.GroupNorm(2, 4))
    with Monitor(model, "norm", every=1) as monitor:
        for rank in range(2):
            for x in rank_of_monitor.batches(rank):
                model(x)
        (alone,) = monitor.step(1)
    torch.testing.assert_close(first[0], alone.moments, rtol=1e-12, atol=1e-12)
    assert torch.equal(first[0][[0, 3, 4, 6, 7]], alone.moments[[0, 3, 4, 6, 7]])
    assert first[1][0].tolist() == [9.0] * 4
