"""`linear_gate` against published gates written out, tokens that do not count, and its errors."""

from typing import Any

import pytest
import torch
from checking import CPU_VARIANTS

from pysteer.errors import InputError
from pysteer.ops import Case, backend, get
from pysteer.ops.linear_gate import linear_gate


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_formulas(name: str) -> None:
    x = torch.randn(4, 7, 6)
    v = x.mean(1)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    with backend(name):
        soft = linear_gate(x, weight, bias)
        torch.testing.assert_close(soft, torch.softmax(v @ weight.T + bias, -1)[:, 0])
        one = linear_gate(x, weight[:1], bias[:1])
        torch.testing.assert_close(one, torch.sigmoid(v @ weight[0] + bias[0]))
        middle = float(soft.sort().values[1:3].mean())
        assert torch.equal(linear_gate(x, weight, bias, threshold=middle), (soft >= middle).float())
        squares = (v - weight[0]).square().sum(-1)
        bound = squares.sort().values[1:3].mean().reshape(1)
        assert torch.equal(linear_gate(x, weight[:1], bound, kind="ood"), (squares <= bound).float())
        box = torch.stack((v[:2].amin(0), v[:2].amax(0)))
        inside = ((v >= box[0]) & (v <= box[1])).all(-1).float()
        assert torch.equal(linear_gate(x, box + torch.tensor([[-1e-6], [1e-6]]), kind="min_max")[:2], torch.ones(2))
        assert torch.equal(linear_gate(x, box + torch.tensor([[-1e-6], [1e-6]]), kind="min_max")[2:], inside[2:])


@pytest.mark.parametrize("name", CPU_VARIANTS)
@pytest.mark.parametrize("kind", ["gda", "ood", "min_max"])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("width", [5, 64, 700])
def test_tokens_that_do_not_count(name: str, kind: str, channels_first: bool, width: int) -> None:
    options = {"kind": kind, "part": "all"}
    i = get("linear_gate").make_inputs(Case(3, 40, width, options=options))
    padded = torch.cat((i["x"], torch.full((3, 30, width), torch.nan)), 1)
    short = linear_gate(**i)
    if channels_first:
        i["channel_dim"], padded = 1, padded.transpose(1, 2).contiguous()
    span = torch.tensor([[0, 40]] * 3, dtype=torch.int32)
    mask = (torch.arange(70) < 40).expand(3, 70).contiguous()
    with backend(name):
        torch.testing.assert_close(linear_gate(**{**i, "x": padded, "span": span}), short)
        torch.testing.assert_close(linear_gate(**{**i, "x": padded, "mask": mask}), short)
        both = linear_gate(**{**i, "x": padded, "mask": mask, "span": span + torch.tensor([0, 30], dtype=torch.int32)})
        torch.testing.assert_close(both, short)
        for none in ({"mask": torch.zeros(3, 70, dtype=torch.bool)}, {"span": torch.zeros(3, 2, dtype=torch.int32)}):
            assert torch.equal(linear_gate(**{**i, "x": padded, **none}), torch.zeros(3))


@pytest.mark.parametrize("name", CPU_VARIANTS)
def test_nan_closes_hard_gates(name: str) -> None:
    x = torch.full((2, 3, 4), torch.nan)
    with backend(name):
        assert linear_gate(x, torch.ones(2, 4), torch.ones(2)).isnan().all()
        assert not linear_gate(x, torch.ones(2, 4), torch.ones(2), threshold=0.1).any()
        assert not linear_gate(x, torch.ones(1, 4), torch.tensor([torch.inf]), kind="ood").any()
        assert not linear_gate(x, torch.tensor([[-torch.inf], [torch.inf]]).expand(2, 4), kind="min_max").any()


def test_gates_of_tokens_are_those_of_rows_of_one_token() -> None:
    x = torch.randn(2, 5, 6)
    weight, bias = torch.randn(3, 6), torch.randn(3)
    each = linear_gate(x, weight, bias, per_token=True)
    assert each.shape == (2, 5)
    torch.testing.assert_close(each.flatten(), linear_gate(x.flatten(0, 1), weight, bias))
    maps = x.transpose(1, 2).reshape(2, 6, 1, 5)
    assert torch.equal(linear_gate(maps, weight, bias, per_token=True, channel_dim=1), each.unsqueeze(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lda"}, "kind of gate: got 'lda'; allowed: gda, ood, min_max"),
        ({"weight": torch.zeros(3, 4)}, r"weight: got 'float32 \[3, 4\] on cpu'; allowed: float32 \[3, 6\] on cpu"),
        ({"bias": None}, "bias: got 'nothing'"),
        ({"bias": torch.zeros(2)}, "bias: got"),
        ({"factor": torch.zeros(2, 6)}, "factor: got 'given'; allowed: nothing with kind gda"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"kind": "min_max"}, "weight: got"),
        ({"kind": "ood", "weight": torch.zeros(1, 6), "bias": torch.zeros(1), "threshold": 0.5}, "threshold: got 0.5"),
        ({"span": torch.zeros(3, 2)}, r"span: got 'float32 \[3, 2\] on cpu'; allowed: int32 \[3, 2\]"),
        ({"mask": torch.ones(3, 7, dtype=torch.bool)}, "mask: got"),
        ({"x": torch.zeros(3, 4, 6, dtype=torch.int64)}, "dtype of x"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    i = get("linear_gate").make_inputs(Case(3, 4, 6))
    with pytest.raises(InputError, match=message):
        linear_gate(**{**i, **change})
