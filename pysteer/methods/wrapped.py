"""What methods share that put something around another method."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, TokenSets, create


@dataclass(frozen=True)
class Wrapped(Method):
    """A method around another one, which is given as such or by its name and options.

    Attributes:
        method: the method inside, or its name.
        options: its options, when it is given by name; afterwards all of them.
    """

    method: str | Method = "mean_difference"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.method, Method) and self.options:
            fix = f'give method="{self.method.name}"'
            raise InputError(f"options of {self.name}", value="given beside a method", allowed="none", fix=fix)
        inner = self.method if isinstance(self.method, Method) else create(self.method, **self.options)
        object.__setattr__(self, "method", inner.name)
        object.__setattr__(self, "options", inner.config())

    @cached_property
    def inner(self) -> Method:
        """The method inside."""
        return create(str(self.method), **self.options)

    @property
    def pooled(self) -> bool:
        return self.inner.pooled

    @property
    def op(self) -> str:
        return self.inner.op

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return self.inner.shapes

    @property
    def needs_rows(self) -> bool:
        return self.inner.needs_rows

    def options_of_layout(self, layout: str) -> dict[str, Any]:
        """See `Method.options_of_layout`."""
        return self.inner.options_of_layout(layout)

    def fit_inner(
        self,
        source: Tensor,
        target: Tensor,
        negatives: Tensor | None,
        paired: bool,
        seed: int,
        rows: TokenSets | None,
    ) -> SiteFit:
        """Fit the method inside, from the means of the rows where it pools and they are given."""
        given: dict[str, Any] = {"paired": paired, "seed": seed}
        if self.inner.needs_rows and rows is not None:
            given["rows"] = rows
        elif self.inner.pooled and rows is not None:
            source, target, negatives = rows.source, rows.target, None if negatives is None else rows.negatives
        return self.inner.fit_site(source, target, negatives=negatives, **given)
