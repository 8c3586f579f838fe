"""The transport network: what it learns on known maps, its two forms, and its seed."""

import pytest
import torch
from applying import apply, normal

from pysteer.errors import InputError
from pysteer.methods import MLPTransport

WIDTH = 6


def pairs():
    x = normal(60, WIDTH, 0) + 3
    return x, x + torch.tanh(x.flip(1)) * 2 - 1


@pytest.mark.parametrize("residual", [True, False])
def test_a_map_of_the_mean_is_learned(residual: bool) -> None:
    x, y = pairs()
    method = MLPTransport(residual=residual, hidden=32, epochs=400)
    fit = method.fit_site(x, y)
    moved = apply("mlp_shift", fit, x)
    assert (moved - y).square().mean() < 0.05 * (x - y).square().mean()
    layers = [(fit.tensors[n].double(), fit.tensors[f"{n}_bias"].double()) for n in ("first", "second", "third")]
    hidden = x.double()
    for number, (weight, bias) in enumerate(layers):
        hidden = (torch.nn.functional.gelu(hidden) if number else hidden) @ weight.T + bias
    expected = x + hidden if residual else hidden
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)


def test_all_tokens_of_a_row_move_alike_and_negatives_stay() -> None:
    x, y = pairs()
    others = normal(60, WIDTH, 1) - 3
    method = MLPTransport(hidden=32, epochs=300)
    fit = method.fit_site(x[:, None], y[:, None], negatives=others)
    rows = normal(8, 4 * WIDTH, 2).view(8, 4, WIDTH) + 3
    shift = apply("mlp_shift", fit, rows, 0.5) - rows
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-4, atol=1e-5)
    means = rows.mean(1)
    torch.testing.assert_close(shift[:, 0], (apply("mlp_shift", fit, means) - means) / 2, rtol=1e-4, atol=1e-5)
    stays, goes = ((apply("mlp_shift", fit, each) - each).norm(dim=1).mean() for each in (others, x))
    assert stays < 0.3 * goes


def test_the_same_seed_gives_the_same_network() -> None:
    x, y = pairs()
    method = MLPTransport(hidden=8, epochs=5)
    first, same, other = (method.fit_site(x, y, seed=seed).tensors["first"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    untouched = method.fit_site(x, x).tensors
    assert not untouched["third"].any()
    with pytest.raises(InputError, match="unpaired"):
        method.fit_site(x, y, paired=False)
    with pytest.raises(InputError, match="hidden"):
        MLPTransport(hidden=0)
