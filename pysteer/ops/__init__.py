"""The ops that change or read activations: one file each, found by being there.

Every op is an attribute of this package under its own name (`pysteer.ops.affine_shift(...)`), which stands for the
function, not for the module of the same name. Type checkers prefer `from pysteer.ops.affine_shift import affine_shift`.
"""

from pysteer.ops.backends import BackendStatus, backend, backend_status
from pysteer.ops.prepared import Prepared, prepare
from pysteer.ops.registry import Case, OpSpec, SteeringSpec, get, specs, steering_specs

globals().update({spec.name: spec.function for spec in specs().values()})

__all__ = [
    "BackendStatus", "Case", "OpSpec", "Prepared", "SteeringSpec", "backend", "backend_status", "get", "prepare",
    "specs", "steering_specs",
]  # fmt: skip
