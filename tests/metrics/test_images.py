import pytest
import torch

from pysteer.errors import InputError
from pysteer.metrics import change_outside, object_masks
from pysteer.metrics.images import background_colour


def scene(colour=(200, 30, 30), background=(20, 40, 60)):
    image = torch.tensor(background, dtype=torch.uint8).expand(1, 32, 32, 3).clone()
    image[:, 10:20, 8:22] = torch.tensor(colour, dtype=torch.uint8)
    return image


def test_background_is_the_border_colour():
    assert background_colour(scene()).tolist() == [[20.0, 40.0, 60.0]]


def test_mask_is_the_object():
    want = torch.zeros(1, 32, 32, dtype=torch.bool)
    want[:, 10:20, 8:22] = True
    assert torch.equal(object_masks(scene(), margin=0), want)
    assert object_masks(scene(), margin=2).sum() == 14 * 18


def test_box_fills_what_the_shape_leaves_open():
    ring = scene()
    ring[:, 13:17, 12:18] = torch.tensor((20, 40, 60), dtype=torch.uint8)
    assert object_masks(ring, margin=0).sum() == 140
    assert object_masks(ring, margin=0, box=False).sum() < 140


def test_a_stray_pixel_does_not_widen_the_box():
    noisy = scene()
    noisy[0, 2, 2] = 255
    assert torch.equal(object_masks(noisy), object_masks(scene()))


def test_change_inside_does_not_count_and_outside_does():
    base = scene()
    assert change_outside(base, scene(colour=(0, 0, 255))).item() == 0.0
    moved = scene(background=(20, 40, 111))
    assert change_outside(base, moved).item() == pytest.approx(51 / 3 / 255)


def test_a_picture_without_outside_is_not_measured():
    base = scene()
    assert change_outside(base, base, torch.ones(1, 32, 32, dtype=torch.bool)).isnan().all()


def test_other_sizes_are_refused():
    with pytest.raises(InputError, match="steered"):
        change_outside(scene(), scene()[:, :16])
    with pytest.raises(InputError, match="uint8"):
        object_masks(scene().float())
