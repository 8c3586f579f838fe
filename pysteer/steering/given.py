"""Parameters that somebody has rather than fits: a vector, a few channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit
from pysteer.methods.channel_steering import ChannelSteering
from pysteer.methods.vector_steering import VectorSteering
from pysteer.steering.plan import SiteParameters


def vector(
    site: str, tensor: Tensor, *, apply: str = "add", value: float = 0.0, steps: Sequence[int] | None = None
) -> SiteParameters:
    """Steer a site by a given vector: `Plan.build([vector("block.10", direction)])`.

    Args:
        site: name of the site.
        tensor: `[D]`, or `[len(steps), D]` for a vector of its own at each step.
        apply: "add" it, or "erase", "project" on, "replace" the component along it, see
            `pysteer.methods.along.change_along`.
        value: what "replace" sets the component to.
        steps: steps at which it is applied; None for all.

    Raises:
        InputError: a shape that does not fit, a direction of zeros, NaN or infinite values.
    """
    if tensor.dim() not in (1, 2) or (tensor.dim() == 2 and len(tensor) != (1 if steps is None else len(steps))):
        allowed = "[D]" if steps is None else f"[D] or [{len(steps)}, D]"
        raise InputError(f"vector for site {site}", value=list(tensor.shape), allowed=allowed)
    method = VectorSteering(apply=apply)
    rows = tensor if tensor.dim() == 2 else tensor[None]
    return _of_fits(site, method.op, [method.given(row, value) for row in rows], steps)


def channels(
    site: str,
    width: int,
    channels: int | Sequence[int],
    values: float | Sequence[float],
    *,
    mode: str = "add",
    steps: Sequence[int] | None = None,
) -> SiteParameters:
    """Steer a few channels of a site by constants.

    Args:
        site: name of the site.
        width: D, how many channels it has.
        channels: which.
        values: one for all channels or one for each.
        mode: "add" the value, "scale" by it, or "set" to it.
        steps: steps at which it is applied; None for all.
    """
    chosen = (channels,) if isinstance(channels, int) else tuple(channels)
    given = (values,) if isinstance(values, (int, float)) else tuple(values)
    method = ChannelSteering(channels=chosen, values=given, mode=mode)
    return _of_fits(site, method.op, [method.given(width)], steps)


def _of_fits(site: str, op: str, fits: list[SiteFit], steps: Sequence[int] | None) -> SiteParameters:
    """One fit for every step, or one for all of them."""
    sets = fits if steps is None or len(fits) == len(steps) else fits * len(steps)
    tensors = {name: torch.stack([fit.tensors[name] for fit in sets]) for name in fits[0].tensors}
    return SiteParameters(site, op, None if steps is None else tuple(steps), tensors, dict(fits[0].options))
