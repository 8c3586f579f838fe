"""One constant vector per site and step: the difference of the class means."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import Method, SiteFit, check_pair, register, tokens_of


@register
@dataclass(frozen=True)
class MeanDifference(Method):
    """`y = x + s v` with `v = mean(target) - mean(source)`, the same for every token (op `affine_shift`, gain 1).

    Args:
        pooled: average each row over its tokens before the class mean. It matters only where rows have different
            numbers of tokens: pooled rows count equally, unpooled tokens do.
    """

    name: ClassVar[str] = "mean_difference"

    pooled: bool = False

    @property
    def op(self) -> str:
        return "affine_shift"

    @property
    def shapes(self) -> dict[str, tuple[str, ...]]:
        return {"gain": ("D",), "bias": ("D",)}

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
    ) -> SiteFit:
        """See `Method.fit_site`; the result does not depend on `paired` beyond the check, nor on `seed`."""
        if negatives is not None:
            raise InputError(
                "negatives with mean_difference",
                value=f"{list(negatives.shape)}",
                allowed="none: one vector for all tokens cannot leave some of them alone",
                fix="use the prototype method, or a row gate",
            )
        source = tokens_of(source, "source", pooled=self.pooled)
        target = tokens_of(target, "target", pooled=self.pooled)
        check_pair(source, target, None, paired)
        bias = (target.double().mean(0) - source.double().mean(0)).float()
        return SiteFit({"gain": torch.ones_like(bias), "bias": bias}, {})
