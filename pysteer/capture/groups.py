"""Which rows and tokens of a batch are source, target and negative, and which source token belongs to which target."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.methods.base import TokenSets


@dataclass(frozen=True)
class Groups:
    """A batch of `source` rows, then `target` rows, then `negatives` rows.

    Attributes:
        paired: row i of the source belongs to row i of the target.
        source_positions, target_positions: for paired texts, the valid token positions of each row that belong
            together, per row int64 `[n_i]`; None where texts have equal tokens or no texts are involved.
    """

    source: int
    target: int
    negatives: int = 0
    paired: bool = True
    source_positions: tuple[Tensor, ...] | None = None
    target_positions: tuple[Tensor, ...] | None = None

    @property
    def rows(self) -> int:
        return self.source + self.target + self.negatives

    def split(self, x: Tensor, lengths: Tensor | None, pooled: bool) -> TokenSets:
        """The token sets of `x` `[rows, L, D]`; with `lengths` only valid tokens, averaged per row if `pooled`."""
        if lengths is None:
            source, target, negatives = self._rows(x)
        elif pooled:
            source, target, negatives = self._rows(valid_means(x, lengths))
        else:
            return self._ragged(x, lengths)
        return TokenSets(source, target, negatives if self.negatives else None)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source, target, negatives = x.split((self.source, self.target, self.negatives))
        return source, target, negatives

    def _ragged(self, x: Tensor, lengths: Tensor) -> TokenSets:
        valid = [torch.arange(int(length), device=x.device) for length in lengths]
        source, target = valid[: self.source], valid[self.source : self.source + self.target]
        negatives = valid[self.source + self.target :]
        if self.paired:
            if self.source_positions is not None and self.target_positions is not None:
                source = [positions.to(x.device) for positions in self.source_positions]
                target = [positions.to(x.device) for positions in self.target_positions]
            elif any(len(a) != len(b) for a, b in zip(source, target, strict=True)):
                raise InputError("paired texts have different numbers of tokens", fix="pass paired=False")
        first, second = x[: self.source], x[self.source : self.source + self.target]
        rest = _gather(x[self.source + self.target :], negatives) if self.negatives else None
        return TokenSets(_gather(first, source), _gather(second, target), rest)


def _gather(x: Tensor, positions: Sequence[Tensor]) -> Tensor:
    return torch.cat([row[chosen] for row, chosen in zip(x, positions, strict=True)]).unsqueeze(0)


def valid_means(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the first `lengths` tokens of every row, fp32 `[R, 1, D]`."""
    lengths = lengths.to(x.device)
    valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    total = torch.where(valid.unsqueeze(-1), x.float(), 0.0).sum(1)
    return (total / lengths[:, None]).unsqueeze(1)


def align_tokens(source: Sequence[int], target: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of two token sequences that belong together.

    Tokens of the longest common runs are paired one to one. Where they differ (the class word), every token of the
    longer piece is paired with the token at the same relative place of the shorter one; an insertion into nothing has
    no partner and is left out.

    Returns:
        Two lists of the same length, positions in the source and in the target.
    """
    first: list[int] = []
    second: list[int] = []
    matcher = difflib.SequenceMatcher(None, list(source), list(target), autojunk=False)
    for _, a, a_end, b, b_end in matcher.get_opcodes():
        here, there = a_end - a, b_end - b
        if here == 0 or there == 0:
            continue
        longest = max(here, there)
        first += [a + i * here // longest for i in range(longest)]
        second += [b + i * there // longest for i in range(longest)]
    return first, second
