"""Measures, statistics and data of the recipe `vae-dynamics`."""

import gzip
import math
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from side_by_side import run_ranks

from pysteer.errors import InputError
from pysteer.recipes.vae.config import DataPart
from pysteer.recipes.vae.data import LETTERS, Images, find_fonts, from_picture, of_table, open_images
from pysteer.recipes.vae.evaluate import evaluate, structural_similarity
from pysteer.recipes.vae.losses import divergence
from pysteer.recipes.vae.model import plant
from pysteer.recipes.vae.paired import compare_pairs, student_quantile, student_tail


def _ssim_by_formula(a: np.ndarray, b: np.ndarray) -> float:
    """Mean SSIM of one channel, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            both = (weight * (p - mp) * (q - mq)).sum()
            above = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
            found.append(above / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(found))


def test_structural_similarity_is_its_formula():
    a, b = torch.rand(2, 3, 16, 14), torch.rand(2, 3, 16, 14)
    expected = [np.mean([_ssim_by_formula(a[i, c].numpy(), b[i, c].numpy()) for c in range(3)]) for i in range(2)]
    torch.testing.assert_close(structural_similarity(a, b).double(), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(structural_similarity(a, a), torch.ones(2))
    with pytest.raises(InputError, match="from 11"):
        structural_similarity(a[..., :8], b[..., :8])


def test_divergence_is_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(torch.randn(3, 8, 4, 4))
    torch.testing.assert_close(divergence(posterior.mean, posterior.logvar), posterior.kl().mean())


def test_measures_of_a_known_reconstruction():
    """A model that adds 0.1 to every pixel: MSE 0.01 in [-1, 1], 0.0025 in [0, 1]."""

    class Posterior:
        def __init__(self, x: torch.Tensor) -> None:
            self.mean, self.logvar = x, torch.zeros_like(x)

        def mode(self) -> torch.Tensor:
            return self.mean

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor(0.1))

        def encode(self, x: torch.Tensor) -> object:
            return type("Encoded", (), {"latent_dist": Posterior(x)})

        def decode(self, z: torch.Tensor) -> object:
            return type("Decoded", (), {"sample": z + self.shift})

    pixels = torch.rand(10, 3, 16, 16) * 1.6 - 0.8
    found = evaluate(Shifted(), Images(10, lambda numbers: pixels[list(numbers)], "random"), batch_size=4)
    assert found["mse"] == pytest.approx(0.01, rel=1e-5)
    assert found["psnr"] == pytest.approx(10 * math.log10(1 / 0.0025), rel=1e-5)
    assert found["kl"] == pytest.approx(float(0.5 * pixels.square().flatten(1).sum(1).mean()), rel=1e-5)
    assert 0 < found["ssim"] < 1
    assert found["feature_distance"] > 0


def test_student():
    from scipy import stats

    for freedom in (1, 2, 3, 4, 7, 30):
        for t in (0.0, 0.3, 1.7, 6.0):
            assert student_tail(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-12)
        assert student_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_paired_comparison_is_that_of_scipy():
    from scipy import stats

    a, b = [1.0, 2.0, 3.5, 2.2, 1.9], [1.2, 2.1, 3.9, 2.1, 2.4]
    found, known = compare_pairs(a, b), stats.ttest_rel(b, a)
    assert found.p_t == pytest.approx(known.pvalue)
    interval = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    flips = stats.permutation_test(([y - x for x, y in zip(a, b, strict=True)],), np.mean, permutation_type="samples")
    assert found.p_signs == pytest.approx(flips.pvalue)
    assert math.isnan(compare_pairs([1.0], [2.0]).low)
    with pytest.raises(InputError):
        compare_pairs([1.0], [])


def test_glyphs_are_split_by_glyph_and_the_same_whatever_the_limit(tmp_path):
    import matplotlib

    fonts = f"{matplotlib.get_data_path()}/fonts/ttf"
    data = DataPart(path=fonts, resolution=16, max_samples=None, validation_max_samples=None)
    train, held = open_images(data, "train"), open_images(data, "test", validation=True)
    assert 0.5 < (len(train) + len(held)) / (len(find_fonts(fonts)) * len(LETTERS)) <= 1
    assert len(held) > 100
    some = open_images(DataPart(path=fonts, resolution=16, max_samples=10), "train")
    x = some.batch(range(len(some)))
    assert 5 < len(x) <= 10
    assert torch.equal(x, train.batch(range(len(x))))
    assert x.shape[1:] == (3, 16, 16)
    assert x.amin() < 0 < x.amax() <= 1
    assert all(picture.amin() < picture.amax() for picture in x)
    with pytest.raises(InputError, match="fonts-"):
        open_images(DataPart(path=str(tmp_path)), "train")


def test_fashion_mnist_is_read_and_damage_is_said(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    raw = struct.pack(">4i", 2051, 5, 28, 28) + pixels.tobytes()
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(raw))
    data = DataPart(dataset_name="fashion-mnist", path=str(tmp_path), resolution=32, max_samples=4)
    images = open_images(data, "train")
    assert len(images) == 4
    x = images.batch([3])
    torch.testing.assert_close(x[0, 1, 2:30, 2:30], torch.from_numpy(pixels[3]).float() / 127.5 - 1)
    assert bool((x[0, :, :2] == -1).all())
    path.write_bytes(gzip.compress(raw[:-9]))
    with pytest.raises(InputError, match="cannot be read"):
        open_images(data, "train")
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        open_images(data, "test")


def test_shapes_differ_between_the_splits():
    data = DataPart(dataset_name="shapes", resolution=32, max_samples=6, validation_max_samples=6)
    train, held = open_images(data, "train").batch(range(6)), open_images(data, "test", validation=True).batch(range(6))
    assert train.shape == (6, 3, 32, 32)
    assert not torch.equal(train, held)
    assert torch.equal(train[2:4], open_images(data, "train").batch([2, 3]))


def test_tables_of_the_hub_are_taken_under_both_names_of_the_column():
    class Rows(list):
        column_names = ("img", "label")

    rows = Rows({"img": Image.new("L", (40, 30), 255 * (i % 2)), "label": i} for i in range(4))
    images = of_table(rows, DataPart(resolution=16), "rows")
    assert images.batch([0, 1]).amax((1, 2, 3)).tolist() == [-1, 1]
    with pytest.raises(InputError, match="img, label"):
        of_table(rows, DataPart(image_column="picture"), "rows")
    rows[2]["img"] = None
    with pytest.raises(InputError, match="image 2 of rows"):
        images.batch([2])


def test_pictures_are_scaled_by_the_short_side_and_cut_in_the_middle():
    picture = Image.new("RGB", (64, 32))
    picture.paste((255, 0, 0), (16, 0, 48, 32))
    x = from_picture(picture, 32)
    assert x.shape == (3, 32, 32)
    assert bool((x[0] == 1).all())
    assert bool((x[1:] == -1).all())


def test_planting_spreads_over_kinds_and_leaves_no_group_dead():
    norm = torch.nn.GroupNorm(4, 32)
    model = torch.nn.Sequential(norm, torch.nn.Conv2d(3, 3, 1), torch.nn.GroupNorm(1, 3))
    before = norm.weight.detach().clone()
    done = plant(model, 0.2)
    assert {name: len(channels) for name, channels in done.items()} == {"0": 6, "2": 1}
    assert (norm.weight != before).sum() == 6
    assert set(done["0"].values()) == {"scale 0", "scale 1e-4", "shift only"}
    assert int((norm.weight.view(4, 8) != 1).sum(1).max()) <= 3
    assert plant(model, 0.0) == {}


def test_two_processes_train_nudge_and_resume_alike(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_ranks(Path(__file__).parent / "rank_of_vae.py", str(tmp_path), str(port))
    held = [tmp_path / f"{rank}-{run}.pt" for run in range(2) for rank in range(2)]
    first, second, again, other = (torch.load(path, weights_only=True) for path in held)
    assert first["rows"] == second["rows"] != []
    for a in (second, again, other):
        assert all(torch.equal(x, y) for x, y in zip(first["weights"], a["weights"], strict=True))
        # A checkpoint in the middle of a window merges the ranks earlier, in another order.
        torch.testing.assert_close(first["last"], a["last"], rtol=1e-12, atol=1e-14)
    assert torch.equal(first["last"], second["last"])
    assert again["rows"] == first["rows"]
    assert int(first["last"][0, 0]) == 2 * 2 * 2 * 16 * 16  # steps, processes, rows of a batch, pixels
