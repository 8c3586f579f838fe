import pytest
import torch

from pysteer.errors import InputError
from pysteer.report import Row, comparison_grid, labelled_rows


def flat(count, *colours):
    return torch.tensor([colours[i % len(colours)] for i in range(count)], dtype=torch.uint8)[:, None, None].expand(
        count, 8, 8, 3
    )


def test_grid_shows_every_pair_side_by_side():
    base, steered = flat(3, (250, 0, 0)), flat(3, (0, 0, 250))
    grid = comparison_grid(base, steered, ["a prompt"] * 3, columns=2, tile=32)
    counts = {colour: count for count, colour in grid.getcolors(1 << 20)}
    assert counts[250, 0, 0] == counts[0, 0, 250] == 3 * 32 * 32
    row = [grid.getpixel((x, 40)) for x in range(grid.width)]
    assert row.index((250, 0, 0)) < row.index((0, 0, 250))


def test_prompts_are_drawn_and_cut_not_overflowing():
    base = flat(1, (250, 0, 0))
    short = comparison_grid(base, base, ["circle"], tile=32)
    long = comparison_grid(base, base, ["a very long prompt " * 30], tile=32)
    assert short.size == long.size
    assert short.tobytes() != long.tobytes()


def test_rows_carry_labels_and_images_in_order():
    rows = [Row("strength 0", flat(4, (250, 0, 0))), Row("strength 1", flat(4, (0, 250, 0)), "visual")]
    sheet = labelled_rows(rows, ["p"] * 4, tile=24)
    column = [sheet.getpixel((sheet.width - 20, y)) for y in range(sheet.height)]
    assert column.index((250, 0, 0)) < column.index((0, 250, 0))
    other = labelled_rows([Row("strength 9", rows[0].images), rows[1]], ["p"] * 4, tile=24)
    assert sheet.tobytes() != other.tobytes()


def test_unequal_counts_are_named():
    with pytest.raises(InputError, match="3 baseline, 2 steered"):
        comparison_grid(flat(3, (0, 0, 0)), flat(2, (0, 0, 0)), ["p"] * 3)
    with pytest.raises(InputError, match="columns"):
        labelled_rows([Row("a", flat(3, (0, 0, 0))), Row("b", flat(2, (0, 0, 0)))])
    with pytest.raises(InputError, match="float32"):
        labelled_rows([Row("a", torch.zeros(1, 4, 4, 3))])
