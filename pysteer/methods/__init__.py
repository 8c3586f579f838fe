"""Methods: how steering parameters are fitted from activations. One file each; a new file here is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from pysteer.methods.affine_transport import AffineTransport
from pysteer.methods.aura import AurA
from pysteer.methods.base import REGISTRY, Method, SiteFit, create, register
from pysteer.methods.channel_steering import ChannelSteering
from pysteer.methods.contrastive_direction import ContrastiveDirection
from pysteer.methods.gated import Gated
from pysteer.methods.gaussian_transport import GaussianTransport
from pysteer.methods.linear_act import LinearAcT
from pysteer.methods.linear_transport import LinearTransport
from pysteer.methods.mean_difference import MeanDifference
from pysteer.methods.mlp_transport import MLPTransport
from pysteer.methods.norm_preserving import NormPreserving
from pysteer.methods.prototype import Prototype
from pysteer.methods.random_direction import random_direction
from pysteer.methods.row_gate import RowGate
from pysteer.methods.sae_steering import SAESteering
from pysteer.methods.statistics import BayesPrecision
from pysteer.methods.vector_steering import VectorSteering

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "REGISTRY",
    "AffineTransport",
    "AurA",
    "BayesPrecision",
    "ChannelSteering",
    "ContrastiveDirection",
    "Gated",
    "GaussianTransport",
    "LinearAcT",
    "LinearTransport",
    "MLPTransport",
    "MeanDifference",
    "Method",
    "NormPreserving",
    "Prototype",
    "RowGate",
    "SAESteering",
    "SiteFit",
    "VectorSteering",
    "create",
    "random_direction",
    "register",
]
