"""Every registered method on a toy model: fitted, saved, loaded, steered with, against its formula in fp64."""

from typing import Any

import pytest
import torch
from applying import normal
from torch import Tensor

from pysteer.capture import Fitted
from pysteer.capture.fitted import stack_fits
from pysteer.errors import InputError
from pysteer.methods import REGISTRY, SiteFit, create
from pysteer.models.sae import SparseAutoencoder
from pysteer.ops import get
from pysteer.ops.linear_gate import linear_gate_reference
from pysteer.steering.call import Call, split

WIDTH = 6
SAE = SparseAutoencoder(normal(12, WIDTH, 90), torch.zeros(12), normal(12, WIDTH, 91), torch.zeros(WIDTH), "topk", 4)
MOVES = object()  # the fit carries the source to the target
CASES: list[tuple[str, dict[str, Any], object]] = [
    ("affine_transport", {"rank": 3}, MOVES),
    ("affine_transport", {"rank": None}, MOVES),
    ("aura", {}, None),
    ("channel_steering", {"channels": (1, 4), "unit": "sigma"}, None),
    ("contrastive_direction", {}, MOVES),
    ("contrastive_direction", {"direction": "lda", "apply": "replace"}, None),
    ("contrastive_direction", {"direction": "pca_center", "apply": "project"}, None),
    ("gated", {"method": "mean_difference", "gate": "ood"}, MOVES),
    ("gated", {"method": "mean_difference", "gate": "min_max", "per_token": True}, MOVES),
    ("gated", {"method": "prototype", "options": {"clusters": 2}, "threshold": None}, None),
    ("gaussian_transport", {}, MOVES),
    ("gaussian_transport", {"only_mean": True}, MOVES),
    ("linear_act", {"support": "all"}, MOVES),
    ("linear_transport", {}, MOVES),
    ("mean_difference", {}, MOVES),
    ("mlp_transport", {"hidden": 8, "epochs": 200}, MOVES),
    ("norm_preserving", {"method": "mean_difference"}, None),
    ("prototype", {"clusters": 3}, MOVES),
    ("prototype", {"clusters": 3, "direction": "grad", "distance": "mahalanobis"}, None),
    ("sae_steering", {"sae": SAE, "mode": "ablate"}, None),
    ("sae_steering", {"sae": SAE, "mode": "add", "error": "drop"}, None),
    ("sae_steering", {"sae": SAE, "mode": "unlearn", "percentile": 80.0}, None),
]
UNFITTED = {"vector_steering"}
each_case = pytest.mark.parametrize(
    ("name", "config", "aim"), CASES, ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(CASES)]
)


def rows(count: int, seed: int) -> Tensor:
    return normal(4 * count, WIDTH, seed).view(count, 4, WIDTH)


def samples(count: int = 30) -> tuple[Tensor, Tensor]:
    source = rows(count, 0) + 1
    return source, 1.5 * source + torch.tensor([2.0, -1.0, 0.0, 0.5, 0.0, 1.0]) + 0.1 * rows(count, 1)


def steered(op: str, fit: SiteFit, x: Tensor, strength: float = 1.0) -> Tensor:
    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in fit.tensors.items()}
    call = Call.make(op, banks, fit.options, "tokens", common=fit.shared)
    return call(x, torch.ones(1, len(x), dtype=torch.int32), torch.full((1, len(x)), strength), torch.tensor(0), None)


def formula(op: str, fit: SiteFit, x: Tensor, strength: float) -> Tensor:
    """The reference of the op in fp64; the gate and the kept length by hand."""
    tensors, gate = split(fit.tensors)
    options, gate_options = split(fit.options)
    keep_norm, x = options.pop("keep_norm", False), x.double()
    banks = {name: torch.stack((torch.zeros_like(t), t)) for name, t in tensors.items()}
    table = (torch.ones(1, len(x), dtype=torch.int32), torch.full((1, len(x)), strength), torch.tensor(0))
    names = ("slot", "strength", "clock")
    y = get(op).reference(x, **banks, **dict(zip(names, table, strict=True)), **fit.shared, **options)
    if gate:
        opened = linear_gate_reference(x, **gate, **gate_options)
        y = x + opened.reshape(*opened.shape, *[1] * (x.dim() - opened.dim())) * (y - x)
    return y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True) if keep_norm else y


