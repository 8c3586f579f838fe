"""A tiny pipeline with a small random autoencoder at one of its sites."""

import torch
from tiny_diffusion import stable_diffusion

from pysteer.dream.features import Features
from pysteer.families.base import find_family
from pysteer.models.diffusion import ImageGenerator
from pysteer.models.sae import SparseAutoencoder

SITE = "up.1.0"
SETTINGS = {"num_inference_steps": 4}
PROMPTS = ["a red circle", "a blue square", "two circle", "a ugly red", "the blue"]
SEEDS = [11, 12, 13, 14, 15]


def generator() -> ImageGenerator:
    return ImageGenerator(stable_diffusion())


def autoencoder(width: int = 32, latents: int = 20, k: int = 3, activation: str = "topk", seed: int = 0):
    torch.manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, width), dim=1)
    threshold = None if activation != "jumprelu" else torch.full((latents,), 0.4)
    return SparseAutoencoder(
        decoder.clone(), 0.1 * torch.randn(latents), decoder, 0.1 * torch.randn(width), activation,
        k if activation != "jumprelu" else None, threshold, meta={"site": SITE},
    )  # fmt: skip


def features(pipe: ImageGenerator, sae: SparseAutoencoder | None = None, site: str = SITE) -> Features:
    found = find_family(pipe).sites(pipe)[site]
    return Features(found, found.width, sae)
