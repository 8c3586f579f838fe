import pytest
import torch

from pysteer.errors import InputError
from pysteer.recipes.prototype.painter import load_sheets, save_sheets


@pytest.mark.parametrize(("count", "height", "width"), [(1, 8, 8), (5, 16, 8), (33, 8, 8), (9, 2048, 2048)])
def test_sheets_give_back_the_very_same_images(tmp_path, count, height, width):
    images = torch.randint(0, 256, (count, height // 8, width // 8, 3), dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2)
    paths = save_sheets(images, tmp_path / "a.png")
    assert len(paths) == (3 if height == 2048 else 1)
    assert torch.equal(load_sheets(tmp_path / "a.png", count, height, width), images)


def test_missing_or_foreign_sheets_are_named(tmp_path):
    with pytest.raises(InputError, match=r"a\.png"):
        load_sheets(tmp_path / "a.png", 3, 8, 8)
    save_sheets(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), tmp_path / "a.png")
    with pytest.raises(InputError, match="overwrite"):
        load_sheets(tmp_path / "a.png", 4, 8, 8)
