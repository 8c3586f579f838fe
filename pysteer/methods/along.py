"""What methods share that change an activation along one direction: add to it, erase it, keep only it, replace it."""

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit

APPLY = ("add", "erase", "project", "replace")


def op_along(apply: str) -> str:
    """The op of a change along a direction."""
    return "affine_shift" if apply == "add" else "low_rank_shift"


def shapes_along(apply: str) -> dict[str, tuple[str, ...]]:
    """Tensors of that op, see `Method.shapes`."""
    if apply == "add":
        return {"gain": ("D",), "bias": ("D",)}
    return {"read": ("r", "D"), "write": ("r", "D"), "bias": ("D",)}


def change_along(direction: Tensor, apply: str, value: float = 0.0) -> SiteFit:
    """Parameters of a change along `direction` `[D]`, with `u` the vector of length 1.

    - "add": `y = x + s direction`, the length counts.
    - "erase": `y = x - s (x.u) u`.
    - "project": `y = x + s ((x.u) u - x)`, what is left at s = 1 is the component along `u`.
    - "replace": `y = x + s (value - x.u) u`, at s = 1 the component along `u` is `value`.

    Raises:
        InputError: a direction of zeros, or with NaN or infinite values.
    """
    if direction.dim() != 1 or not bool(torch.isfinite(direction).all()):
        raise InputError("direction", value=f"{list(direction.shape)}", allowed="[D], finite")
    long = direction.double()
    if apply == "add":
        bias = long.float()
        return SiteFit({"gain": torch.ones_like(bias), "bias": bias}, {})
    if not bool(long.any()):
        raise InputError("direction", value="zeros", allowed="a vector with a length")
    unit = (long / long.norm())[None]
    if apply == "project":  # the identity minus its part along u, through a basis of the rest
        basis, _ = torch.linalg.qr(unit.T, mode="complete")
        unit = basis[:, 1:].T
    bias = value * unit[0] if apply == "replace" else torch.zeros_like(long)
    read = unit.float().contiguous()
    return SiteFit({"read": read, "write": -read, "bias": bias.float()}, {})
