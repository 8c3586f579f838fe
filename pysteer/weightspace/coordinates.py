"""What a classifier gets of a feature family: standardised by the training part alone.

Features are z-scored with mean and deviation of the training part; constant ones become 0. Where there are more
features than training rows, rows are expressed in the space that the training rows span, a rotation that loses nothing
a linear model could use; inner products between changes (`delta`) give such coordinates without any features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.weightspace.families import Features
from pysteer.weightspace.splits import Split


@dataclass(frozen=True)
class Coordinates:
    """fp32 `[n, K]` of each part; a row of the training part has about one unit of variance per coordinate.

    Attributes:
        train, val, test: the parts.
        principal: whether the coordinates of the training part are orthogonal to each other and of mean zero.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    principal: bool = False


def coordinates(features: Features, split: Split, keep: int | None = None) -> Coordinates:
    """Coordinates of the parts of a split.

    Args:
        features: of all adapters.
        split: its parts.
        keep: only so many principal coordinates of the training part (the family `flat` with `keep=100` is the PCA
            experiment); all when None.
    """
    parts = (split.train, split.val, split.test)
    if features.values is not None:
        train, val, test = (features.values[torch.from_numpy(index)].float() for index in parts)
        mean, std = train.mean(0), train.std(0, correction=0)
        std = torch.where(std > 1e-8 * (1e-30 + mean.abs()), std, torch.full_like(std, torch.inf))
        train, val, test = ((each - mean) / std for each in (train, val, test))
        if keep is None and train.shape[1] <= len(train):
            return Coordinates(train, val, test)
        gram, cross = (train @ train.T).double(), [(each @ train.T).double() for each in (val, test)]
    else:
        assert features.products is not None
        k = features.products
        index = [torch.from_numpy(each) for each in parts]
        inner = k[index[0]][:, index[0]]
        column = inner.mean(0)
        gram = inner - column - column[:, None] + inner.mean()
        cross = []
        for each in index[1:]:
            block = k[each][:, index[0]]
            cross.append(block - block.mean(1, keepdim=True) - column + inner.mean())
    values, vectors = torch.linalg.eigh(gram)
    good = values > 1e-9 * values[-1].clamp_min(1e-300)
    good[:1] = False  # centred values have no length along (1, ..., 1); what fp32 products leave there is noise
    values, vectors = values[good].flip(0), vectors[:, good].flip(1)
    if keep is not None:
        values, vectors = values[:keep], vectors[:, :keep]
    if not len(values):
        train, val, test = (torch.zeros(len(index), 1) for index in parts)
        return Coordinates(train, val, test)
    unit = (values.sum() / (len(gram) * len(values))).sqrt()  # mean variance of a coordinate
    root = values.sqrt()
    made = [vectors * root, *(block @ (vectors / root) for block in cross)]
    train, val, test = ((each / unit).float() for each in made)
    return Coordinates(train, val, test, principal=True)
