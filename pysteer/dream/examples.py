"""The best rows of every feature, kept while rows stream past: m of them per slot, whatever the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class TopExamples:
    """The m largest values of every slot (a feature at a step) with the rows they come from.

    Memory is `slots x m`. Values that are equal are kept in the order of their rows, so the result does not depend on
    how the rows were divided into blocks.

    Args:
        slots: how many slots.
        most: m.

    Attributes:
        values: fp32 `[slots, m]`, largest first, minus infinity where a slot has fewer.
        rows: int64 `[slots, m]`, -1 where a slot has fewer.
    """

    def __init__(self, slots: int, most: int) -> None:
        self.most = most
        self.values = torch.full((slots, most), -torch.inf)
        self.rows = torch.full((slots, most), -1, dtype=torch.int64)

    def add(self, slots: Tensor, values: Tensor, rows: Tensor) -> None:
        """Take in entries: slot `[E]` int64, value `[E]` and row `[E]` int64 of each; rows in rising order."""
        if not len(slots):
            return
        # Largest first within a slot, of equal ones the first row: two stable sorts.
        order = torch.argsort(values, descending=True, stable=True)
        order = order[torch.argsort(slots[order], stable=True)]
        slots, values, rows = slots[order], values[order].float(), rows[order]
        place = torch.arange(len(slots)) - torch.searchsorted(slots, slots)
        near = place < self.most  # no more than m of this block can stay
        slots, values, rows, place = slots[near], values[near], rows[near], place[near]
        touched, inverse = torch.unique_consecutive(slots, return_inverse=True)
        fresh = torch.full((len(touched), self.most), -torch.inf)
        fresh_rows = torch.full((len(touched), self.most), -1, dtype=torch.int64)
        fresh[inverse, place], fresh_rows[inverse, place] = values, rows
        both = torch.cat((self.values[touched], fresh), 1)
        numbers = torch.cat((self.rows[touched], fresh_rows), 1)
        best = both.sort(dim=1, descending=True, stable=True)  # what was there before comes first among equals
        self.values[touched] = best.values[:, : self.most]
        self.rows[touched] = numbers.gather(1, best.indices[:, : self.most])