def test_every_method_takes_part() -> None:
    assert {name for name, _, _ in CASES} | UNFITTED == set(REGISTRY)


@each_case
def test_a_fit_steers_as_its_formula_says(name: str, config: dict[str, Any], aim: object) -> None:
    method, (source, target) = create(name, **config), samples()
    fit = method.fit_site(source, target, seed=4)
    assert set(fit.tensors) == set(method.shapes)
    again = method.fit_site(source, target, seed=4)
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in fit.tensors.items())
    for strength in (1.0, -0.5):
        moved = steered(method.op, fit, source, strength)
        assert not torch.equal(moved, source)
        wanted = formula(method.op, fit, source, strength)
        close = (moved.double() - wanted).abs() <= 1e-5 * (1 + wanted.abs())
        assert close.all(-1).float().mean() > 0.99  # rounding may decide about a prototype or a gate
    assert torch.equal(steered(method.op, fit, source, 0.0), source)
    if aim is MOVES:
        before, after = (
            (x.mean((0, 1)) - target.mean((0, 1))).norm() for x in (source, steered(method.op, fit, source))
        )
        assert after < 0.2 * before


@each_case
def test_saved_and_loaded_equals_fitted(name: str, config: dict[str, Any], aim: object, tmp_path) -> None:
    method, (source, target) = create(name, **config), samples()
    fits = {step: method.fit_site(source + step, target, seed=1) for step in range(2)}
    entry = stack_fits("block.0", method.op, fits)
    Fitted(method, [entry]).save_pretrained(tmp_path)
    loaded = Fitted.from_pretrained(tmp_path)
    again = loaded.parameters[0]
    if name != "sae_steering":  # an autoencoder that was given as such is not part of the configuration
        assert loaded.method == method
    assert (again.site, again.op, again.steps, again.options) == (entry.site, entry.op, entry.steps, entry.options)
    assert set(again.tensors | again.shared) == set(entry.tensors | entry.shared)
    for key, tensor in (entry.tensors | entry.shared).items():
        assert torch.equal((again.tensors | again.shared)[key], tensor)
    assert loaded.plan().entries[0].at(1) == (1.0, 0.0)


def odd_samples() -> dict[str, tuple[Tensor, Tensor]]:
    source, target = samples(6)
    dead, constant = source.clone(), target.clone()
    dead[..., 2], constant[..., 2] = 0.0, 3.0
    flat = torch.ones(5, 4, WIDTH)
    return {
        "a dead unit": (dead, target),
        "a constant unit of the target": (source, constant),
        "both constant": (dead, constant),
        "one row": (source[:1], target[:1]),
        "one token": (source[:1, :1], target[:1, :1]),
        "fewer samples than channels": (source[:3, :1], target[:3, :1]),
        "the same row again and again": (source[:1].expand(7, -1, -1), target[:1].expand(7, -1, -1)),
        "no variation at all": (flat, 2 * flat),
        "the same on both sides": (source, source),
    }


@pytest.mark.parametrize("what", odd_samples())
@each_case
def test_odd_samples_give_finite_parameters_or_say_why(
    name: str, config: dict[str, Any], aim: object, what: str
) -> None:
    method, (source, target) = create(name, **config), odd_samples()[what]
    said = ""
    try:
        fit = method.fit_site(source, target)
    except InputError as error:
        said = str(error)
    if said:
        assert what not in ("a dead unit", "a constant unit of the target", "both constant")
        assert "at least" in said or "do not differ" in said or "zeros" in said
        return
    for key, tensor in fit.tensors.items():
        assert (tensor.isfinite() | ((tensor == -torch.inf) & (key == "offset"))).all(), key
    x = rows(5, 9)
    moved = steered(method.op, fit, x)
    assert moved.isfinite().all()
    assert (moved - x).norm() < 100 * (1 + x.norm() + target.norm())
