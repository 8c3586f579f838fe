"""The published scale schedules."""

from itertools import pairwise

import pytest

from pysteer.errors import InputError
from pysteer.models.infinity.schedule import (
    ASPECT_RATIOS,
    SCALE_COUNTS,
    image_size,
    nearest_aspect_ratio,
    rope_schedule,
    scale_schedule,
)

LAST_GRIDS = {1.0: (64, 64), 1.333: (72, 54), 0.75: (54, 72), 0.666: (52, 78), 3.0: (111, 37), 0.333: (37, 111)}
SIDES = {"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}
TOKENS = {"0.06M": 521, "0.25M": 2521, "0.60M": 6425, "1M": 10521}


@pytest.mark.parametrize("pn", SCALE_COUNTS)
def test_square_token_counts(pn: str) -> None:
    schedule = scale_schedule(pn)
    assert len(schedule) == SCALE_COUNTS[pn]
    assert sum(h * w for h, w in schedule) == TOKENS[pn]
    assert image_size(schedule) == (SIDES[pn], SIDES[pn])


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("pn", SCALE_COUNTS)
def test_every_schedule_has_its_ratio_and_grows(pn: str, ratio: float) -> None:
    schedule = scale_schedule(pn, ratio)
    h, w = schedule[-1]
    assert schedule[0] == (1, 1)
    assert abs(h / w - ratio) < 0.01
    assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(schedule))
    assert rope_schedule(schedule) == scale_schedule("1M", ratio)


def test_fifteen_ratios_and_their_last_grids() -> None:
    assert len(ASPECT_RATIOS) == 15
    for ratio, grid in LAST_GRIDS.items():
        assert scale_schedule("1M", ratio)[-1] == grid


def test_nearest_ratio() -> None:
    assert nearest_aspect_ratio(9 / 16) == 0.571
    assert nearest_aspect_ratio(1.02) == 1.0
    assert nearest_aspect_ratio(50.0) == 3.0
    assert scale_schedule("0.06M", 1.26) == scale_schedule("0.06M", 1.25)


def test_own_schedule_sets_its_own_unit() -> None:
    own = [(1, 1), (2, 2), (4, 4), (6, 6), (8, 8)]
    assert rope_schedule(own) == own


@pytest.mark.parametrize(("pn", "ratio", "value"), [("2M", 1.0, "2M"), ("1M", 0.0, "0.0"), ("1M", float("nan"), "nan")])
def test_bad_input_names_the_value(pn: str, ratio: float, value: str) -> None:
    with pytest.raises(InputError, match=value):
        scale_schedule(pn, ratio)
