"""Collections of LoRA adapters: read them, understand them, steer with them."""

from importlib import import_module
from typing import Any

_PLACES = {
    "Adapter": "adapter", "LowRank": "adapter", "read_adapter": "adapter", "LoraSet": "loraset",
    "import_dataset": "dataset", "export_dataset": "dataset", "features": "families", "FAMILIES": "families",
    "Pca": "components", "pca": "components", "canonical_set": "canonical", "delta_gram": "canonical",
    "nearest": "canonical", "similarity": "canonical", "Directions": "directions", "Direction": "directions",
    "negate": "directions", "attached": "attaching", "layer_inputs": "attaching", "predicted_shifts": "attaching",
    "plan_of": "attaching", "shift_cosines": "attaching", "Task": "classify", "measure": "classify",
    "Outcome": "classify",
    "invert": "inversion", "Inversion": "inversion",
}  # fmt: skip

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
