"""Parameters that somebody has rather than fits: a vector, a few channels, latents of a sparse autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import SiteFit
from pysteer.methods.channel_steering import ChannelSteering
from pysteer.methods.sae_steering import SAESteering
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


def latents(
    site: str,
    sae: Any,
    latents: int | Sequence[int],
    values: float | Sequence[float] = 1.0,
    *,
    mode: str = "add",
    error: str = "keep",
    steps: Sequence[int] | None = None,
) -> SiteParameters:
    """Edit chosen latents of a sparse autoencoder at a site.

    Args:
        site: name of the site, whose activations the autoencoder was trained on.
        sae: a `SparseAutoencoder`, or the folder of one.
        latents: which.
        values: one for all latents or one for each.
        mode: "add", "multiply", "set" or "ablate", see `pysteer.methods.SAESteering`.
        error: "keep", "drop" or "saeuron", see there.
        steps: steps at which it is applied; None for all.
    """
    chosen = (latents,) if isinstance(latents, int) else tuple(latents)
    given = (values,) if isinstance(values, (int, float)) else tuple(values)
    method = SAESteering(sae=sae, latents=chosen, values=given, mode=mode, error=error)
    return _of_fits(site, method.op, [method.given()], steps)


def _of_fits(site: str, op: str, fits: list[SiteFit], steps: Sequence[int] | None) -> SiteParameters:
    """One fit for every step, or one for all of them."""
    sets = fits if steps is None or len(fits) == len(steps) else fits * len(steps)
    tensors = {name: torch.stack([fit.tensors[name] for fit in sets]) for name in fits[0].tensors}
    own, options, shared = None if steps is None else tuple(steps), fits[0].options, fits[0].shared
    return SiteParameters(site, op, own, tensors, dict(options), dict(shared))
