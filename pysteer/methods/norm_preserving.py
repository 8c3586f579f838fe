"""Any method, with every token scaled back to the length it had."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pysteer.methods.base import SiteFit, TokenSets, register
from pysteer.methods.wrapped import Wrapped
from pysteer.ops.channel_moments import ChannelMoments


@register
@dataclass(frozen=True)
class NormPreserving(Wrapped):
    """`y = z |x| / |z|` for every token, with z what the method inside makes of x at the given strength.

    `NormPreserving(MeanDifference())` turns a token instead of moving it. Lengths are those over the channels, in fp32
    with one rounding at the end. It costs two more passes over the activation in eager code.

    Args:
        method, options: the method inside, see `Wrapped`.
    """

    name: ClassVar[str] = "norm_preserving"

    def fit_site(
        self,
        source: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        paired: bool = True,
        seed: int = 0,
        rows: TokenSets | None = None,
    ) -> SiteFit:
        """See `Method.fit_site`; `rows` are the means of the rows, where they cannot be told from the tokens."""
        fit = self.fit_inner(source, target, negatives, paired, seed, rows)
        return fit._replace(options={**fit.options, "keep_norm": True})

    def fit_moments(self, source: ChannelMoments, target: ChannelMoments) -> SiteFit:
        """See `Method.fit_moments`."""
        fit = self.inner.fit_moments(source, target)
        return fit._replace(options={**fit.options, "keep_norm": True})
