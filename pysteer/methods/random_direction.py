"""The control every steering result needs: the same size of change in a direction that means nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit


def random_direction(op: str, tensors: Mapping[str, Tensor], options: Mapping[str, Any], seed: int = 0) -> SiteFit:
    """Replace the direction of fitted shifts by one random unit vector, keeping every token's shift norm.

    A token that the fitted parameters move by a vector of length `a` is moved by `a r`, with one `r` uniform on the
    sphere for the whole parameter set: the strongest form of the control, since the moves of different tokens add up.

    Args:
        op: the op the parameters belong to.
        tensors: its tensors without the leading parameter-set dimension, as `Method.fit_site` gives them.
        options: the op's options.
        seed: seed of the direction.

    Returns:
        New parameters; the tensors that choose the prototype are the same objects.

    Raises:
        InputError: the shift's norm depends on the token (a gain other than 1, `pull`), so no table can keep it.
    """
    if op == "affine_shift":
        if not bool((tensors["gain"] == 1).all()):
            raise InputError("random direction of affine_shift", value="a gain other than 1", allowed="gain 1")
        return SiteFit({**tensors, "bias": _random_like(tensors["bias"], seed)}, dict(options))
    if op == "prototype_shift" and not options.get("pull", False):
        return SiteFit({**tensors, "delta": _random_like(tensors["delta"], seed)}, dict(options))
    raise InputError(
        "random direction of the same norm",
        value=f"{op} with options {dict(options)}",
        allowed="affine_shift with gain 1, prototype_shift without pull",
    )


def _random_like(shift: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(shift.shape[-1], generator=generator, dtype=torch.float64)
    direction = (direction / direction.norm()).float().to(shift.device)
    return shift.norm(dim=-1, keepdim=True) * direction
