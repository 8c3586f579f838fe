"""How well an autoencoder reconstructs: error, divergence, PSNR, SSIM, feature distance, and pairs of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.metrics import frechet_distance
from pysteer.recipes.vae.data import Images
from pysteer.recipes.vae.losses import divergence, sized_for_classifier
from pysteer.recipes.vae.pictures import as_pixels
from pysteer.zoo import load_classifier

METRICS = ("mse", "kl", "psnr", "ssim", "feature_distance")
BETTER = {"mse": "lower", "kl": "lower", "psnr": "higher", "ssim": "higher", "feature_distance": "lower"}
_SIDE, _SIGMA = 11, 1.5


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of images [B, C, H, W] in [0, 1], one value each, fp32 [B] (Wang et al. 2004).

    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03; mean over all places where the window fits.
    """
    if a.shape != b.shape or a.dim() != 4 or min(a.shape[-2:]) < _SIDE:
        value = f"{list(a.shape)}, {list(b.shape)}"
        raise InputError("images for SSIM", value=value, allowed=f"equal [B, C, H, W], sides from {_SIDE}")
    offsets = torch.arange(_SIDE, dtype=torch.float64) - _SIDE // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    line = (line / line.sum()).to(a)

    def smooth(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).unflatten(0, x.shape[:2])[
            :, :, 0
        ]

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a.square(), smooth(b * b) - mean_b.square()
    both = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    below = (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    return (above / below).flatten(1).mean(1)


@torch.no_grad()
def evaluate(
    model: Any,
    images: Images,
    *,
    batch_size: int = 64,
    save: int = 0,
    folder: Path | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, float]:
    """Reconstruct images through the mode of the posterior and measure.

    Args:
        model: an AutoencoderKL.
        images: all of them are used.
        batch_size: images at once.
        save: pairs `sample_i_orig.png`, `sample_i_recon.png` that are written to `folder`.
        folder: where the pairs and the grids of their latents `out_i.png` go.
        advance: told the images done.

    Returns:
        `mse` of pixels in [-1, 1]; `kl` summed over a sample, mean over samples; `psnr` in dB of all pixels in [0, 1]
        together, cut to that range; `ssim`, mean over images; `feature_distance`: squared Frechet distance between the
        features of originals and reconstructions, of the bundled shapes classifier (not comparable to FID).
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    judge = load_classifier("shapes").to(device)
    sums = dict.fromkeys(("mse", "kl", "square", "ssim"), 0.0)
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(images), batch_size):
        x = images.batch(range(start, min(start + batch_size, len(images)))).to(device)
        posterior = model.encode(x).latent_dist
        made = model.decode(posterior.mode()).sample.float()
        a, b = (each.clamp(-1, 1).add(1).div(2) for each in (x, made))
        sums["mse"] += float((made - x).double().square().mean()) * len(x)
        sums["kl"] += float(divergence(posterior.mean, posterior.logvar)) * len(x)
        sums["square"] += float((a - b).double().square().mean()) * len(x)
        sums["ssim"] += float(structural_similarity(a, b).double().sum())
        for held, each in zip(features, (x, made.clamp(-1, 1)), strict=True):
            held.append(judge.features(sized_for_classifier(each)).float().cpu())
        if folder is not None and start < save:
            _save_pairs(x, made, posterior.mode(), start, save, folder)
        advance(len(x))
    model.train(was)
    mean = {name: value / len(images) for name, value in sums.items()}
    psnr = 10 * math.log10(1 / mean["square"]) if mean["square"] else math.inf
    distance = frechet_distance(*(torch.cat(held) for held in features)) if len(images) > 1 else math.nan
    return {"mse": mean["mse"], "kl": mean["kl"], "psnr": psnr, "ssim": mean["ssim"], "feature_distance": distance}


def _save_pairs(x: Tensor, made: Tensor, latents: Tensor, start: int, save: int, folder: Path) -> None:
    from pysteer.dynamics import activation_grid

    pairs = zip(as_pixels(x), as_pixels(made), latents, strict=True)
    for number, (original, reconstruction, latent) in enumerate(pairs, start=start):
        if number < save:
            files.write_image(folder / f"sample_{number}_orig.png", original)
            files.write_image(folder / f"sample_{number}_recon.png", reconstruction)
            files.write_image(folder / f"out_{number}.png", activation_grid(latent))


def write_metrics(folder: Path, split: str, place: str, count: int, found: dict[str, float]) -> None:
    """Write `eval_metrics.txt` in the form of published scripts, and `eval_metrics.json`."""
    lines = [
        f"Evaluation Split: {split}",
        f"Checkpoint Path: {place}",
        f"Number of Samples Processed: {count}",
        f"Average MSE: {found['mse']}",
        f"Average KL: {found['kl']}",
        f"Average PSNR: {found['psnr']}",
        f"Average SSIM: {found['ssim']}",
        f"Feature Distance: {found['feature_distance']}",
    ]
    files.write_text(folder / "eval_metrics.txt", "\n".join(lines) + "\n")
    files.write_json(folder / "eval_metrics.json", {"split": split, "samples": count, **found})
