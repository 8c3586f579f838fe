"""The support of a transport map: the range of values it was fitted on, outside of which it leaves units alone."""

import torch
from torch import Tensor

from pysteer.errors import InputError

ALL = "all"


def check_support(support: str) -> None:
    """Raise an InputError unless `support` is "all" or two percentages such as "0-100" or "0.5-99.5"."""
    _edges(support)


def _edges(support: str) -> tuple[float, float] | None:
    if support == ALL:
        return None
    low, _, high = str(support).partition("-")
    try:
        first, last = float(low), float(high)
    except ValueError:
        first, last = 0.0, 0.0
    if not 0 <= first < last <= 100:
        raise InputError("support", value=support, allowed="all, or percentages low-high such as 0-100 or 1-99")
    return first / 100, last / 100


def support_of(source: Tensor, support: str) -> dict[str, Tensor]:
    """The bounds of every unit as banks of `affine_shift`: `low` and `high` `[D]` fp32, or nothing for "all".

    Args:
        source: activations the map was fitted on, `[n, D]`.
        support: percentages of their distribution, linearly interpolated; values are inside when strictly between.
    """
    edges = _edges(support)
    if edges is None:
        return {}
    ordered = source.double().sort(dim=0).values
    places = [edge * (len(ordered) - 1) for edge in edges]
    values = [torch.lerp(ordered[int(p)], ordered[min(int(p) + 1, len(ordered) - 1)], p - int(p)) for p in places]
    return {"low": values[0].float(), "high": values[1].float()}
