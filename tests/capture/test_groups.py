"""Which rows and tokens enter a fit."""

import pytest
import torch

from pysteer.capture import align_tokens
from pysteer.capture.groups import Groups
from pysteer.errors import InputError


@pytest.mark.parametrize(
    ("source", "target", "pairs"),
    [
        ([1, 2, 3], [1, 2, 3], [(0, 0), (1, 1), (2, 2)]),
        ([1, 2, 3, 9], [1, 5, 3, 9], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ([1, 2, 3], [1, 5, 6, 3], [(0, 0), (1, 1), (1, 2), (2, 3)]),
        ([1, 5, 6, 3], [1, 2, 3], [(0, 0), (1, 1), (2, 1), (3, 2)]),
        ([1, 3], [1, 2, 3], [(0, 0), (1, 2)]),
    ],
)
def test_tokens_of_paired_texts_are_aligned_around_the_class_word(source, target, pairs):
    assert list(zip(*align_tokens(source, target), strict=True)) == pairs


def test_rows_are_split_in_order():
    x = torch.arange(7.0)[:, None, None].expand(7, 2, 3)
    source, target, negatives = Groups(2, 2, 3).split(x, None, pooled=False)
    assert source[:, 0, 0].tolist() == [0, 1]
    assert target[:, 0, 0].tolist() == [2, 3]
    assert negatives is not None
    assert negatives[:, 0, 0].tolist() == [4, 5, 6]
    assert Groups(3, 4).split(x, None, pooled=False).negatives is None


def test_only_valid_tokens_enter():
    x = torch.randn(4, 3, 2)
    lengths = torch.tensor([1, 3, 1, 3])
    x[0, 1:] = x[2, 1:] = float("nan")
    source, target, _ = Groups(2, 2).split(x, lengths, pooled=False)
    assert torch.equal(source[0], torch.cat((x[0, :1], x[1])))
    assert torch.equal(target[0], torch.cat((x[2, :1], x[3])))
    means = Groups(2, 2).split(x, lengths, pooled=True)
    assert torch.allclose(means.source[:, 0], torch.stack((x[0, 0], x[1].mean(0))))


def test_paired_texts_of_different_lengths_need_positions():
    x = torch.randn(2, 3, 2)
    lengths = torch.tensor([2, 3])
    with pytest.raises(InputError, match="different numbers of tokens"):
        Groups(1, 1).split(x, lengths, pooled=False)
    positions = (torch.tensor([0, 1, 1]),), (torch.tensor([0, 1, 2]),)
    groups = Groups(1, 1, source_positions=positions[0], target_positions=positions[1])
    source, target, _ = groups.split(x, lengths, pooled=False)
    assert torch.equal(source[0], x[0, [0, 1, 1]])
    assert torch.equal(target[0], x[1])
    unpaired = Groups(1, 1, paired=False).split(x, lengths, pooled=False)
    assert [len(part[0]) for part in unpaired[:2]] == [2, 3]
