"""Steer and read the activations of image generators and language models.

Attributes load on first use, so `import pysteer` needs neither a GPU, nor Triton, nor the compiled extension:

    steer      context manager that applies a plan to a model or a pipeline
    bake       fold a plan into the weights of a plain copy of the model
    bake_lora  the same as a LoRA
    Plan       what to change, where, when and how strongly
    backend    choose which kernels run ("reference", "cpu", "triton", "cuda")
    fit        fit a method at a list of sites
    Examples   prompts of two classes that run once for any number of fits
    Method     base class of the methods
    zoo        the bundled generators
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysteer import zoo
    from pysteer.capture.examples import Examples
    from pysteer.capture.fit import fit
    from pysteer.capture.fitted import Fitted
    from pysteer.errors import InputError, PysteerError
    from pysteer.methods import Method
    from pysteer.ops import backend
    from pysteer.steering import Plan, Site, SiteParameters, steer
    from pysteer.steering.bake import bake, bake_lora

__version__ = "0.1.0"

_ATTRIBUTES = {
    "steer": "pysteer.steering",
    "bake": "pysteer.steering",
    "bake_lora": "pysteer.steering",
    "Plan": "pysteer.steering",
    "Site": "pysteer.steering",
    "SiteParameters": "pysteer.steering",
    "backend": "pysteer.ops",
    "fit": "pysteer.capture",
    "Examples": "pysteer.capture",
    "Fitted": "pysteer.capture",
    "Method": "pysteer.methods",
    "InputError": "pysteer.errors",
    "PysteerError": "pysteer.errors",
}
_MODULES = frozenset(
    (
        "capture",
        "errors",
        "families",
        "files",
        "methods",
        "metrics",
        "models",
        "ops",
        "recipes",
        "report",
        "steering",
        "zoo",
    )
)

__all__ = [
    "Examples",
    "Fitted",
    "InputError",
    "Method",
    "Plan",
    "PysteerError",
    "Site",
    "SiteParameters",
    "__version__",
    "backend",
    "bake",
    "bake_lora",
    "fit",
    "steer",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pysteer.{name}")
    if name in _ATTRIBUTES:
        value = getattr(import_module(_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pysteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ATTRIBUTES, *_MODULES})
