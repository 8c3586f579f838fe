"""Checkpoints of a training: whole folders or none, tensors in safetensors, all else in JSON.

chkpt-100/model.safetensors, optimizer.safetensors, watch.safetensors, ema.safetensors, ..., state.json
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pysteer import files
from pysteer.errors import InputError

STATE = "state.json"
# A full disk, a used-up quota, a limit on the size of files; not every library passes the number on.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_SAYS = ("no space left", "quota exceeded", "file too large")


@contextmanager
def full_disk_is_said(what: str, place: Path, folder: Path, prefix: str) -> Iterator[None]:
    """Turn the error of a write that finds no room into one line that says where the training in `folder` goes on.

    Raises:
        InputError: the disk is full; what was whole before is still there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error).lower()
        if getattr(error, "errno", None) not in _FULL and not any(words in text for words in _FULL_SAYS):
            raise
        before = [number for number, _ in checkpoints(folder, prefix)]
        goes_on = f"continues from step {max(before)}" if before else "starts again"
        fix = f"make room and give the same command again, it {goes_on}"
        raise InputError(f"no space left for {what}", value=str(place), fix=fix) from error


def save_checkpoint(
    folder: Path, prefix: str, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Any, keep: int
) -> None:
    """Write checkpoint `step` and then delete the older ones but for `keep`.

    Raises:
        InputError: the disk is full; older checkpoints are still there.
    """
    target = folder / f"{prefix}-{step}"
    if target.exists():
        shutil.rmtree(target)
    with full_disk_is_said("checkpoint", target, folder, prefix), files.new_folder(target) as temporary:
        for name, held in tensors.items():
            if not held:  # a classifier before its first window; a file of nothing cannot be read
                continue
            files.write_safetensors(temporary / f"{name}.safetensors", held)
        files.write_json(temporary / STATE, {"step": step, **state})
    for _, old in checkpoints(folder, prefix)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """The checkpoints there are, oldest first."""
    found = []
    for path in folder.glob(f"{prefix}-*"):
        number = re.fullmatch(rf"{re.escape(prefix)}-(\d+)", path.name)
        if number and (path / STATE).is_file():
            found.append((int(number[1]), path))
    return sorted(found)


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file, and the state."""
    tensors = {
        file.stem: files.read_safetensors(file, "checkpoint", finite=False)[0] for file in path.glob("*.safetensors")
    }
    return tensors, files.read_json(path / STATE, "state of a checkpoint")


def optimizer_tensors(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimizer by `parameter/what`."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` made."""
    for name, parameter in model.named_parameters():
        held = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        if held:
            # Step counts stay on the CPU, as torch keeps them.
            optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in held.items()}
