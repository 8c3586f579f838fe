"""What SteerBench measures: cells, each a concept, a method at a place, a number of examples, and a seed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from pysteer.data.concepts import concept_names, concept_sentences


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        generator: a bundled generator or smollm2.
        concept: see `bench.steerbench.images.CONCEPTS`, or a concept of `pysteer.data` for a language model.
        method: NAME:option=value@PLACE, as in `pysteer run methods`.
        pairs: examples per side that it is fitted on.
        seed: of prompts, noise and fit.
        control: empty, or `shuffled` (labels of the examples) or `random` (direction): what must not work.
    """

    generator: str
    concept: str
    method: str
    pairs: int
    seed: int
    control: str = ""

    @property
    def key(self) -> str:
        """Its name in files."""
        text = f"{self.generator}-{self.concept}-{self.method}-{self.pairs}-{self.seed}-{self.control}"
        return "".join(c if c.isalnum() else "-" for c in text).strip("-")


@dataclass(frozen=True)
class Sizes:
    """How much a run measures.

    Attributes:
        seeds: how many seeds.
        pairs: examples per side.
        efficiency: further numbers of examples, measured with the first seeds (`efficiency_seeds`).
        search: prompts that choose the strength.
        prompts: fresh ones that are counted.
        beside: prompts of other classes.
        efficiency_seeds: see there.
    """

    seeds: int = 5
    pairs: int = 96
    efficiency: tuple[int, ...] = (8, 32, 128, 512)
    efficiency_seeds: int = 2
    search: int = 20
    prompts: int = 48
    beside: int = 32


QUICK = Sizes(seeds=2, pairs=32, efficiency=(8,), efficiency_seeds=1, search=12, prompts=24, beside=12)

# Add a method: one more line, NAME:option=value@PLACE. Every method gets the same number of strengths to search, the
# same examples and the same prompts.
IMAGE_METHODS = (
    "mean_difference@visual",
    "linear_act:pooled=false@visual",
    "gaussian_transport:pooled=false@visual",
    "affine_transport:rank=8@visual",
    "prototype:clusters=64@visual",
    "mean_difference@text",
    "contrastive_direction:apply=replace@text",
    "prototype:clusters=64@text",
)
FEW_METHODS = ("mean_difference@visual", "affine_transport:rank=8@visual", "prototype:clusters=64@text")
TEXT_METHODS = ("mean_difference@block.18", "linear_act@block.18", "prototype:clusters=8@block.18")
# The best of these are also fitted on other numbers of examples, and have controls.
CONTROLLED = ("prototype:clusters=64@visual", "prototype:clusters=64@text", "mean_difference@block.18")

# Add a model: a generator that `pysteer.models.load.load_model` knows, what it is asked, and which methods.
SUITE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "infinity-shapes": (("shape", "colour", "both", "negation"), IMAGE_METHODS),
    "diffusion-shapes": (("colour",), FEW_METHODS),
    "smollm2": (("football", "food"), TEXT_METHODS),
}
QUICK_SUITE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "infinity-shapes": (("shape", "colour"), ("mean_difference@visual", "affine_transport:rank=8@visual",
                                              "prototype:clusters=64@visual", "prototype:clusters=64@text")),
    "smollm2": (("football",), ("mean_difference@block.18",)),
}  # fmt: skip


@functools.cache  # asked for every row of the board
def main_pairs(concept: str, pairs: int) -> int:
    """Examples per side that the methods are compared with: `pairs`, or all sentences that there are of a concept."""
    return min(pairs, *map(len, concept_sentences(concept))) if concept in concept_names() else pairs


def cells_of(suite: dict[str, tuple[tuple[str, ...], tuple[str, ...]]], sizes: Sizes) -> list[Cell]:
    """All cells, generator by generator: methods over seeds, then controls, then other numbers of examples."""
    found: list[Cell] = []
    for generator, (concepts, methods) in suite.items():
        for concept in concepts:
            every = main_pairs(concept, sizes.pairs)
            others = [pairs for pairs in sizes.efficiency if main_pairs(concept, pairs) == pairs != every]
            for seed in range(sizes.seeds):
                found += [Cell(generator, concept, method, every, seed) for method in methods]
            for method in (m for m in methods if m in CONTROLLED):
                for seed in range(sizes.efficiency_seeds):
                    found += [Cell(generator, concept, method, every, seed, c) for c in ("shuffled", "random")]
                    found += [Cell(generator, concept, method, pairs, seed) for pairs in others]
    return found


def plain(value: Any) -> Any:
    """NaN as None, for JSON."""
    return None if isinstance(value, float) and value != value else value
