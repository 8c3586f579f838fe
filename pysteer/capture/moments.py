"""Moments of activations per site and step: what the simplest methods are fitted from, at O(D) of memory a site."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.ops.channel_moments import ChannelMoments, channel_moments, empty_moments, merge_moments
from pysteer.ops.gram_accumulate import Gram, empty_gram, gram_accumulate, merge_grams

FORMAT = "pysteer-moments-1"
WEIGHTS, CONFIG = "moments.safetensors", "moments.json"
Place = tuple[str, int]


@dataclass
class Moments:
    """Streaming statistics.

    Attributes:
        values: (site, step) -> fp64 `[8, D]` as `channel_moments` gives them.
        grams: (site, step) -> mean and scatter, where they were asked for.
        lasting: sites where what is fitted at step 0 serves all steps.
    """

    values: dict[Place, Tensor] = field(default_factory=dict)
    grams: dict[Place, Gram] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)

    def add(self, site: str, step: int, samples: Tensor, *, gram: bool = False) -> None:
        """Add samples `[n, D]`."""
        if not len(samples):
            return
        place, width = (site, step), samples.shape[-1]
        if place not in self.values:
            self.values[place] = empty_moments(width, samples.device)
        self.values[place] = channel_moments(samples.contiguous(), into=self.values[place])
        if gram:
            if place not in self.grams:
                self.grams[place] = empty_gram(width, samples.device)
            self.grams[place] = gram_accumulate(samples, into=self.grams[place])

    def of(self, site: str, step: int = 0) -> ChannelMoments:
        """Count, mean, variance and so on of a site."""
        if (site, step) not in self.values:
            known = ", ".join(f"{name} step {number}" for name, number in list(self.values)[:12]) or "nothing"
            raise InputError("no moments of", value=f"{site} step {step}", allowed=known)
        return ChannelMoments.of(self.values[site, step])

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples together."""
        merged = Moments({place: values.clone() for place, values in self.values.items()})
        merged.lasting = self.lasting | other.lasting
        for place, values in other.values.items():
            mine = merged.values.get(place)
            if mine is not None and mine.shape != values.shape:
                raise InputError(f"width of {place[0]} to merge", value=values.shape[1], allowed=str(mine.shape[1]))
            merged.values[place] = values.clone() if mine is None else merge_moments(mine, values)
        for place, own in (*self.grams.items(), *other.grams.items()):
            begun = merged.grams.get(place, empty_gram(len(own.mean), own.mean.device))
            merged.grams[place] = merge_grams(begun, own)
        return merged

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `moments.safetensors` and `moments.json` into `folder`."""
        tensors = {f"{site}/{step}/moments": values for (site, step), values in self.values.items()}
        for (site, step), gram in self.grams.items():
            tensors |= {f"{site}/{step}/gram.{name}": part for name, part in gram._asdict().items()}
        files.write_safetensors(Path(folder) / WEIGHTS, tensors)
        files.write_json(Path(folder) / CONFIG, {"format": FORMAT, "lasting": sorted(self.lasting)})
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Moments:
        """Read what `save_pretrained` wrote.

        Raises:
            InputError: a file is missing or damaged, or its tensors have other names or shapes.
        """
        config = files.read_json(Path(folder) / CONFIG, "description of moments")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise InputError("format of moments", value=found, allowed=FORMAT)
        lasting = config.get("lasting")
        if not isinstance(lasting, list) or not all(isinstance(name, str) for name in lasting):
            raise InputError("lasting sites of moments", value=lasting, allowed="a list of names")
        tensors, _ = files.read_safetensors(Path(folder) / WEIGHTS, "moments", finite=False)
        moments = cls(lasting=set(lasting))
        parts: dict[Place, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, kind = _place(name)
            if tensor.dtype != torch.float64:
                raise InputError(f"dtype of {name}", value=str(tensor.dtype), allowed="torch.float64")
            if kind == "moments":
                if tensor.dim() != 2 or len(tensor) != 8:
                    raise InputError(f"shape of {name}", value=list(tensor.shape), allowed="[8, D]")
                moments.values[place] = tensor
            else:
                parts.setdefault(place, {})[kind.removeprefix("gram.")] = tensor
        moments.grams = {place: _gram(place, found) for place, found in parts.items()}
        return moments


def _place(name: str) -> tuple[Place, str]:
    stem, _, kind = name.rpartition("/")
    site, _, step = stem.rpartition("/")
    known = ("moments", *(f"gram.{each}" for each in Gram._fields))
    if not site or not step.isdigit() or kind not in known:
        raise InputError("tensor of moments", value=name, allowed="site/step/" + ", site/step/".join(known))
    return (site, int(step)), kind


def _gram(place: Place, parts: dict[str, Any]) -> Gram:
    if set(parts) != set(Gram._fields):
        raise InputError(f"gram of {place[0]} step {place[1]}", value=", ".join(parts), allowed=", ".join(Gram._fields))
    return Gram(**parts)
