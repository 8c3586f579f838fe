"""The clock of a denoiser keeps what it has looked up, as long as that is so."""

import torch
from torch import nn

from pysteer.families.diffusion_runs import Clock


def steps(clock: Clock, *timesteps: float) -> list[int]:
    found = []
    for timestep in timesteps:
        clock.look_up(torch.tensor(timestep))
        found.append(int(clock.step))
    return found


def test_known_timesteps_follow_the_schedule() -> None:
    clock = Clock(nn.Linear(1, 1))
    clock.take(torch.tensor([900.0, 500.0, 100.0]), repeats=False, device=torch.device("cpu"))
    assert steps(clock, 900.0, 500.0, 100.0, 500.0, 900.0) == [0, 1, 2, 1, 0]
    clock.take(torch.tensor([900.0, 500.0, 100.0]), repeats=False, device=torch.device("cpu"))  # another run
    assert steps(clock, 100.0, 900.0) == [2, 0]
    clock.take(torch.tensor([900.0, 700.0, 500.0, 100.0]), repeats=False, device=torch.device("cpu"))
    assert clock.count == 4
    assert steps(clock, 500.0, 100.0, 700.0) == [2, 3, 1]
    clock.take(torch.tensor([900.0, 500.0, 500.0, 100.0]), repeats=True, device=torch.device("cpu"))
    assert clock.count == 3
    assert steps(clock, 500.0, 100.0) == [1, 2]
    clock.look_up(torch.tensor([100.0, 900.0]))  # of several rows the largest counts
    assert int(clock.step) == 0
