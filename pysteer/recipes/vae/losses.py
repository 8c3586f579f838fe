"""Terms of the loss: reconstruction and divergence, and if wanted features of a classifier and a discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pysteer.zoo import load_classifier
from pysteer.zoo.shapes.captions import IMAGE_SIDE


def sized_for_classifier(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] scaled to what the bundled classifier takes."""
    if images.shape[-2:] == (IMAGE_SIDE, IMAGE_SIDE):
        return images
    return F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", antialias=True)


class FeatureLoss(nn.Module):
    """Mean squared difference of normalised feature maps at every stage of the bundled shapes classifier.

    The form of LPIPS (Zhang et al. 2018) without its learnt weights, with another network; not comparable to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = load_classifier("shapes").trunk.requires_grad_(False).eval()

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        a, b = sized_for_classifier(made.float()), sized_for_classifier(images.float())
        total = made.new_zeros((), dtype=torch.float32)
        for stage in self.trunk:
            a, b = stage(a), stage(b)
            total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
        return total


class Discriminator(nn.Module):
    """A small patch discriminator: images [B, 3, H, W] -> scores [B, 1, h, w], trained with the hinge loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator from its scores."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of a posterior from the unit Gaussian, summed over each sample, mean over the batch, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
