"""Methods: how steering parameters are fitted from activations. One file each; a new file here is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from pysteer.methods.aura import AurA
from pysteer.methods.base import REGISTRY, Method, SiteFit, create, register
from pysteer.methods.gaussian_transport import GaussianTransport
from pysteer.methods.linear_act import LinearAcT
from pysteer.methods.mean_difference import MeanDifference
from pysteer.methods.prototype import Prototype
from pysteer.methods.random_direction import random_direction
from pysteer.methods.row_gate import RowGate
from pysteer.methods.statistics import BayesPrecision

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REGISTRY",
    "AurA",
    "BayesPrecision",
    "GaussianTransport",
    "LinearAcT",
    "MeanDifference",
    "Method",
    "Prototype",
    "RowGate",
    "SiteFit",
    "create",
    "random_direction",
    "register",
]
