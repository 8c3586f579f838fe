"""The published scale schedules of Infinity: which grids of tokens are generated, coarse to fine.

A schedule is a list of token grids `(h, w)`. There is one per aspect ratio (15 of them) and image size (`0.06M`,
`0.25M`, `0.60M`, `1M` pixels); the smaller sizes are the first 7, 10 and 12 scales of the 13 of `1M`. With spatial
patchify the grids stay the same and the tokenizer works on grids twice as large.
Source: FoundationVision/Infinity, `infinity/utils/dynamic_resolution.py` (the figures only).
"""

import math
from collections.abc import Sequence

from pysteer.errors import InputError

Schedule = list[tuple[int, int]]

PIXELS_PER_TOKEN = 16
SCALE_COUNTS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# height / width: heights, then widths, of the 13 scales
_TALL: dict[float, tuple[str, str]] = {
    1.0: ("1 2 4 6 8 12 16 20 24 32 40 48 64", "1 2 4 6 8 12 16 20 24 32 40 48 64"),
    1.25: ("1 2 3 5 10 15 20 25 30 35 45 55 70", "1 2 3 4 8 12 16 20 24 28 36 44 56"),
    1.333: ("1 2 4 8 12 16 20 24 28 36 48 60 72", "1 2 3 6 9 12 15 18 21 27 36 45 54"),
    1.5: ("1 2 3 6 9 15 21 27 33 39 48 63 78", "1 2 2 4 6 10 14 18 22 26 32 42 52"),
    1.75: ("1 2 3 7 11 14 21 28 35 42 56 70 84", "1 2 3 4 6 8 12 16 20 24 32 40 48"),
    2.0: ("1 2 4 6 10 16 22 30 38 46 60 74 90", "1 2 2 3 5 8 11 15 19 23 30 37 45"),
    2.5: ("1 2 5 10 15 20 25 30 40 50 65 80 100", "1 2 2 4 6 8 10 12 16 20 26 32 40"),
    3.0: ("1 2 6 9 15 21 27 36 45 54 72 90 111", "1 2 2 3 5 7 9 12 15 18 24 30 37"),
}


def _templates() -> dict[float, Schedule]:
    table: dict[float, Schedule] = {}
    for ratio, (heights, widths) in _TALL.items():
        grids = [(int(h), int(w)) for h, w in zip(heights.split(), widths.split(), strict=True)]
        table[ratio] = grids
        if ratio != 1.0:  # the wide twin; its name is cut, not rounded, to three decimals
            table[int(1 / ratio * 1000) / 1000] = [(w, h) for h, w in grids]
    return table


_TEMPLATES = _templates()
ASPECT_RATIOS: tuple[float, ...] = tuple(_TEMPLATES)
_FULL_OF = {
    tuple(full[:count]): tuple(full) for full in _TEMPLATES.values() for count in SCALE_COUNTS.values()
}  # published schedule -> the 1M schedule of its aspect ratio


def nearest_aspect_ratio(h_div_w: float) -> float:
    """The published height/width ratio with the smallest absolute difference to `h_div_w`.

    Raises:
        InputError: `h_div_w` is not a positive finite number.
    """
    if not (math.isfinite(h_div_w) and h_div_w > 0):
        raise InputError("aspect ratio (height / width)", value=h_div_w, allowed="a positive number", fix="use 1.0")
    return min(ASPECT_RATIOS, key=lambda ratio: abs(h_div_w - ratio))


def scale_schedule(pn: str = "0.06M", h_div_w: float = 1.0) -> Schedule:
    """The token grids `(h, w)` of one image, coarse to fine.

    Args:
        pn: image size: `0.06M` (7 scales, 256 x 256 pixels when square), `0.25M` (10, 512), `0.60M` (12, 768) or
            `1M` (13, 1024).
        h_div_w: height / width; the nearest of the 15 published ratios is used.

    Raises:
        InputError: unknown `pn`, or an impossible ratio.
    """
    if pn not in SCALE_COUNTS:
        raise InputError("image size pn", value=pn, allowed=", ".join(SCALE_COUNTS), fix="choose one of them")
    return _TEMPLATES[nearest_aspect_ratio(h_div_w)][: SCALE_COUNTS[pn]]


def image_size(schedule: Sequence[tuple[int, int]], pixels_per_token: int = PIXELS_PER_TOKEN) -> tuple[int, int]:
    """Height and width in pixels of the image that `schedule` ends in."""
    h, w = schedule[-1]
    return h * pixels_per_token, w * pixels_per_token


def rope_schedule(schedule: Sequence[tuple[int, int]]) -> Schedule:
    """The schedule whose last grid sets the unit of the rotary position coordinates.

    The published models count positions in cells of the largest (`1M`) grid of the aspect ratio, also when they
    generate small images: a published schedule gives the 13 scales of its ratio. Any other schedule gives itself.
    """
    own = tuple((int(h), int(w)) for h, w in schedule)
    return list(_FULL_OF.get(own, own))
