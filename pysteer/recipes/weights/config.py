"""Configuration of the recipe `weightspace`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pysteer.errors import InputError
from pysteer.weightspace.classify import MODELS
from pysteer.weightspace.families import FAMILIES

# Words of other programs for feature families, as flags: `--flat-vec` is flat_vec=true.
_FLAGS = {
    "flat_vec": "flat", "stats_flat_vec": "stats-flat", "stats_concat": "stats", "dense": "delta-stats",
    "pca_flat_vec": "pca",
}  # fmt: skip


@dataclass(frozen=True)
class WeightspaceConfig:
    """What can be read from the weights of a collection, and what steering along them does.

    Attributes:
        dataset: folder of adapters, of a collection, or of a weight-space data set (Parquet or Arrow).
        fixed_init: a second collection whose adapters all started from the same factors, measured beside it.
        labels: only these classes; two of them make the two-class experiment. Empty for all.
        per_class: at most so many adapters per class; 0 for all.
        families: feature families; `all`, or some of them. `pca` is `flat` cut to its first components.
        flat_vec: only the flat vector; several of these flags add up.
        stats_flat_vec: 5 statistics of the flat vector.
        stats_concat: 5 statistics of every factor.
        pca_flat_vec: principal components of the flat vector.
        dense: 5 statistics of every change B A.
        components: how many principal components `pca` keeps.
        models: ridge, linear, boosting, mlp, mlp3.
        best_models: models that are tried beside on the best family.
        runs: splits and initialisations.
        ablation: how many of the best layers are left out one after the other; 0 for no ablation by layer.
        generator: pipeline that edited adapters are tried on; empty for none.
        directions: `source->target` classes of the collection; empty for a shape and a colour where there are such.
        strengths: how far adapters are moved; 1 takes the mean of one class to that of the other.
        edit_rank: rank of edited adapters.
        edit_adapters: adapters that are edited, per direction.
        edit_images: pictures per edited adapter and strength.
        map: the plot of all adapters: pca, tsne (scikit-learn) or umap (umap-learn).
        seed: of splits, initial weights and noise.
    """

    dataset: str = "collection"
    fixed_init: str = ""
    labels: tuple[str, ...] = ()
    per_class: int = 0
    families: tuple[str, ...] = ("all",)
    flat_vec: bool = False
    stats_flat_vec: bool = False
    stats_concat: bool = False
    pca_flat_vec: bool = False
    dense: bool = False
    components: int = 100
    models: tuple[str, ...] = ("ridge", "mlp")
    best_models: tuple[str, ...] = ("linear", "boosting")
    runs: int = 10
    ablation: int = 5
    generator: str = ""
    directions: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
    edit_rank: int = 4
    edit_adapters: int = 8
    edit_images: int = 8
    map: str = field(default="pca")
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"per_class": 0, "components": 1, "runs": 1, "ablation": 0, "edit_rank": 1, "edit_adapters": 1,
                 "edit_images": 1}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(name, value=getattr(self, name), allowed=f"a whole number from {value}")
        for name, known in (("families", (*FAMILIES, "pca", "all")), ("models", MODELS), ("best_models", MODELS)):
            for given in getattr(self, name):
                if given not in known:
                    raise InputError(name, value=given, allowed=", ".join(known))
        if not self.models or not self.families:
            raise InputError("models, families", value="none", allowed="at least one of each")
        if self.map not in ("pca", "tsne", "umap"):
            raise InputError("map", value=self.map, allowed="pca, tsne, umap")
        if len(set(self.labels)) == 1:
            raise InputError("labels", value=self.labels[0], allowed="none, or two and more")

    @property
    def chosen_families(self) -> tuple[str, ...]:
        """The families to be measured, in their order."""
        flagged = [family for flag, family in _FLAGS.items() if getattr(self, flag)]
        wanted: list[Any] = flagged or list(self.families)
        every = (*FAMILIES, "pca")
        return tuple(family for family in every if family in wanted or "all" in wanted)
