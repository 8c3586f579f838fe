"""How well a single feature tells a label: area under the ROC curve of its activation, per feature and label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """The chance that a positive row has a larger score than a negative one, ties counting half (Mann-Whitney U).

    Args:
        scores: `[N, M]`, a column per feature.
        positive: `[N]` bool.

    Returns:
        `[M]` fp64; NaN where there are no positives or no negatives.
    """
    if scores.dim() != 2 or positive.shape != scores.shape[:1] or positive.dtype is not torch.bool:
        value = f"{list(scores.shape)} and {positive.dtype} {list(positive.shape)}"
        raise InputError("scores and labels", value=value, allowed="[N, M] and bool [N]")
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no:
        return torch.full((scores.shape[1],), torch.nan, dtype=torch.float64)
    total = _ranks(scores)[positive].sum(0)
    return (total - yes * (yes + 1) / 2) / (yes * no)


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 1 of every column, the mean of their places for equal values, fp64 `[N, M]`."""
    ordered = scores.sort(dim=0)
    new = torch.ones_like(ordered.values, dtype=torch.bool)
    new[1:] = ordered.values[1:] != ordered.values[:-1]
    group = new.cumsum(0) - 1
    places = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[:, None].expand_as(scores)
    total = torch.zeros_like(places).scatter_add(0, group, places)
    size = torch.zeros_like(places).scatter_add(0, group, torch.ones_like(places))
    mean = (total / size.clamp_min(1)).gather(0, group)
    return torch.zeros_like(places).scatter(0, ordered.indices, mean)


@dataclass(frozen=True)
class Selectivity:
    """Of M features over N labelled rows.

    Attributes:
        names: `attribute=value` of every label.
        areas: AUROC fp64 `[M, labels]`.
        live: which features were active in any row, `[M]` bool.
    """

    names: tuple[str, ...]
    areas: Tensor
    live: Tensor

    def best(self) -> tuple[Tensor, Tensor]:
        """The largest area of every feature and the number of its label, `[M]` each; live features only count."""
        values, labels = self.areas.nan_to_num(0.0).max(1)
        return torch.where(self.live, values, 0.0), labels

    def share(self, least: float = 0.9) -> float:
        """Share of the live features whose best area is above `least`; NaN without live features."""
        best = self.best()[0][self.live]
        return float((best > least).double().mean()) if len(best) else float("nan")

    def label(self, feature: int, least: float = 0.9) -> str:
        """The label that a feature is selective for, "" for none."""
        values, labels = self.best()
        return self.names[int(labels[feature])] if float(values[feature]) > least else ""


def selectivity(scores: Tensor, labels: Mapping[str, Sequence[str]]) -> Selectivity:
    """Measure all features against all values of all attributes.

    Args:
        scores: activations of N rows, `[N, M]`, for example means over the tokens and steps of an image.
        labels: attribute -> word of every row; a row with "" is left out for that attribute.

    Raises:
        InputError: numbers of rows that do not fit.
    """
    names, areas = [], []
    for attribute, words in labels.items():
        if len(words) != len(scores):
            raise InputError(f"labels {attribute}", value=len(words), allowed=f"{len(scores)}, one per row")
        known = torch.tensor([bool(word) for word in words], device=scores.device)
        told = [word for word in words if word]
        for word in sorted(set(told)):
            names.append(f"{attribute}={word}")
            areas.append(auroc(scores[known], torch.tensor([each == word for each in told], device=scores.device)))
    table = torch.stack(areas, 1) if areas else torch.zeros(scores.shape[1], 0, dtype=torch.float64)
    return Selectivity(tuple(names), table, (scores > 0).any(0))
