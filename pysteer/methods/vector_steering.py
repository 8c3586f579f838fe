"""A given vector: added, or its direction erased, kept alone or replaced. Nothing is fitted."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.along import APPLY, change_along, op_along, shapes_along
from pysteer.methods.base import Method, SiteFit, check_choice, register


@register
@dataclass(frozen=True)
class VectorSteering(Method):
    """`y = x + s v` with a vector that somebody has, or another change along it (`pysteer.steering.vector`).

    Args:
        apply: "add", "erase", "project" or "replace", see `pysteer.methods.along.change_along`.
    """

    name: ClassVar[str] = "vector_steering"

    apply: str = "add"

    def __post_init__(self) -> None:
        check_choice("change along a vector", self.apply, APPLY)

    @property
    def op(self) -> str:
        return op_along(self.apply)

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return shapes_along(self.apply)

    def given(self, vector: Tensor, value: float = 0.0) -> SiteFit:
        """Parameters for `vector` `[D]`; `value` is what "replace" sets the component to."""
        return change_along(vector.detach(), self.apply, value)

    def fit_site(self, source: Tensor, target: Tensor, **_: Any) -> SiteFit:
        """Refuses: there is nothing to fit."""
        raise InputError(
            "fit of vector_steering",
            value="activations",
            allowed="a vector",
            fix="pysteer.steering.vector(site, tensor), or the method contrastive_direction",
        )
