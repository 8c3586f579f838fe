"""`affine_shift` against its formula written out, and the errors of the steering table, which all ops share."""

from typing import Any

import pytest
import torch
from checking import bits

from pysteer.errors import InputError
from pysteer.ops import Case, backend, get
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


NEXT = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
def test_bounds_are_strict_and_per_channel(layout: str, dtype: torch.dtype, name: str | None) -> None:
    width = 70
    i = get("affine_shift").make_inputs(Case(2, 70, width, dtype, layout, "one"))
    channel = i["channel_dim"]
    values = torch.tensor([0.5, -0.5, NEXT, 0.25, -0.0, torch.nan, torch.inf, -torch.inf, 7.0, 1e-40])
    i["x"].copy_(values[torch.arange(i["x"].numel()) % 10].view(i["x"].shape))
    bounds = torch.tensor([[-0.5, 0.5], [-torch.inf, torch.inf], [0.25, 0.25], [-torch.inf, 0.5], [torch.nan, 1.0]])
    low, high = bounds[torch.arange(width) % 5].expand(4, -1, -1).unbind(-1)
    with backend(name):
        y = affine_shift(**i, low=low.contiguous(), high=high.contiguous())
        plain = affine_shift(**i)
    shape = [1, 1, 1]
    shape[channel] = width
    x = i["x"].float()
    inside = (x > low[0].reshape(shape)) & (x < high[0].reshape(shape))
    assert 0.1 < inside.float().mean() < 0.7
    assert torch.equal(bits(y)[inside], bits(plain)[inside])
    assert torch.equal(bits(y)[~inside], bits(i["x"])[~inside])


def test_formula_of_the_shifted_mean() -> None:
    i = inputs_of(options={"of_mean": True})
    low, high = torch.full((4, 6), -0.4), torch.full((4, 6), 0.5)
    expected, step, touched = i["x"].clone(), int(i["clock"]), 0
    for row in range(4):
        which, s = int(i["slot"][step, row]), float(i["strength"][step, row])
        start, end = i["span"][row].tolist()
        for channel in range(6):
            m = float(i["x"][row, start:end, channel].mean())
            if which and s and -0.4 < m < 0.5:
                g, b = float(i["gain"][which, channel]), float(i["bias"][which, channel])
                expected[row, start:end, channel] += s * ((g - 1) * m + b)
                touched += 1
    assert 3 < touched < 15
    torch.testing.assert_close(affine_shift(**i, low=low, high=high), expected)


@pytest.mark.parametrize("layout", ["tokens", "channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_whose_mean_is_outside_keep_their_bits(layout: str, dtype: torch.dtype) -> None:
    i = get("affine_shift").make_inputs(Case(3, 700, 40, dtype, layout, "one", options={"of_mean": True}))
    x, channel = i["x"], i["channel_dim"] % i["x"].dim()
    dims = [dim for dim in range(1, x.dim()) if dim != channel]
    x.movedim(channel, -1)[0, ..., :20, :].copy_(torch.tensor([-0.0, 1e-40]).repeat(20))
    bound = torch.zeros(4, 40)
    y = affine_shift(**i, low=bound, high=bound + torch.inf)
    above = (x.float().mean(dims, keepdim=True) > 0).expand_as(x)
    assert 0.2 < above.float().mean() < 0.8
    assert torch.equal(bits(y)[~above], bits(x)[~above])
    assert (y != x)[above].float().mean() > 0.9
    # a constant is added, so what varies within a channel stays
    assert ((y.float() - x.float()).std(dims) < 0.02).all()


def test_mean_of_long_rows_is_exact() -> None:
    for layout in ("tokens", "channels_first"):
        i = get("affine_shift").make_inputs(
            Case(1, 200_000, 3, layout=layout, strength="one", options={"of_mean": True})
        )
        i["x"].add_(100.0)
        truth = get("affine_shift").reference(**{**i, "x": i["x"].double()})
        torch.testing.assert_close(affine_shift(**i).double(), truth, rtol=3e-7, atol=0)


def test_gradient_goes_through_the_mean() -> None:
    i = get("affine_shift").make_inputs(Case(2, 10, 3, strength="one", options={"of_mean": True}))
    x = i.pop("x").requires_grad_()
    step = int(i["clock"])
    (gradient,) = torch.autograd.grad(affine_shift(x, **i)[:, 0].sum(), x)
    gain = i["gain"][i["slot"][step, :2]]
    torch.testing.assert_close(gradient[:, 1], (gain - 1) / 10)
    torch.testing.assert_close(gradient[:, 0], 1 + (gain - 1) / 10)


def test_bounds_come_together() -> None:
    i = inputs_of()
    bound = torch.zeros(4, 6)
    with pytest.raises(InputError, match="high: got None; allowed: both bounds or none"):
        affine_shift(**i, low=bound)
    with pytest.raises(InputError, match=r"high: got 'float32 \[4, 5\]"):
        affine_shift(**i, low=bound, high=bound[:, :5])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_that_share_rows_do_not_change_the_mean(rows: int) -> None:
    i = get("affine_shift").make_inputs(
        Case(rows, 3000, 300, torch.bfloat16, strength="one", options={"of_mean": True})
    )
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(affine_shift(**i))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
