"""`affine_shift` against its formula written out, and the errors of the steering table, which all ops share."""

from typing import Any

import pytest
import torch

from pysteer.errors import InputError
from pysteer.ops import Case, get
from pysteer.ops.affine_shift import affine_shift


def inputs_of(**more: Any) -> dict[str, Any]:
    return get("affine_shift").make_inputs(Case(4, 5, 6, span=True, **more))


def test_formula() -> None:
    i = inputs_of()
    expected = i["x"].clone()
    step = int(i["clock"])
    for row in range(4):
        which, s = int(i["slot"][step, row]), float(i["strength"][step, row])
        start, end = i["span"][row].tolist()
        for token in range(5):
            for channel in range(6):
                if which and s and start <= token < end:
                    x = float(i["x"][row, token, channel])
                    g, b = float(i["gain"][which, channel]), float(i["bias"][which, channel])
                    expected[row, token, channel] = x + s * ((g - 1) * x + b)
    assert not torch.equal(expected, i["x"])
    torch.testing.assert_close(affine_shift(**i), expected)


def test_mean_shift_and_replacement() -> None:
    i = inputs_of(strength="one")
    i["span"] = None
    i["gain"].fill_(1.0)
    which = i["slot"][int(i["clock"]), :4]
    torch.testing.assert_close(affine_shift(**i), i["x"] + i["bias"][which][:, None])
    i["gain"].zero_()
    assert torch.equal(affine_shift(**i), i["bias"][which][:, None].expand(4, 5, 6))


def test_four_dimensions() -> None:
    spec = get("affine_shift")
    i = spec.make_inputs(Case(3, 20, 6, layout="channels_first", span=True))
    flat = affine_shift(**i)
    for memory in (torch.contiguous_format, torch.channels_last):
        image = i["x"].reshape(3, 6, 4, 5).to(memory_format=memory)
        result = affine_shift(**{**i, "x": image})
        assert result.is_contiguous(memory_format=memory)
        assert torch.equal(result.reshape(3, 6, 20), flat)
    tokens = affine_shift(**{**i, "x": i["x"].transpose(1, 2).reshape(3, 4, 5, 6), "channel_dim": -1})
    assert torch.equal(tokens.reshape(3, 20, 6).transpose(1, 2), flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 5, 6, dtype=torch.int32)}, "dtype of x"),
        ({"x": torch.zeros(4)}, "shape of x"),
        ({"x": torch.zeros(4, 5, 7)}, r"gain: got 'float32 \[4, 6\]"),
        ({"x": torch.zeros(9, 5, 6)}, "rows of x: got 9; allowed: at most 6"),
        ({"channel_dim": 2, "x": torch.zeros(4, 6, 5, 2)}, "channel_dim: got 2"),
        ({"bias": torch.zeros(3, 6)}, "parameter sets in bias: got 3; allowed: 4"),
        ({"gain": torch.zeros(4, 6, dtype=torch.float64)}, "gain: got 'float64"),
        ({"slot": torch.zeros(3, 6, dtype=torch.int64)}, "slot: got 'int64"),
        ({"strength": torch.zeros(2, 6)}, r"strength: got 'float32 \[2, 6\]"),
        ({"clock": torch.tensor([1])}, "clock: got"),
        ({"clock": torch.tensor(1, dtype=torch.int32)}, "clock: got 'int32"),
        ({"span": torch.zeros(6, 3, dtype=torch.int32)}, "span: got"),
        ({"out": torch.zeros(4, 5, 7)}, "out: got"),
        ({"out": torch.zeros(4, 5, 6, dtype=torch.bfloat16)}, "out: got 'bfloat16"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        affine_shift(**{**inputs_of(), **change})


@pytest.mark.parametrize(("name", "value"), [("clock", 3), ("clock", -1), ("slot", 4), ("slot", -2)])
def test_values_outside_the_table(name: str, value: int) -> None:
    i = inputs_of()
    i[name].fill_(value)
    with pytest.raises((InputError, IndexError, RuntimeError), match=r"out of range|allowed: 0 to"):
        affine_shift(**i)


def test_out_with_gradient_is_refused() -> None:
    i = inputs_of()
    i["x"].requires_grad_()
    with pytest.raises(InputError, match="out"):
        affine_shift(**i, out=torch.empty(4, 5, 6))
