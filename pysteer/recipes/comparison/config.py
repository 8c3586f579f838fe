"""Configuration of the recipe `methods`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pysteer.errors import InputError
from pysteer.recipes.prototype.config import PrototypeConfig


@dataclass(frozen=True)
class MethodsConfig:
    """Which methods, on which generator, for which pairs of classes.

    Attributes:
        generator: a bundled generator (infinity-shapes, diffusion-shapes) or the folder of a pipeline that draws the
            captions of the shapes task.
        pairs: `source->target`, two shapes or two colours each.
        methods: `all`, or NAME:option=value+option=value@PLACE; the place is visual (where the class is drawn), text
            (the output of the text encoder), or sites/steps/order such as `ca_block/3-4/sequential`.
        strengths: strengths that are searched; empty takes each method's own.
        refine: how often the search goes on between the best strength and its neighbours, two strengths at a time.
        keep: part of the unsteered rate of every other attribute that a strength has to keep.
        reach: target rate that counts as reached in the summary.
        search_prompts: prompts that choose the strength.
        prompts: fresh prompts that the table is measured on.
        fit_pairs: prompt pairs the methods are fitted on.
        controls: how many of the best methods are measured with shuffled labels too; one gets a random direction.
        settings: further arguments of the generator, for example {cfg: 2}.
        batch_size: prompts generated at once.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: seed of prompts, noise and fits.
        sheet_images: prompts shown in the image sheets.
    """

    generator: str = "infinity-shapes"
    pairs: tuple[str, ...] = ("circle->square", "red->blue")
    methods: tuple[str, ...] = ("all",)
    strengths: tuple[float, ...] = ()
    refine: int = 1
    keep: float = 0.95
    reach: float = 0.85
    search_prompts: int = 48
    prompts: int = 144
    fit_pairs: int = 192
    controls: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 144
    device: str = "auto"
    seed: int = 0
    sheet_images: int = 10

    def __post_init__(self) -> None:
        for name, least in (("search_prompts", 2), ("prompts", 2), ("refine", 0), ("controls", 0), ("sheet_images", 1)):
            if getattr(self, name) < least:
                raise InputError(name, value=getattr(self, name), allowed=f"a whole number from {least}")
        if not self.methods or not self.pairs:
            raise InputError("pairs, methods", value="none", allowed="at least one of each")

    @property
    def drawn(self) -> PrototypeConfig:
        """The same in the words of the parts that draw prompts, generate and judge."""
        return PrototypeConfig(
            prompts=self.search_prompts + self.prompts,
            fit_pairs=self.fit_pairs,
            other_prompts=0,
            gate_prompts=16,
            batch_size=self.batch_size,
            seed=self.seed,
        )
