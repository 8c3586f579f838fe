"""`pysteer grid`: write a family of setup files, one for every combination of scales, layers and strengths."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pysteer.errors import InputError
from pysteer.recipes.config import build_config, parse_words
from pysteer.recipes.setup_file import ScaleSetup, Setup, write_setup

_MOST = 100_000


@dataclass(frozen=True)
class GridConfig:
    """What is combined with what.

    A subset of scales or layers is written `all`, `none`, `3-4` or `0+2+5`; lists of subsets and of strengths are
    separated by commas: `scales=all,3-4 strength_cond=1,2,4`.

    Attributes:
        scales: subsets of scales; those outside a subset get strength 0.
        layers: subsets of layers, steered at every scale of the subset.
        strength_cond: strengths of the conditional rows.
        strength_uncond: strengths of the unconditional rows.
        strength_text: strengths of the text steering.
        layers_text: subsets of text encoder blocks; `output` is the encoder's output.
        model_scales: number of scales of the model (the bundled generator has 5, Infinity 125M at 256 px has 7).
        model_layers: number of layers of the model (6; Infinity 125M has 12).
        prefix: start of the file names.
    """

    scales: tuple[str, ...] = ("all",)
    layers: tuple[str, ...] = ("all",)
    strength_cond: tuple[float, ...] = (1.0,)
    strength_uncond: tuple[float, ...] = (0.0,)
    strength_text: tuple[float, ...] = (0.0,)
    layers_text: tuple[str, ...] = ("output",)
    model_scales: int = 5
    model_layers: int = 6
    prefix: str = "setup"


def parse_subset(text: str, count: int, what: str) -> tuple[int, ...]:
    """`all`, `none`, `3-4`, `0+2+5` or mixtures of the last two as sorted numbers below `count`."""
    word = text.strip().lower()
    if word in ("all", "none"):
        return tuple(range(count)) if word == "all" else ()
    numbers: set[int] = set()
    for part in word.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= count:
            raise InputError(
                f"subset of {what}",
                value=text,
                allowed=f"all, none, or 0 to {count - 1} as 3-4 or 0+2",
                fix="correct it",
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def _text_layers(text: str) -> tuple[int, ...] | None:
    word = text.strip().lower()
    if word in ("output", "all"):
        return None if word == "output" else (-1,)
    return parse_subset(word, 1000, "text layers")


def setups(config: GridConfig) -> Iterator[tuple[str, Setup]]:
    """(file name, setup) of every combination, in a fixed order."""
    dimensions = (config.scales, config.layers, config.strength_cond, config.strength_uncond, config.strength_text)
    for scales, layers, cond, uncond, text, text_layers in itertools.product(*dimensions, config.layers_text):
        chosen = parse_subset(scales, config.model_scales, "scales")
        places = parse_subset(layers, config.model_layers, "layers")
        whole = None if places == tuple(range(config.model_layers)) else places
        on, off = ScaleSetup(whole, cond, uncond), ScaleSetup((), 0.0, 0.0)
        entries = {scale: on if scale in chosen else off for scale in range(config.model_scales)}
        name = f"{config.prefix}_scales-{scales}_layers-{layers}_cond-{cond:g}_uncond-{uncond:g}_text-{text:g}"
        name += "" if len(config.layers_text) == 1 else f"_textlayers-{text_layers}"
        yield f"{name.strip()}.json", Setup(entries, _text_layers(text_layers), text)


def _count(config: GridConfig) -> int:
    lists = (config.scales, config.layers, config.strength_cond, config.strength_uncond, config.strength_text)
    return math.prod(len(values) for values in (*lists, config.layers_text))


def write_grid(folder: str | Path, words: Sequence[str] = (), *, dry_run: bool = False) -> list[Path]:
    """Write the setup files of the `key=value` words (see `GridConfig`) into `folder`; returns their paths.

    `dry_run` returns the paths and writes nothing. Raises `InputError` before anything is written: a word that cannot
    be used, an empty list, more than 100 000 files, two combinations of the same name, or a file that is there already.
    """
    config = build_config(GridConfig, parse_words(words))
    total = _count(config)
    if not 1 <= total <= _MOST:
        raise InputError("setup files", value=total, allowed=f"1 to {_MOST}", fix="give every list 1 to a few values")
    if not re.fullmatch(r"[\w.-]+", config.prefix):
        raise InputError("prefix", value=config.prefix, allowed="letters, digits, '.', '-' and '_'", fix="rename it")
    entries = list(setups(config))
    target = Path(folder)
    paths = [target / name for name, _ in entries]
    if len(set(paths)) != len(paths):
        raise InputError("combinations", value="two with one name", allowed="different values", fix="drop duplicates")
    there = [path for path in paths if path.exists()]
    if there and not dry_run:
        raise InputError(
            f"{len(there)} of {len(paths)} setup files exist already",
            value=str(there[0]),
            fix="choose another folder or prefix, or remove them",
        )
    if not dry_run:
        for path, (_, setup) in zip(paths, entries, strict=True):
            write_setup(path, setup)
    return paths
