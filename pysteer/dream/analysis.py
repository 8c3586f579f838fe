"""When a feature is active: frequency, mean and largest activation by timestep, intervals, peaks and examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysteer import files
from pysteer.dream.capture import Block, read_blocks
from pysteer.dream.examples import TopExamples
from pysteer.dream.features import RAW
from pysteer.dream.parts import Parts
from pysteer.errors import InputError

_SORTED = "analysis of features"


@dataclass(frozen=True)
class Analysis:
    """Of M features at S timesteps, sorted from small to large.

    Attributes:
        kind, role: which features, which rows.
        timesteps: fp32 `[S]`.
        frequency: share of the rows that have the feature among their `top_k`, fp32 `[M, S]`.
        mean, most: mean and largest activation (mean over the tokens of a row), fp32 `[M, S]`.
        active: share of the rows where the feature is above 0, fp32 `[M, S]`.
        example_values, example_rows: the rows that activate a feature most, `[M, S, m]`; -1 where there are fewer.
        rows: number of rows.
    """

    kind: str
    role: str
    timesteps: Tensor
    frequency: Tensor
    mean: Tensor
    most: Tensor
    active: Tensor
    example_values: Tensor
    example_rows: Tensor
    rows: int

    @property
    def live(self) -> Tensor:
        """Features that some row has among its `top_k`, `[M]` bool."""
        return (self.frequency > 0).any(1)

    def activity(self) -> Tensor:
        """Frequency summed over the timesteps, fp32 `[M]`."""
        return self.frequency.sum(1)

    def active_steps(self, feature: int) -> list[int]:
        """Places in `timesteps` at which the feature is among the `top_k` of some row."""
        return (self.frequency[feature] > 0).nonzero()[:, 0].tolist()

    def intervals(self, feature: int) -> list[tuple[float, float]]:
        """First and last timestep of every stretch at which the feature is active."""
        found = []
        for _, run in itertools.groupby(enumerate(self.active_steps(feature)), lambda pair: pair[1] - pair[0]):
            places = [place for _, place in run]
            found.append((float(self.timesteps[places[0]]), float(self.timesteps[places[-1]])))
        return found

    def profile(self, feature: int, total: int = 1000) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Frequency at the timesteps 0 to `total`: linear between those captured, 0 outside them."""
        return np.interp(
            np.arange(total + 1), self.timesteps.numpy(), self.frequency[feature].numpy(), left=0.0, right=0.0
        )

    def peaks(
        self, feature: int, *, threshold: float = 0.0, separation: int = 100, most: int = 3, total: int = 1000
    ) -> list[tuple[int, float]]:
        """Timestep and height of the highest peaks of the profile, highest first (`scipy.signal.find_peaks`)."""
        from scipy.signal import find_peaks  # type: ignore[import-untyped]

        profile = self.profile(feature, total)
        places, found = find_peaks(profile, height=threshold, distance=max(separation, 1), plateau_size=1)
        heights = found["peak_heights"]
        order = np.lexsort((places, -heights))[:most]
        return [(int(places[i]), float(heights[i])) for i in order if heights[i] > 0]

    def step_of(self, timestep: float) -> int:
        """The place in `timesteps` that is nearest to a timestep."""
        return int((self.timesteps - timestep).abs().argmin())

    def save(self, path: Path) -> Path:
        """Write it as safetensors."""
        tensors = {n: getattr(self, n) for n in _TENSORS}
        return files.write_safetensors(path, tensors, {"kind": self.kind, "role": self.role, "rows": str(self.rows)})

    @classmethod
    def load(cls, path: Path) -> Analysis:
        """Read what `save` wrote."""
        tensors, meta = files.read_safetensors(path, _SORTED, finite=False)
        if set(tensors) != set(_TENSORS) or "rows" not in meta:
            raise InputError(_SORTED, value=str(path), fix="run the stage timestep_analysis again")
        return cls(meta["kind"], meta["role"], rows=int(meta["rows"]), **tensors)


_TENSORS = ("timesteps", "frequency", "mean", "most", "active", "example_values", "example_rows")


