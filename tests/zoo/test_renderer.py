"""The renderer: determinism and geometry."""

from dataclasses import replace

import pytest
import torch

from pysteer.zoo.shapes.captions import IMAGE_SIDE, RGB, SHAPES, Scene, sample_scenes
from pysteer.zoo.shapes.renderer import DISTANCES, SceneBatch, coverage, render

SCENES = sample_scenes(300, 11)
IMAGES = render(SCENES)


def _scene(shape: str, radius: float = 20.0) -> Scene:
    return Scene(shape, "red", "large", "center", "black", 32.0, 32.0, radius, ("shape", "colour"))


def test_deterministic_and_independent_of_the_batch():
    assert torch.equal(IMAGES, render(SCENES, chunk=7))
    assert torch.equal(IMAGES[5:6], render(SCENES[5:6]))
    assert IMAGES.shape == (300, 3, IMAGE_SIDE, IMAGE_SIDE)
    assert IMAGES.dtype == torch.float32


def test_pixels_inside_have_the_object_colour_and_outside_the_background():
    alpha = coverage(SceneBatch.of(SCENES))[:, 0]
    for image, cover, scene in zip(IMAGES, alpha, SCENES, strict=True):
        inside, outside = cover == 1.0, cover == 0.0
        assert inside.sum() >= 40
        assert outside.sum() > 1000
        assert torch.allclose(image[:, inside], torch.tensor(RGB[scene.colour])[:, None].expand(-1, int(inside.sum())))
        assert torch.equal(
            image[:, outside], torch.tensor(RGB[scene.background])[:, None].expand(-1, int(outside.sum()))
        )


def test_objects_stay_inside_their_radius_and_the_frame():
    alpha = coverage(SceneBatch.of(SCENES))[:, 0]
    grid = torch.arange(IMAGE_SIDE) + 0.5
    for cover, scene in zip(alpha, SCENES, strict=True):
        columns, rows = grid[cover.amax(0) > 0.5], grid[cover.amax(1) > 0.5]
        for found, centre in ((columns, scene.x), (rows, scene.y)):
            assert found.min() >= centre - scene.radius - 0.5
            assert found.max() <= centre + scene.radius + 0.5
            assert found.max() - found.min() >= 1.65 * scene.radius - 2
        assert cover[:1].sum() + cover[-1:].sum() + cover[:, :1].sum() + cover[:, -1:].sum() == 0


AREAS = {
    "circle": torch.pi,
    "square": 4 * 0.88**2,
    "triangle": 1.75,
    "cross": 4 * (2 * 0.97 * 0.36 - 0.36**2),
    "ring": torch.pi * (1 - 0.54**2),
    "star": 10 * 0.5 * 1.05**2 * 0.42 * 0.587785,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_area(shape):
    area = float(coverage(SceneBatch.of([_scene(shape)])).sum())
    assert area == pytest.approx(AREAS[shape] * 20.0**2, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_a_distance_near_the_outline(shape):
    """|grad d| = 1 almost everywhere, so that coverage is a one-pixel ramp along the whole outline."""
    grid = torch.linspace(-1.3, 1.3, 401, dtype=torch.float64)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    distance = DISTANCES[shape](x, y)
    dy, dx = torch.gradient(distance, spacing=float(grid[1] - grid[0]))
    near = distance.abs() < 0.1
    assert ((dx.square() + dy.square()).sqrt()[near] - 1).abs().median() < 1e-3
    assert distance.amin() < 0 < distance.amax()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "ring"])
def test_shapes_are_solid_and_the_ring_is_not(shape):
    middle = coverage(SceneBatch.of([_scene(shape), _scene("ring")]))[:, 0, 32, 32]
    assert middle.tolist() == [1.0, 0.0]


def test_shapes_differ():
    covers = coverage(SceneBatch.of([_scene(shape, 9.0) for shape in SHAPES]))[:, 0]
    for a in range(len(SHAPES)):
        for b in range(a):
            assert (covers[a] - covers[b]).abs().sum() > 30


def test_moving_a_scene_by_whole_pixels_moves_the_picture():
    scene = replace(_scene("star", 10.0), x=24.0, y=30.0)
    moved = replace(scene, x=27.0, y=28.0)
    first, second = coverage(SceneBatch.of([scene, moved]))[:, 0]
    assert torch.allclose(torch.roll(first, (-2, 3), (0, 1)), second, atol=1e-4)
