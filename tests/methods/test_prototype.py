"""The prototype method against slow formulas in fp64, and on data with known shifts."""

import math

import pytest
import torch

from pysteer.errors import InputError
from pysteer.methods import REGISTRY, BayesPrecision, Prototype, create


def shift(x: torch.Tensor, fit, strength: float = 1.0) -> torch.Tensor:
    """What the op adds to the tokens `[n, D]`, written out in fp64."""
    tensors = {name: tensor.double() for name, tensor in fit.tensors.items()}
    scores = x.double() @ tensors["weight"].T + tensors["offset"]
    if fit.options["temperature"]:
        u = (scores / fit.options["temperature"]).softmax(-1) @ tensors["delta"]
    else:
        u = tensors["delta"][scores.argmax(-1)]
    if fit.options["pull"]:
        u = u - x.double()
    if fit.options["normalize"] != "none":
        u = u / u.norm(dim=-1, keepdim=True)
    if fit.options["normalize"] == "input":
        u = u * x.double().norm(dim=-1, keepdim=True)
    return strength * u


def planted(clusters: int = 6, per_cluster: int = 40, dim: int = 24, seed: int = 0):
    """Source tokens in clusters, the shift of each cluster, and the cluster of each token."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator) * 4
    shifts = torch.randn(clusters, dim, generator=generator) * 3
    labels = torch.arange(clusters).repeat(per_cluster)
    source = centres[labels] + 0.2 * torch.randn(len(labels), dim, generator=generator)
    return source, shifts, labels


@pytest.mark.parametrize("distance", ["euclid", "mahalanobis"])
def test_paired_fit_recovers_planted_shifts(distance):
    source, shifts, labels = planted()
    target = source + shifts[labels]
    fit = Prototype(clusters=6, distance=distance).fit_site(source, target)
    assert torch.allclose(shift(source, fit), shifts[labels].double(), atol=1e-4)
    fresh = planted(seed=0)[0] + 0.1
    assert torch.allclose(shift(fresh, fit), shifts[labels].double(), atol=1e-4)


@pytest.mark.parametrize("distance", ["euclid", "mahalanobis"])
def test_scores_rank_prototypes_by_the_distance(distance):
    source = torch.randn(300, 10, generator=torch.Generator().manual_seed(1)) @ torch.randn(10, 10) + 30
    method = Prototype(clusters=8, distance=distance)
    fit = method.fit_site(source, source + 1)
    from pysteer.methods.kmeans import kmeans

    centres, labels = kmeans(source, 8)
    residuals = (source - centres[labels]).double()
    precision = torch.eye(10, dtype=torch.float64)
    if distance == "mahalanobis":
        precision = BayesPrecision.fit(residuals).dense()
    difference = source.double()[:, None] - centres.double()[None]
    squared = torch.einsum("nki,ij,nkj->nk", difference, precision, difference)
    scores = source.double() @ fit.tensors["weight"].double().T + fit.tensors["offset"].double()
    common = scores + squared / 2
    assert torch.allclose(common, common[:, :1].expand_as(common), rtol=0, atol=2e-3 * float(squared.mean()))
    assert (scores.argmax(1) == squared.argmin(1)).float().mean() > 0.99


def test_mahalanobis_and_euclid_choose_differently_where_the_noise_has_a_direction():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, generator=generator) * torch.tensor([6.0, 0.05])
    labels = torch.arange(2).repeat(200)
    source = noise + torch.tensor([[0.0, -1.0], [0.0, 1.0]])[labels]
    target = source + torch.tensor([[0.0, -5.0], [0.0, 5.0]])[labels]
    euclid = Prototype(clusters=2).fit_site(source, target)
    assert (shift(source, euclid)[:, 1].abs() < 4).any()  # K-means splits along the noise: shifts average out
    many = Prototype(clusters=12, distance="mahalanobis").fit_site(source, target)
    wrong = (shift(source, many)[:, 1].sign() != (labels * 2 - 1)).float().mean()
    assert wrong < 0.2


def test_unpaired_fit_matches_moved_clusters_and_leaves_the_common_ones():
    source, shifts, labels = planted(clusters=5)
    moved = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])[:, None] * shifts[:5] * 0.2
    target = (source + moved[labels])[torch.randperm(len(source), generator=torch.Generator().manual_seed(9))]
    fit = Prototype(clusters=5).fit_site(source, target, paired=False)
    assert torch.allclose(shift(source, fit), moved[labels].double(), atol=1e-3)


def test_unpaired_fit_leaves_what_the_classes_share():
    generator = torch.Generator().manual_seed(4)
    backgrounds, classes = torch.randn(8, 32, generator=generator) * 1.5, torch.randn(2, 32, generator=generator) * 1.5

    def scene(kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        is_object = torch.rand(3000, generator=generator) < 0.15
        ground = backgrounds[torch.randint(8, (3000,), generator=generator)]
        tokens = torch.where(is_object[:, None], classes[kind], ground)
        return tokens + 0.5 * torch.randn(3000, 32, generator=generator), is_object

    source, target, (fresh, is_object) = scene(0)[0], scene(1)[0], scene(0)
    moved = shift(fresh, Prototype(clusters=32).fit_site(source, target, paired=False))
    wanted = (classes[1] - classes[0]).double()
    along = moved @ wanted / wanted.norm().square()
    assert along[is_object].mean() > 0.9
    assert along[~is_object].abs().mean() < 0.02
    assert moved[~is_object].norm(dim=1).mean() < 0.15 * wanted.norm()


def test_unpaired_with_fewer_targets_than_clusters():
    source, _, _ = planted()
    fit = Prototype(clusters=6).fit_site(source, source[:2] + 1, paired=False)
    moved = source.double() + shift(source, fit)
    assert torch.isfinite(moved).all()
    assert torch.cdist(moved, source[:2].double() + 1).min(1).values.mean() < 2


@pytest.mark.parametrize("negatives", ["join", "own"])
@pytest.mark.parametrize("paired", [True, False])
def test_negatives_stay_and_the_source_still_moves(negatives, paired):
    source, shifts, labels = planted(clusters=4)
    target = source + shifts[labels]
    others = planted(clusters=3, seed=7)[0]
    alone = Prototype(clusters=4).fit_site(source, target)
    assert (shift(others, alone).norm(dim=1) > 1).all()
    fit = Prototype(clusters=7, negatives=negatives).fit_site(source, target, negatives=others, paired=paired)
    assert shift(others, fit).abs().max() == 0
    expected = shifts[labels].double()
    if paired:
        assert torch.allclose(shift(source, fit), expected, atol=1e-4)
    else:
        assert (shift(source, fit).norm(dim=1) > 1).all()


def test_mixed_cluster_moves_by_its_share_of_source_tokens():
    tokens = torch.zeros(30, 3) + 1e-3 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([2.0, 0.0, -1.0])
    fit = Prototype(clusters=1).fit_site(tokens[:20], tokens[:20] + step, negatives=tokens[20:])
    assert torch.allclose(fit.tensors["delta"], (step * 20 / 30)[None], atol=1e-5)


def test_diff_is_the_difference_of_the_class_means():
    source, shifts, labels = planted()
    target = source + shifts[labels]
    fit = Prototype(clusters=4, direction="diff").fit_site(source, target)
    expected = (target.double().mean(0) - source.double().mean(0)).expand(len(source), -1)
    assert torch.allclose(shift(source, fit), expected, atol=1e-5)


def test_toward_pulls_to_the_nearest_target_prototype():
    source, shifts, labels = planted()
    target = source + 0.5 * shifts[labels]
    fit = Prototype(clusters=6, direction="toward").fit_site(source, target, paired=False)
    centres = torch.stack([target[labels == k].double().mean(0) for k in range(6)])
    nearest = centres[torch.cdist(source.double(), centres).argmin(1)]
    assert torch.allclose(source.double() + shift(source, fit), nearest, atol=1e-4)


def test_gate_leaves_tokens_that_are_already_target():
    source, shifts, labels = planted()
    target = source + shifts[labels]
    fit = Prototype(clusters=6, weight="gate").fit_site(source, target)
    assert torch.allclose(shift(source, fit), shifts[labels].double(), atol=1e-4)
    assert shift(target, fit).abs().max() == 0


def test_soft_weight_is_the_probability_of_not_being_target():
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(200, 5, generator=generator)
    target = source + 1.5
    fit = Prototype(clusters=3, weight="soft", temperature=0.7, direction="diff").fit_site(source, target)
    from pysteer.methods.kmeans import kmeans

    centres = torch.cat((kmeans(source, 3)[0], kmeans(target, 3)[0])).double()
    x = torch.randn(50, 5, generator=generator) + 0.7
    probability = (-torch.cdist(x.double(), centres).square() / (2 * 0.7)).softmax(1)[:, :3].sum(1)
    step = target.double().mean(0) - source.double().mean(0)
    assert torch.allclose(shift(x, fit), probability[:, None] * step, atol=1e-4)
    assert probability.min() < 0.4
    assert probability.max() > 0.6


def two_classes(dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(dim, dim, generator=generator)
    source = torch.randn(300, dim, generator=generator) @ mixing
    return source, torch.randn(250, dim, generator=generator) @ mixing + 4.0


def steered(x: torch.Tensor, method: Prototype, fit, strength: float = 1.0) -> torch.Tensor:
    """Tokens `[n, D]` after the op that the method names, fp64."""
    from pysteer.ops import get

    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in fit.tensors.items()}
    table = {
        "slot": torch.ones(1, 1, dtype=torch.int32),
        "strength": torch.full((1, 1), strength),
        "clock": torch.zeros((), dtype=torch.int64),
    }
    return get(method.op).function(x[None], **banks, **table, **fit.options)[0].double()


@pytest.mark.parametrize("weight", ["one", "gate", "soft"])
@pytest.mark.parametrize("distance", ["euclid", "mahalanobis"])
@pytest.mark.parametrize("direction", ["toward", "grad"])
@pytest.mark.parametrize("samples", [300, 4])
def test_aiming_directions_against_the_definition(direction, distance, weight, samples):
    from pysteer.methods.kmeans import kmeans

    source, target = two_classes()
    source, target = source[:samples], target[:samples]
    method = Prototype(clusters=3, direction=direction, distance=distance, weight=weight, temperature=0.3)
    fit = method.fit_site(source, target, paired=False)
    (own, own_labels), (aims, labels) = kmeans(source, 3), kmeans(target, 3)
    precision = torch.eye(6, dtype=torch.float64)
    if distance == "mahalanobis":
        precision = BayesPrecision.fit(torch.cat((source - own[own_labels], target - aims[labels]))).dense()
    x = torch.cat(two_classes()).double()[::7]
    difference = x[:, None] - torch.cat((own, aims)).double()
    squared = torch.einsum("nki,ij,nkj->nk", difference, precision, difference)
    if direction == "toward":
        u = aims.double()[squared[:, len(own) :].argmin(1)] - x
    else:
        u = (target.double().mean(0) - x) @ precision
    if weight == "gate":
        u = u * (squared.argmin(1) < len(own))[:, None]
    elif weight == "soft":
        u = u * (-squared / (2 * 0.3)).softmax(1)[:, : len(own)].sum(1, keepdim=True)
    expected = x + 0.7 * u
    assert torch.allclose(steered(x.float(), method, fit, 0.7), expected, rtol=1e-3, atol=1e-3)
    assert (expected - x).norm() > 0.1
    if weight == "gate":
        assert 0.1 < (expected == x).all(1).float().mean() < 0.9
    simple = weight == "one" and (direction, distance) != ("grad", "mahalanobis")
    assert method.op == ("prototype_shift" if simple else "gradient_shift")


@pytest.mark.parametrize("normalize", ["unit", "input"])
def test_normalize_is_passed_to_the_op(normalize):
    source, shifts, labels = planted()
    fit = Prototype(clusters=6, normalize=normalize).fit_site(source, source + shifts[labels])
    norms = shift(source, fit).norm(dim=1)
    expected = torch.ones(len(source)) if normalize == "unit" else source.norm(dim=1)
    assert torch.allclose(norms.float(), expected, rtol=1e-4)


def test_pooled_fit_uses_row_means():
    source = torch.randn(30, 7, 4, generator=torch.Generator().manual_seed(0))
    target = source + torch.randn(30, 7, 4, generator=torch.Generator().manual_seed(1))
    pooled = Prototype(clusters=3, pooled=True).fit_site(source, target)
    by_hand = Prototype(clusters=3).fit_site(source.mean(1), target.mean(1))
    for name in pooled.tensors:
        assert torch.equal(pooled.tensors[name], by_hand.tensors[name])


def test_sizes_depend_on_the_configuration_alone():
    source, shifts, labels = planted()
    few = Prototype(clusters=64).fit_site(source[:3], source[:3] + 1)
    assert {name: tuple(t.shape) for name, t in few.tensors.items()} == {
        "weight": (64, 24),
        "offset": (64,),
        "delta": (64, 24),
    }
    assert (few.tensors["offset"] == -math.inf).sum() == 61
    assert all(t.dtype == torch.float32 for t in few.tensors.values())
    many = Prototype(clusters=64).fit_site(source, source + shifts[labels])
    assert few.tensors["weight"].shape == many.tensors["weight"].shape


def test_same_seed_same_parameters():
    source, shifts, labels = planted()
    target = source + shifts[labels]
    for paired in (True, False):
        first, second = (Prototype(clusters=9).fit_site(source, target, paired=paired, seed=3) for _ in range(2))
        assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "euclidean"}, "did you mean euclid"),
        ({"clusters": 0}, "1 to 1024"),
        ({"clusters": 2.5}, "1 to 1024"),
        ({"direction": "towards"}, "did you mean toward"),
        ({"weight": "soft", "temperature": 0.0}, "above 0"),
        ({"cluster": 4}, "did you mean clusters"),
    ],
)
def test_bad_configuration_is_named(options, message):
    with pytest.raises(InputError, match=message):
        create("prototype", **options)


def test_bad_data_is_named():
    x = torch.randn(10, 4)
    method = Prototype(clusters=2)
    with pytest.raises(InputError, match="NaN or infinity"):
        method.fit_site(x, x / 0)
    with pytest.raises(InputError, match="got 5; allowed: 4"):
        method.fit_site(x, torch.randn(10, 5))
    with pytest.raises(InputError, match="got '10 and 9'"):
        method.fit_site(x, x[:9])
    with pytest.raises(InputError, match="not empty"):
        method.fit_site(x[:0], x[:0])


def test_registry_round_trip():
    assert {"prototype", "mean_difference"} <= set(REGISTRY)
    method = Prototype(clusters=5, distance="mahalanobis")
    assert create("prototype", **method.config()) == method
    with pytest.raises(InputError, match="did you mean prototype"):
        create("prototypes")
