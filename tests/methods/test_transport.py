"""Transport maps per unit and AurA: against the formulas, on samples whose answer is known, through a model."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pysteer.capture import Fitted
from pysteer.errors import InputError
from pysteer.methods import create
from pysteer.methods.aura import AurA, auroc
from pysteer.methods.gaussian_transport import GaussianTransport
from pysteer.methods.linear_act import LinearAcT
from pysteer.methods.unit_map import support_of
from pysteer.ops import affine_shift
from pysteer.steering import SiteParameters

WIDTH = 6


def normal(count: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def apply(fitted: SiteParameters | dict[str, Tensor], x: Tensor, strength: float = 1.0, **options: object) -> Tensor:
    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in fitted.items()}
    table = {
        "slot": torch.ones(1, len(x), dtype=torch.int32),
        "strength": torch.full((1, len(x)), strength),
        "clock": torch.tensor(0),
    }
    return affine_shift(x, **banks, **table, **options)


def test_linear_act_finds_the_line_whatever_the_order() -> None:
    source = normal(40, 0)
    gain, bias = torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)
    target = (gain * source + bias)[torch.randperm(40)]
    tensors, _, *_ = LinearAcT(support="all").fit_site(source, target, paired=False)
    torch.testing.assert_close(tensors["gain"], gain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["bias"], bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apply(tensors, source), gain * source + bias, rtol=1e-4, atol=1e-4)


def test_linear_act_equals_the_regression_of_sorted_samples() -> None:
    source, target = normal(31, 1), 3 * normal(31, 2).exp()
    tensors, _, *_ = LinearAcT(support="all").fit_site(source, target, paired=False)
    for unit in range(WIDTH):
        x, y = np.sort(source[:, unit].double().numpy()), np.sort(target[:, unit].double().numpy())
        slope, offset = np.polyfit(x, y, 1)
        assert tensors["gain"][unit].item() == pytest.approx(slope, rel=1e-5)
        assert tensors["bias"][unit].item() == pytest.approx(offset, rel=1e-5, abs=1e-6)


def test_linear_act_takes_unequal_counts() -> None:
    source, target = normal(400, 3), 2 * normal(257, 4) + 1
    tensors, _, *_ = LinearAcT(support="all").fit_site(source, target, paired=False)
    assert (tensors["gain"] - 2).abs().max() < 0.35
    assert (tensors["bias"] - 1).abs().max() < 0.35


def test_a_constant_unit_is_only_shifted() -> None:
    source, target = normal(20, 5), normal(20, 6)
    source[:, 2] = 0.75
    tensors, _, *_ = LinearAcT(support="all").fit_site(source, target, paired=False)
    assert tensors["gain"][2] == 1
    assert tensors["bias"][2].item() == pytest.approx(target[:, 2].mean().item() - 0.75, rel=1e-5)
    assert tensors["gain"].abs().max() < 10
    gaussian, _, *_ = GaussianTransport().fit_site(source, target, paired=False)
    assert (gaussian["gain"][2], gaussian["bias"][2]) == (1, 0)


def test_rows_are_pooled() -> None:
    source, target = normal(12, 7, 5), normal(12, 8, 5) + 1
    pooled, _, *_ = LinearAcT().fit_site(source, target, paired=False)
    means, _, *_ = LinearAcT().fit_site(source.mean(1), target.mean(1), paired=False)
    tokens, _, *_ = LinearAcT(pooled=False).fit_site(source, target, paired=False)
    assert torch.allclose(pooled["gain"], means["gain"])
    assert not torch.allclose(pooled["gain"], tokens["gain"])


def test_support_is_the_quantiles_of_the_source_and_gates() -> None:
    source, target = normal(50, 9), normal(50, 10) + 2
    tensors, _, *_ = LinearAcT(support="10-90").fit_site(source, target, paired=False)
    expected = np.quantile(source.numpy().astype(np.float64), [0.1, 0.9], axis=0)
    np.testing.assert_allclose(tensors["low"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(tensors["high"], expected[1], rtol=1e-6)
    x = 2 * normal(30, 11)
    inside = (x > tensors["low"]) & (x < tensors["high"])
    steered = apply(tensors, x, 0.5)
    moved = x + 0.5 * ((tensors["gain"] - 1) * x + tensors["bias"])
    assert torch.equal(steered[~inside], x[~inside])
    torch.testing.assert_close(steered[inside], moved[inside], rtol=1e-5, atol=1e-6)
    assert 0 < inside.float().mean() < 1
    assert support_of(source, "all") == {}


def test_maps_are_shifted_by_what_their_mean_is_moved_by() -> None:
    source, target = normal(30, 12), 2 * normal(30, 13) + 1
    tensors, options, *_ = LinearAcT(support="all", of_mean=True).fit_site(source, target, paired=False)
    x = torch.randn(4, WIDTH, 5, 3, generator=torch.Generator().manual_seed(14))
    mean = x.mean((2, 3), keepdim=True)
    gain, bias = (tensors[name].view(-1, 1, 1) for name in ("gain", "bias"))
    expected = x - mean + gain * mean + bias
    torch.testing.assert_close(apply(tensors, x, channel_dim=1, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only_mean", [False, True])
def test_gaussian_transport_matches_moments(only_mean: bool) -> None:
    source, target = 2 * normal(60, 15) - 1, 0.5 * normal(45, 16) + 3
    tensors, _, *_ = GaussianTransport(only_mean=only_mean).fit_site(source, target, paired=False)
    moved = apply(tensors, source)
    torch.testing.assert_close(moved.mean(0), target.mean(0), rtol=1e-4, atol=1e-4)
    wanted = source.std(0) if only_mean else target.std(0)
    torch.testing.assert_close(moved.std(0), wanted, rtol=1e-4, atol=1e-5)
    halfway = apply(tensors, source, 0.5)
    torch.testing.assert_close(halfway.mean(0), (source.mean(0) + target.mean(0)) / 2, rtol=1e-4, atol=1e-4)


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(17)
    positive = torch.randint(0, 6, (23, WIDTH), generator=generator).float()
    negative = torch.randint(0, 5, (17, WIDTH), generator=generator).float()
    above = (positive[:, None] > negative[None]).double().mean((0, 1))
    equal = (positive[:, None] == negative[None]).double().mean((0, 1))
    torch.testing.assert_close(auroc(positive, negative), above + equal / 2)


def test_aura_switches_perfect_detectors_off() -> None:
    source, target = normal(20, 18), normal(20, 19)
    source[:, 0] = target[:, 0].max() + 1 + source[:, 0].abs()
    source[:, 1] = target[:, 1].min() - 1 - source[:, 1].abs()
    tensors, _, *_ = AurA().fit_site(source, target, paired=False)
    assert (tensors["gain"][0], tensors["gain"][1]) == (0, 1)
    assert torch.equal(apply(tensors, source)[:, 0], torch.zeros(20))
    assert ((tensors["gain"] >= 0) & (tensors["gain"] <= 1)).all()


@pytest.mark.parametrize(
    ("name", "config"),
    [("linear_act", {}), ("linear_act", {"support": "all"}), ("gaussian_transport", {"support": "1-99"}), ("aura", {})],
)
def test_saved_and_loaded_equals_fitted(name: str, config: dict[str, object], tmp_path) -> None:
    method = create(name, **config)
    tensors, options, *_ = method.fit_site(normal(10, 20), normal(10, 21) + 1, paired=False)
    entry = SiteParameters("mlp.0", method.op, None, {key: t[None] for key, t in tensors.items()}, options)
    Fitted(method, [entry]).save_pretrained(tmp_path)
    again = Fitted.from_pretrained(tmp_path)
    assert again.method == method
    assert set(again.parameters[0].tensors) == set(tensors)
    assert all(torch.equal(again.parameters[0].tensors[key][0], t) for key, t in tensors.items())


def test_bad_input() -> None:
    for support in ("0", "90-10", "-1-50", "0-101", "some"):
        with pytest.raises(InputError, match="support"):
            LinearAcT(support=support)
    with pytest.raises(InputError, match="negatives with aura"):
        AurA().fit_site(normal(4, 0), normal(4, 1), negatives=normal(4, 2))
    with pytest.raises(InputError, match="samples of gaussian_transport"):
        GaussianTransport().fit_site(normal(1, 0), normal(4, 1), paired=False)
    with pytest.raises(InputError, match="unknown option of method linear_act"):
        create("linear_act", quantiles="0-100")
