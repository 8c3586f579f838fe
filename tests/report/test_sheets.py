import pytest
import torch
from PIL import ImageFont

from pysteer.errors import InputError
from pysteer.report import Row, comparison_grid, labelled_rows
from pysteer.report.sheets import _fit


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


def test_lines_fit_their_width():
    font = ImageFont.load_default(13)
    words = "a large purple circle at the center on a yellow background"
    lines = _fit(words, font, 120, 2)
    assert len(lines) == 2
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert _fit(words, font, 1000, 2) == [words]
    assert _fit("supercalifragilisticexpialidocious", font, 60, 1)[0].endswith("...")


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
        labelled_rows([Row("a", flat(3, (0, 0, 0))), Row("b", flat(2, (0, 0, 0)))], ["p"] * 3)
    with pytest.raises(InputError, match="float32"):
        labelled_rows([Row("a", torch.zeros(1, 4, 4, 3))])


def test_rows_without_prompts_may_differ_in_length():
    sheet = labelled_rows([Row("a", flat(1, (250, 0, 0))), Row("b", flat(3, (0, 250, 0)))], tile=24)
    last = [sheet.getpixel((sheet.width - 20, y)) for y in range(sheet.height)]
    assert (0, 250, 0) in last
    assert (250, 0, 0) not in last