def analyse(
    parts: Parts,
    kind: str,
    role: str = "cond",
    *,
    top_k: int = 20,
    examples: int = 20,
    advance: Callable[[float], object] | None = None,
) -> Analysis:
    """Go through the captured blocks once, in memory that does not grow with them.

    Args:
        parts: what `capture_features` wrote.
        kind: "raw" or "sae".
        role: "cond" or "uncond".
        top_k: a row counts for a feature at a step if the feature is among so many that are largest there.
        examples: rows kept per feature and step, those with the largest activation.
        advance: told 1 after every block.

    Raises:
        InputError: nothing captured of this kind, or `top_k` beyond what was kept.
    """
    totals: _Totals | None = None
    for block in read_blocks(parts, kind, role):
        kept, latents = block.tensors["values"].shape[2], block.tensors["sum"].shape[1]
        if top_k > kept and kept < latents:
            raise InputError("top_k of the analysis", value=top_k, allowed=f"1 to {kept}, as many as were captured")
        if totals is None:
            totals = _Totals(latents, block.timesteps, examples)
        totals.add(kind, block, top_k)
        if advance is not None:
            advance(1)
    if totals is None:
        raise InputError("captured blocks", value=0, fix="run the stage capture first")
    return totals.result(kind, role)


class _Totals:
    """What is added up over the blocks, of M features at S steps."""

    def __init__(self, latents: int, timesteps: Tensor, examples: int) -> None:
        self.shape = (latents, len(timesteps))
        self.timesteps, self.rows = timesteps, 0
        self.sum = torch.zeros(self.shape, dtype=torch.float64)
        self.active = torch.zeros(self.shape, dtype=torch.float64)
        self.most = torch.full(self.shape, -torch.inf)
        self.count = torch.zeros(latents * len(timesteps), dtype=torch.int64)
        self.best = TopExamples(latents * len(timesteps), examples)

    def add(self, kind: str, block: Block, top_k: int) -> None:
        found = block.tensors
        self.sum += found["sum"].T.double()
        self.active += found["active"].T.double()
        self.most = torch.maximum(self.most, found["max"].T)
        self.rows += len(block.rows)
        slots, values, rows = _entries(kind, found["values"][..., :top_k], found["indices"][..., :top_k], block.rows)
        self.count += torch.bincount(slots, minlength=len(self.count))
        self.best.add(slots, values, rows)

    def result(self, kind: str, role: str) -> Analysis:
        order = self.timesteps.argsort()
        found = {
            "frequency": (self.count.view(self.shape) / self.rows).float(),
            "mean": (self.sum / self.rows).float(),
            "active": (self.active / self.rows).float(),
            "most": self.most,
            "example_values": self.best.values.view(*self.shape, -1),
            "example_rows": self.best.rows.view(*self.shape, -1),
        }
        by_time = {name: value[:, order] for name, value in found.items()}
        return Analysis(kind, role, self.timesteps[order].float(), rows=self.rows, **by_time)


def _entries(kind: str, values: Tensor, indices: Tensor, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (of latents: those above 0) as slot `feature * S + step`, value and row, in the order of the rows."""
    n, steps, k = values.shape
    numbers = torch.tensor([row["row"] for row in rows])[:, None, None].expand(n, steps, k)
    place = torch.arange(steps)[None, :, None].expand(n, steps, k)
    slots = indices.long() * steps + place
    kept = ((values > 0) | torch.tensor(kind == RAW)).flatten()
    return slots.flatten()[kept], values.flatten()[kept], numbers.flatten()[kept]


def image_scores(parts: Parts, kind: str, role: str, count: int) -> Tensor:
    """Activation of every feature in every captured image, fp32 `[N, M]`: the mean over the steps of what was kept.

    What is not among the features kept of a row and step counts as 0.

    Args:
        parts, kind, role: as for `analyse`.
        count: M.
    """
    found = []
    for block in read_blocks(parts, kind, role):
        values, indices = block.tensors["values"], block.tensors["indices"].long()
        scores = torch.zeros(len(values), count)
        for step in range(values.shape[1]):
            scores.scatter_add_(1, indices[:, step], values[:, step])
        found.append(scores / values.shape[1])
    return torch.cat(found)
