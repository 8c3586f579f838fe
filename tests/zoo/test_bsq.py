"""The multi-scale quantiser."""

import pytest
import torch
import torch.nn.functional as F

from pysteer.errors import InputError
from pysteer.models.infinity.bsq import MultiScaleBSQ

SCALES = [(1, 1), (2, 2), (4, 4), (6, 6), (8, 8)]
QUANTISERS = {
    "plain": MultiScaleBSQ(16, SCALES),
    "wide": MultiScaleBSQ(8, [(1, 1), (2, 4), (3, 6)]),
    "patchify": MultiScaleBSQ(8, [(1, 1), (2, 2), (4, 4)], patchify=True),
}


@pytest.fixture(params=QUANTISERS, ids=list(QUANTISERS))
def case(request):
    quantiser = QUANTISERS[request.param]
    torch.manual_seed(0)
    return quantiser, torch.randn(3, quantiser.dim, *quantiser.grid(-1))


def test_shapes(case):
    quantiser, features = case
    bits, inputs = quantiser.encode(features)
    tokens = [h * w for h, w in quantiser.scales]
    assert [tuple(b.shape) for b in bits] == [(3, n, quantiser.token_dim) for n in tokens]
    assert inputs.shape == (3, sum(tokens[1:]), quantiser.token_dim)
    assert all(set(b.unique().tolist()) <= {0, 1} for b in bits)


def test_decode_is_the_sum_that_encode_accumulates(case):
    quantiser, features = case
    bits, inputs = quantiser.encode(features)
    summed, at = None, 0
    for scale, part in enumerate(bits):
        summed = quantiser.accumulate(summed, part, scale)
        if scale + 1 < len(bits):
            expected = quantiser.next_input(summed, scale + 1)
            assert torch.equal(inputs[:, at : at + expected.shape[1]], expected)
            at += expected.shape[1]
    assert torch.equal(quantiser.decode(bits), summed)


def test_bits_are_the_signs_of_the_residual(case):
    quantiser, features = case
    bits, _ = quantiser.encode(features)
    residual = features
    for scale, part in enumerate(bits):
        small = F.interpolate(residual, size=quantiser.grid(scale), mode="area")
        assert torch.equal(quantiser.to_map(part, scale), (small > 0).long())
        codes = (2.0 * (small > 0) - 1.0) / quantiser.dim**0.5
        residual = residual - F.interpolate(codes, size=quantiser.grid(-1), mode="bilinear")
    assert torch.allclose(features - quantiser.decode(bits), residual, atol=1e-6)


def test_more_scales_come_closer():
    quantiser = QUANTISERS["plain"]
    features = F.normalize(torch.randn(8, 16, 8, 8), dim=1)
    bits, _ = quantiser.encode(features)
    errors = [(features - quantiser.decode(bits[: k + 1])).norm() for k in (3, 4)]
    assert errors[1] < errors[0]


def test_codes_have_unit_length_and_maps_round_trip(case):
    quantiser, features = case
    bits, _ = quantiser.encode(features)
    codes = quantiser.to_map(quantiser.codes(bits[-1]), -1 % len(bits))
    assert torch.allclose(codes.norm(dim=1), torch.ones(()), atol=1e-6)
    assert torch.equal(quantiser.to_map(quantiser.to_tokens(features), -1), features)


def test_no_flip_equals_zero_flip(case):
    quantiser, features = case
    plain, zero = quantiser.encode(features), quantiser.encode(features, flip=0.0)
    assert torch.equal(plain[1], zero[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[0], zero[0], strict=True))


def test_flips_are_seen_by_later_scales_and_never_by_their_own_labels(case):
    quantiser, features = case
    last = len(quantiser.scales) - 1
    chance = [0.0] * (last + 1)
    chance[1] = 1.0
    bits, inputs = quantiser.encode(features)
    flipped, flipped_inputs = quantiser.encode(features, flip=chance)
    assert torch.equal(bits[0], flipped[0])
    assert torch.equal(bits[1], flipped[1])
    assert not torch.equal(bits[2], flipped[2])
    first = quantiser.scales[1][0] * quantiser.scales[1][1]
    assert torch.equal(inputs[:, :first], flipped_inputs[:, :first])
    summed = quantiser.accumulate(quantiser.accumulate(None, bits[0], 0), 1 - bits[1], 1)
    second = quantiser.next_input(summed, 2)
    assert torch.equal(flipped_inputs[:, first : first + second.shape[1]], second)


def test_flip_rate_per_row_and_seed():
    quantiser = QUANTISERS["plain"]
    features = torch.randn(1, 16, 8, 8).expand(64, -1, -1, -1)
    chance = torch.zeros(64, 5)
    chance[32:, 0] = 0.25
    clean = quantiser.encode(features)[1]
    draw = [quantiser.encode(features, chance, torch.Generator().manual_seed(3))[1] for _ in range(2)]
    assert torch.equal(*draw)
    # The first next-scale input shows the codes of scale 0 themselves.
    wrong = (draw[0][:, 0] * clean[:, 0] < 0).float().mean(1)
    assert wrong[:32].max() == 0
    assert 0.15 < wrong[32:].mean() < 0.35


def test_training_form_equals_inference_and_has_a_gradient(case):
    quantiser, features = case
    features = features.clone().requires_grad_()
    summed, units = quantiser.quantise(features)
    assert torch.allclose(summed, quantiser.decode(quantiser.encode(features.detach())[0]), atol=1e-6)
    assert all(torch.allclose(u.norm(dim=1), torch.ones(()), atol=1e-5) for u in units)
    summed.square().sum().backward()
    assert features.grad is not None
    assert float(features.grad.abs().sum()) > 0


def test_wrong_sizes_are_named():
    quantiser = QUANTISERS["plain"]
    with pytest.raises(InputError, match="features"):
        quantiser.encode(torch.zeros(1, 16, 7, 8))
    with pytest.raises(InputError, match="tokens of scale 1"):
        quantiser.to_map(torch.zeros(1, 5, 16), 1)
    with pytest.raises(InputError, match="flip probabilities"):
        quantiser.encode(torch.zeros(1, 16, 8, 8), flip=[0.1, 0.2])
    with pytest.raises(InputError, match="bits to decode"):
        quantiser.decode([])
