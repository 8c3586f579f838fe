"""Small generators and judges that come with the package, weights included."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from pysteer.errors import InputError, did_you_mean

FOLDER = Path(__file__).resolve().parent

# name -> (folder of the weights, module, class with from_pretrained)
_GENERATORS = {
    "infinity-shapes": ("infinity-shapes", "pysteer.models.infinity.pipeline", "InfinityPipeline"),
    "diffusion-shapes": ("diffusion-shapes", "pysteer.models.diffusion", "ImageGenerator"),
}
# sparse autoencoders, each trained on one site of the generator that its name begins with
_AUTOENCODERS = {
    "diffusion-shapes": ("diffusion-shapes-sae", "pysteer.models.sae", "SparseAutoencoder"),
    "diffusion-shapes-attention": ("diffusion-shapes-attention-sae", "pysteer.models.sae", "SparseAutoencoder"),
}
_CLASSIFIERS = {"shapes": ("shapes-classifier", "pysteer.zoo.shapes.classifier", "ShapeClassifier")}


def available() -> dict[str, list[str]]:
    """The names that ``load``, ``load_classifier`` and ``load_autoencoder`` take."""
    return {
        "generators": sorted(_GENERATORS),
        "classifiers": sorted(_CLASSIFIERS),
        "autoencoders": sorted(_AUTOENCODERS),
    }


def _load(kind: str, table: dict[str, tuple[str, str, str]], name: str) -> Any:
    if name not in table:
        known = ", ".join(sorted(table))
        fix = did_you_mean(name, table) or "use one of these names"
        raise InputError(f"{kind} of the zoo", value=name, allowed=known, fix=fix)
    folder, module, cls = table[name]
    return getattr(import_module(module), cls).from_pretrained(FOLDER / folder)


def load(name: str = "infinity-shapes") -> Any:
    """The pipeline of a bundled generator, on the CPU in fp32; InputError for an unknown name."""
    return _load("generator", _GENERATORS, name)


def load_classifier(name: str = "shapes") -> Any:
    """A bundled classifier, on the CPU in fp32, in eval mode; InputError for an unknown name."""
    return _load("classifier", _CLASSIFIERS, name)


def load_autoencoder(name: str = "diffusion-shapes") -> Any:
    """A bundled sparse autoencoder, on the CPU in fp32; InputError for an unknown name.

    "diffusion-shapes" reads the output of a transformer block, where shapes show; "diffusion-shapes-attention" that of
    the last cross-attention, where the caption's colour enters.
    """
    return _load("autoencoder", _AUTOENCODERS, name)
