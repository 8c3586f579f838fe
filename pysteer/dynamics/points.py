"""Which tensors of a model are watched: chosen by kind of module, by path, or by regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pysteer.errors import InputError
from pysteer.steering.site import brief, did_you_mean

CAPTURES = ("input", "output")
_NORMS = ("GroupNorm", "LayerNorm", "RMSNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
KINDS = ("all", "conv", "norm", "linear")

Layers = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """A tensor that a module takes or returns.

    Attributes:
        path: path of the module in the model.
        capture: "output", or "input" for its first argument.
        channel_dim: where the channels are: 1, -1, or None when that follows from the number of dimensions (1 from
            four dimensions on, else the last).
        width: number of channels; 0 when it is not known before the model runs.
    """

    path: str
    capture: str = "output"
    channel_dim: int | None = None
    width: int = 0

    @property
    def name(self) -> str:
        """`path.output` or `path.input`."""
        return f"{self.path}.{self.capture}"


def is_kind(module: nn.Module, kind: str) -> bool:
    """Whether a module is of a kind: one of `KINDS`, or the name of its class."""
    if kind == "conv":
        return isinstance(module, _ConvNd)
    if kind == "norm":
        return isinstance(module, _BatchNorm) or type(module).__name__ in _NORMS
    if kind == "linear":
        return isinstance(module, nn.Linear)
    if kind == "all":
        return any(is_kind(module, each) for each in ("conv", "norm", "linear"))
    return type(module).__name__ == kind


def _shape_of(module: nn.Module, capture: str) -> tuple[int | None, int]:
    """Channel dimension and width of what a module takes or returns, as far as its class says."""
    if isinstance(module, _ConvNd):
        return 1, module.out_channels if capture == "output" else module.in_channels
    if isinstance(module, nn.GroupNorm):
        return 1, module.num_channels
    if isinstance(module, _BatchNorm):
        return 1, module.num_features
    if isinstance(module, nn.Linear):
        return -1, module.out_features if capture == "output" else module.in_features
    if type(module).__name__ in ("LayerNorm", "RMSNorm"):
        shape = getattr(module, "normalized_shape", None)
        return -1, int(shape[-1]) if shape else 0
    return None, 0


def point_of(modules: Mapping[str, nn.Module], path: str, capture: str) -> Point:
    """The point of a module by its path."""
    channel_dim, width = _shape_of(modules[path], capture)
    return Point(path, capture, channel_dim, width)


def _known(modules: Mapping[str, nn.Module], path: str) -> str:
    """`path`, or what is left of it without the `vae.` that a wrapper would put in front."""
    return path.removeprefix("vae.") if path not in modules and path.startswith("vae.") else path


def _find(modules: Mapping[str, nn.Module], text: str) -> list[str]:
    """Paths that one word of a choice stands for, in the model's order."""
    path = _known(modules, text)
    if path in modules:
        return [path]
    found = [name for name, module in modules.items() if is_kind(module, text)]
    if found:
        return found
    try:
        expression = re.compile(text)
    except re.error as error:
        raise InputError("pattern of layers", value=text, allowed=f"a regular expression ({error})") from error
    found = [name for name in modules if expression.fullmatch(name)]
    if not found:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        allowed = f"a module path, a pattern, {', '.join(KINDS)}, {brief(kinds)}"
        fix = did_you_mean(path, [*modules, *kinds, *KINDS])
        raise InputError("no layer of the model", value=text, allowed=allowed, fix=fix)
    return found


def choose_points(model: nn.Module, layers: Layers = "all") -> list[Point]:
    """The points that a choice of layers names, each once, in the order of the choice.

    Args:
        model: any module.
        layers: one or several of: "all" (convolutions, norms and linear layers), "conv", "norm", "linear"; the name of
            a class ("GroupNorm"); a module path; a regular expression for whole paths; several of these joined by "+"
            ("conv+GroupNorm"). A path may end in ".input" or ".output" (the default). Mappings with the keys `name` and
            `capture_point` are taken as well.

    Raises:
        InputError: a name that fits nothing, with the nearest one that does.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    asked = [layers] if isinstance(layers, (str, Mapping)) else list(layers)
    chosen: dict[str, Point] = {}
    for item in asked:
        if isinstance(item, Mapping):
            words, capture = [str(item.get("name", ""))], str(item.get("capture_point", "output"))
        else:
            words, capture = [item] if _known(modules, item) in modules else item.split("+"), "output"
        if capture not in CAPTURES:
            raise InputError(f"capture point of {words[0]}", value=capture, allowed=", ".join(CAPTURES))
        for word in words:
            stem, _, end = word.rpartition(".")
            at = end if end in CAPTURES and word not in modules else capture
            for path in _find(modules, stem if at == end else word):
                point = point_of(modules, path, at)
                chosen.setdefault(point.name, point)
    if not chosen:
        raise InputError("layers", value="none", allowed="at least one", fix='layers="all"')
    return list(chosen.values())


def first_tensor(value: Any) -> Tensor | None:
    """The tensor in what a module takes or returns: itself, or the first one of a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)
