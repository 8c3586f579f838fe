"""Training in several processes that share each batch, and the optimizers that keep them equal."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn


def spawn(train: Callable[[int, argparse.Namespace], None], arguments: argparse.Namespace) -> None:
    """Run ``train(rank, arguments)`` in ``--processes`` processes, or in this one."""
    if arguments.batch % arguments.processes:
        raise SystemExit(f"--batch {arguments.batch} is not a multiple of --processes {arguments.processes}")
    if arguments.processes == 1:
        train(0, arguments)
    else:
        torch.multiprocessing.spawn(train, (arguments,), nprocs=arguments.processes)


def join(rank: int, arguments: argparse.Namespace) -> None:
    """Meet the other processes, if there are any."""
    if arguments.processes > 1:
        meeting = arguments.work.resolve() / f"meeting-{os.getppid()}"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=arguments.processes)


class Optimizers:
    """Muon (Jordan et al. 2024) for the matrices that ``is_matrix`` names, AdamW for everything else.

    Gradients are averaged over processes; the orthogonalisation of the matrices is shared out between them.
    """

    def __init__(
        self, model: nn.Module, lr: float, is_matrix: Callable[[str], bool], rank: int = 0, world: int = 1
    ) -> None:
        self.parameters, self.world = list(model.parameters()), world
        matrices, rest = [], []
        for name, value in model.named_parameters():
            (matrices if value.ndim == 2 and is_matrix(name) else rest).append(value)
        matrices.sort(key=lambda value: -value.numel())
        self.shares = [matrices[owner::world] for owner in range(world)]
        self.muon = torch.optim.Muon(self.shares[rank], lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, lr: float) -> float:
        """Average the gradients, clip their norm to 1, update; returns the norm."""
        if self.world > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in self.parameters]) / self.world
            dist.all_reduce(flat)
            offset = 0
            for value in self.parameters:
                value.grad.copy_(flat[offset : offset + value.numel()].view_as(value))
                offset += value.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for owner, share in enumerate(self.shares if self.world > 1 else []):
            flat = torch.nn.utils.parameters_to_vector(share).detach()
            dist.broadcast(flat, owner)
            torch.nn.utils.vector_to_parameters(flat, share)
        for value in self.parameters:
            value.grad = None
        return norm.item()
