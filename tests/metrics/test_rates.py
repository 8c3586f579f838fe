import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from pysteer.errors import InputError
from pysteer.metrics import rate, relative_rate, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 300), (300, 300), (287, 304), (5, 7)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(k, n, confidence):
    want = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((want.low, want.high), abs=1e-12)


def test_rate_counts_and_contains_its_value():
    got = rate(torch.tensor([True, False, True, True]))
    assert (got.value, got.total) == (0.75, 4)
    assert got.low < got.value < got.high
    assert str(got).startswith("0.750 [")


def test_empty_rate_is_nan_not_an_error():
    got = rate(np.zeros(0, dtype=bool))
    assert math.isnan(got.value)
    assert got.total == 0
    assert str(got) == "not measured"


@pytest.mark.parametrize(("k", "n"), [(2, 1), (-1, 4), (0, 0)])
def test_impossible_counts_are_named(k, n):
    with pytest.raises(InputError, match=f"{k} of {n}"):
        wilson(k, n)


def test_numbers_are_not_outcomes():
    with pytest.raises(InputError, match="boolean"):
        rate([0.2, 0.9])


def test_relative_rate_of_equal_outcomes_is_one():
    hits = np.arange(300) % 10 != 0
    got = relative_rate(hits, hits)
    assert got.value == 1.0
    assert 0.97 < got.low < 1.0 < got.high < 1.03


def test_relative_rate_covers_the_true_ratio():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        base = rng.random(200) < 0.9
        steered = np.where(rng.random(200) < 0.8, base, rng.random(200) < 0.6)
        true = (0.8 * 0.9 + 0.2 * 0.6) / 0.9
        got = relative_rate(steered, base)
        covered += got.low <= true <= got.high
    assert 0.92 <= covered / 400 <= 0.98


def test_relative_rate_refuses_other_prompts():
    with pytest.raises(InputError, match="3 and 2"):
        relative_rate([True] * 3, [True] * 2)


def test_relative_rate_without_baseline_hits_is_nan():
    assert math.isnan(relative_rate([True, False], [False, False]).value)
