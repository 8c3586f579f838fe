"""Splits into training, validation and test parts in which no image is shared between parts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pysteer.errors import InputError

PARTS = (0.70, 0.10, 0.20)  # 70 / 9.9 / 20.1 % in the experiments this follows


@dataclass(frozen=True)
class Split:
    """Indices of the adapters in each part, int64."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def grouped_split(
    labels: Sequence[str], groups: Sequence[int], seed: int, parts: tuple[float, float, float] = PARTS
) -> Split:
    """Split adapters so that groups stay together and classes are spread evenly.

    Args:
        labels: N classes.
        groups: N numbers; adapters with the same one land in the same part (`LoraSet.groups`: a shared image).
        seed: of the shuffling.
        parts: shares of training, validation and test.

    Raises:
        InputError: fewer than two classes, or a part that gets none of a class.
    """
    if len(set(labels)) < 2:
        raise InputError("classes", value=", ".join(sorted(set(labels))) or "none", allowed="at least two",
                         fix="label the adapters: a folder per class, or a JSON file beside each")  # fmt: skip
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))  # large groups first, while there is room everywhere
    wanted = {label: [share * count for share in parts] for label, count in Counter(labels).items()}
    found: tuple[list[int], ...] = ([], [], [])
    for group in order:
        own = Counter(labels[index] for index in members[group])
        need = [sum(wanted[label][part] * count for label, count in own.items()) for part in range(3)]
        place = max(range(3), key=need.__getitem__)
        found[place].extend(members[group])
        for label, count in own.items():
            wanted[label][place] -= count
    for name, chosen in zip(("training", "validation", "test"), found, strict=True):
        missing = sorted(set(labels) - {labels[i] for i in chosen})
        if missing:
            raise InputError(f"{name} part of the split lacks classes", value=", ".join(missing[:4]),
                             fix="more adapters of the class, or of images that others do not share")  # fmt: skip
    return Split(*(np.array(sorted(chosen), dtype=np.int64) for chosen in found))
