"""Configuration of the recipe `infinity-prototype`, and what its `auto` values mean for a pair of classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pysteer.errors import InputError

Location = Literal["auto", "ffn", "ca", "ca_block", "sa", "pooled", "text"]
Kind = Literal["text", "visual", "both"]


@dataclass(frozen=True)
class PrototypeConfig:
    """Every key of the experiment; keys in capitals in a file or on the command line are the same keys.

    Attributes:
        infinity: bundled generator, folder of a pipeline, or a YAML file that names official Infinity weights.
        dataset: `shapes_colors` for the bundled generator, `dogs_cats` for official weights.
        dataset_path: JSON file with prompts of two classes; empty draws prompts for `pairs`.
        pairs: `source->target` words; each becomes one experiment.
        variant: class the steering leads to: 1 the second of a pair, 0 the first.
        steering_type: TEXT, VISUAL, BOTH at once, or EACH of text and visual by itself.
        steering_location: where the visual steering acts; auto is `ca` for colours and `ca_block` for the rest.
            `pooled` is the pooled text vector that drives the AdaLN, `text` the text encoder alone.
        steering_mode: rows that are steered: CONDITIONAL, UNCONDITIONAL or BOTH.
        layers_text: text encoder blocks to steer (`output`: its output, `all`, or `0+1`).
        method: how the visual and text shifts are fitted.
        distance: distance to the prototypes.
        clusters: prototypes per site and scale.
        sequential: fit a site with the earlier ones steered; auto does so at `ca` and `ca_block`.
        scales: scales of the visual steering: auto (the last two at `ca_block`, otherwise all), all, `3-4`, `0+2`.
        layers: layers of the visual steering: all, `0-2`, `3+5`.
        strength: strength of the headline figures (1 moves a token by its fitted shift).
        strengths: strengths of the dose-response figure.
        both_strength: strength of the visual part when text and visual act together; auto is 1 at `ca`, else 0.5.
        prompts: evaluation prompts per pair.
        dose_prompts: how many of them the dose-response figure uses.
        other_prompts: prompts of other classes, to see that the gate leaves them alone; 0 for none.
        fit_pairs: prompt pairs the shifts are fitted on.
        gate_prompts: prompts of the source class, and as many of the others, that the row gate is fitted on.
        gate: steer only the prompts that the row gate takes for the source class.
        gate_threshold: probability of the source class from which on the gate is open; one class among several needs
            less than one half.
        controls: run the controls.
        mean_strength: strength of the control `mean shift at ffn`.
        cfg: guidance; empty takes the generator's own setting.
        tau: temperature; empty takes the generator's own setting.
        batch_size: prompts generated at once.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: seed of prompts, noise and fits.
        experiment_dir: folder with `setup/`, `weights/` and `results/`.
        experiment_setup: steering setup (a JSON file in `setup/`) that replaces scales, layers and strengths.
        grid_path: file name of the side-by-side grid, in `results/` of the experiment folder.
        classifier_weights: classifier in `weights/`; empty takes the bundled one.
        unchanged_saved: saved baseline images in `weights/`; empty generates them and saves them there.
        fid: measure the feature distance of the images.
        sheet_images: images shown per sheet.
    """

    infinity: str = "infinity-shapes"
    dataset: Literal["shapes_colors", "dogs_cats"] = "shapes_colors"
    dataset_path: str = ""
    pairs: tuple[str, ...] = ("circle->square", "red->blue", "green->pink")
    variant: Literal[0, 1] = 1
    steering_type: Literal["EACH", "TEXT", "VISUAL", "BOTH"] = "EACH"
    steering_location: Location = "auto"
    steering_mode: Literal["CONDITIONAL", "UNCONDITIONAL", "BOTH"] = "CONDITIONAL"
    layers_text: str = "output"
    method: Literal["prototype", "mean_difference"] = "prototype"
    distance: Literal["EUCLIDEAN", "MAHALANOBIS"] = "EUCLIDEAN"
    clusters: int = 256
    sequential: Literal["auto"] | bool = "auto"
    scales: str = "auto"
    layers: str = "all"
    strength: float = 1.0
    strengths: tuple[float, ...] = field(default=(0.0, 0.5, 0.75, 1.0, 1.25, 1.5))
    both_strength: Literal["auto"] | float = "auto"
    prompts: int = 304
    dose_prompts: int = 64
    other_prompts: int = 96
    fit_pairs: int = 192
    gate_prompts: int = 768
    gate: bool = True
    gate_threshold: float = 0.1
    controls: bool = True
    mean_strength: float = 4.0
    cfg: float | None = None
    tau: float | None = None
    batch_size: int = 128
    device: str = "auto"
    seed: int = 0
    experiment_dir: str = ""
    experiment_setup: str = ""
    grid_path: str = "grid.png"
    classifier_weights: str = ""
    unchanged_saved: str = ""
    fid: bool = True
    sheet_images: int = 24

    def __post_init__(self) -> None:
        for name, least in (
            ("prompts", 2),
            ("fit_pairs", 2),
            ("dose_prompts", 2),
            ("gate_prompts", 16),
            ("batch_size", 1),
            ("clusters", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(name, value=getattr(self, name), allowed=f"a whole number from {least}")
        if self.other_prompts < 0 or self.sheet_images < 1:
            raise InputError(
                "other_prompts, sheet_images", value=(self.other_prompts, self.sheet_images), allowed=">= 0"
            )
        if not self.pairs and not self.dataset_path:
            raise InputError("pairs", value="none", allowed="source->target", fix="give pairs or dataset_path")
        if self.dataset == "dogs_cats" and not self.dataset_path:
            raise InputError(
                "dataset dogs_cats", value="no dataset_path", fix="give the JSON file with the prompts as DATASET_PATH"
            )
        if self.steering_location == "text" and self.steering_type not in ("TEXT", "EACH"):
            raise InputError(
                "steering_type with steering_location text", value=self.steering_type, allowed="TEXT", fix="use TEXT"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of steering that are run."""
        if self.steering_type == "EACH":
            return ("text",) if self.steering_location == "text" else ("text", "visual")
        table: dict[str, tuple[Kind, ...]] = {"TEXT": ("text",), "VISUAL": ("visual",), "BOTH": ("both",)}
        return table[self.steering_type]

    @property
    def rows(self) -> Literal["cond", "uncond", "both"]:
        """The rows that are steered, in the words of `Plan.build`."""
        table: dict[str, Literal["cond", "uncond", "both"]] = {"CONDITIONAL": "cond", "UNCONDITIONAL": "uncond"}
        return table.get(self.steering_mode, "both")

    def location(self, attribute: str) -> str:
        """Where the visual steering of `attribute` acts."""
        if self.steering_location in ("auto", "text"):
            return "ca" if attribute == "colour" else "ca_block"
        return self.steering_location

    def is_sequential(self, attribute: str) -> bool:
        """Whether the sites are fitted one after the other."""
        return self.location(attribute) in ("ca", "ca_block") if self.sequential == "auto" else bool(self.sequential)

    def scale_text(self, attribute: str, count: int) -> str:
        """The scales of the visual steering as a subset of `count` scales."""
        if self.scales != "auto":
            return self.scales
        return f"{max(0, count - 2)}-{count - 1}" if self.location(attribute) == "ca_block" else "all"

    def visual_share(self, attribute: str) -> float:
        """Strength of the visual part, relative to the text part, when both act together."""
        if self.both_strength != "auto":
            return float(self.both_strength)
        return 1.0 if self.location(attribute) == "ca" else 0.5
