"""Maps of ml-act and LinEAS: read as the published hooks apply them, written back, wrong ones named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_language as tiny
import torch
from torch import Tensor

import pysteer
from pysteer.capture import Fitted
from pysteer.convert import load_ml_act, save_ml_act
from pysteer.errors import InputError
from pysteer.methods import AurA, GaussianTransport, LinearAcT, MeanDifference
from pysteer.ops import affine_shift
from pysteer.steering import SiteParameters

WIDTH = 5
QUANTILES = {"q_0_100": (-1.2, 1.2), "q_1_99": (-0.4, 0.5)}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantiles() -> dict[str, list[Tensor]]:
    spread = 1 + 0.1 * torch.arange(WIDTH)
    return {name: [low * spread, high * spread] for name, (low, high) in QUANTILES.items()}


def state(kind: str, width: int = WIDTH) -> dict[str, Any]:
    """What the published code would save."""
    limits = {"quantiles_dict_src": quantiles(), "quantiles_src": [-1e6, 1e6]}
    if kind == "linear_ot":
        return {"net.w1": draw(1, 1, width), "net.b1": draw(2, 1, width), **limits}
    if kind == "lineas":
        units = {f"net.weights.{i}": draw(i, 1) for i in range(width)}
        return {"dim": width, **units, **{f"net.biases.{i}": draw(90 + i, 1) for i in range(width)}}
    if kind == "aura":
        return {"auroc": torch.linspace(0.2, 1.0, width)}
    std = {"std1": 0.5 + draw(3, width).abs(), "std2": 0.5 + draw(4, width).abs()}
    std["std1"][1] = 1e-5  # a dead unit
    return {"mu1": draw(5, width), "mu2": draw(6, width), **std, **limits}


def hook(kind: str, held: dict[str, Any], support: str, z: Tensor, strength: float) -> Tensor:
    """What the published hooks make of an output [B, T, D] or [B, C, H, W], written from their formulas."""
    maps = z.dim() == 4

    def shaped(vector: Tensor) -> Tensor:
        return vector.reshape(1, -1, 1, 1) if maps else vector.reshape(1, 1, -1)

    pooled = z.mean((2, 3), keepdim=True) if maps else z
    if kind == "aura":
        auroc = held["auroc"]
        alpha = shaped(torch.where(auroc > 0.5, 1 - 2 * (auroc - 0.5), 1.0))
        return (1 - strength) * z + strength * alpha * z
    low, high = (torch.tensor(-1e6), torch.tensor(1e6))
    if support != "all":
        low, high = held["quantiles_dict_src"]["q_" + support.replace("-", "_")]
    gate = (shaped(low) < pooled) & (pooled < shaped(high))
    if kind in ("linear_ot", "lineas"):
        if kind == "linear_ot":
            w, b = held["net.w1"], held["net.b1"]
        else:
            w, b = (torch.hstack([held[f"net.{n}.{i}"] for i in range(held["dim"])]) for n in ("weights", "biases"))
        moved = strength * (pooled * shaped(w) + shaped(b)) + (1 - strength) * pooled
        return torch.where(gate, z - pooled + moved, z)
    ratio = shaped(torch.ones(WIDTH) if kind == "mean_ot" else held["std2"] / held["std1"])
    carried = ratio * (z - shaped(held["mu1"])) + shaped(held["mu2"])
    alive = shaped((held["std1"] > 1e-4) & (held["std2"] > 1e-4))
    return torch.where(gate & alive, strength * carried + (1 - strength) * z, z)


def apply(entry: SiteParameters, x: Tensor, strength: float) -> Tensor:
    banks = {name: torch.cat((torch.zeros_like(t), t)) for name, t in entry.tensors.items()}
    table = {"slot": torch.ones(1, len(x), dtype=torch.int32), "strength": torch.full((1, len(x)), strength)}
    given = {"clock": torch.tensor(0), "channel_dim": 1 if x.dim() == 4 else -1, **entry.options}
    return affine_shift(x, **banks, **table, **given)


def write(folder: Path, states: dict[str, dict[str, Any]]) -> Path:
    for name, held in states.items():
        torch.save(held, folder / f"{name}.statedict")
    return folder


CASES = [
    ("linear_ot", "0-100"), ("linear_ot", "1-99"), ("linear_ot", "all"), ("gaussian_ot", "all"),
    ("gaussian_ot", "0-100"), ("mean_ot", "all"), ("mean_ot", "1-99"), ("aura", "all"), ("lineas", "all"),
]  # fmt: skip


@pytest.mark.parametrize("strength", [0.5, 1.0, -2.0])
@pytest.mark.parametrize("shape", [(3, 7, WIDTH), (3, WIDTH, 4, 4)], ids=["tokens", "maps"])
@pytest.mark.parametrize(("kind", "support"), CASES)
def test_maps_do_what_the_published_hooks_do(
    kind: str, support: str, shape: tuple[int, ...], strength: float, tmp_path: Path
) -> None:
    held = state(kind)
    write(tmp_path, {"net.2:0": held})
    fitted = load_ml_act(tmp_path, kind, support, spatial=".*" if len(shape) == 4 else "")
    x = draw(8, *shape)
    if len(shape) == 4:
        x += draw(9, *shape[:2], 1, 1)  # means that are on either side of the bounds
    got = apply(fitted.parameters[0], x, strength)
    torch.testing.assert_close(got, hook(kind, held, support, x, strength), rtol=1e-5, atol=1e-5)
    moved = got != x
    assert bool(moved.any())
    if support != "all":
        assert not bool(moved.all())  # the support leaves some values alone


def test_the_published_supports_are_the_default(tmp_path: Path) -> None:
    for kind, support in (("linear_ot", "0-100"), ("gaussian_ot", "all"), ("mean_ot", "all")):
        write(tmp_path, {"m:0": state(kind)})
        fitted = load_ml_act(tmp_path, kind)
        assert getattr(fitted.method, "support", None) == support
        assert ("low" in fitted.parameters[0].tensors) == (support != "all")
    assert load_ml_act(tmp_path, "mean_act", "q_0_100").parameters[0].tensors["low"].shape == (1, WIDTH)


def test_older_aura_files_and_linear_maps_per_unit_are_read(tmp_path: Path) -> None:
    alpha = torch.rand(1, 1, WIDTH)
    write(tmp_path, {"a": {"alpha": alpha}})
    assert torch.equal(load_ml_act(tmp_path, "aura").parameters[0].tensors["gain"], alpha[0])
    write(tmp_path, {"a": state("lineas")})
    fitted = load_ml_act(tmp_path, "linear_act", "all")
    assert torch.equal(fitted.parameters[0].tensors["gain"], torch.hstack([draw(i, 1) for i in range(WIDTH)])[None])


def test_modules_become_sites_in_their_order(tmp_path: Path) -> None:
    held = state("aura")
    names = ["model.layers.10.mlp:0", "model.layers.2.mlp:0", "model.layers.2.input_layernorm", "lm_head:0"]
    write(tmp_path, dict.fromkeys(names, held))
    sites = [entry.site for entry in load_ml_act(tmp_path, "aura", modules=r".*\.(mlp|input_layernorm)").parameters]
    assert sites == ["model.layers.2.input_layernorm", "model.layers.2.mlp", "model.layers.10.mlp"]
    with pytest.raises(InputError, match=r"no map matches: got .*attn.*; allowed: "):
        load_ml_act(tmp_path, "aura", modules=".*attn")
    with pytest.raises(InputError, match="no regular expression"):
        load_ml_act(tmp_path, "aura", modules="(")


@pytest.mark.parametrize(
    ("file", "site"),
    [
        ("transformer.transformer_blocks.3:0", "transformer_blocks.3:0"),
        ("transformer.transformer_blocks.3:1", "transformer_blocks.3:1"),
        ("transformer.single_transformer_blocks.3:0", "single_transformer_blocks.3"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0:0", "down_blocks.1.attentions.0.transformer_blocks.0"),
        ("text_encoder.text_model.encoder.layers.0.mlp:0", "text.text_model.encoder.layers.0.mlp"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp:0", "text_2.text_model.encoder.layers.0.mlp"),
        ("vae.decoder.conv_in:0", "vae.decoder.conv_in"),
        ("transformer.h.0.mlp.c_proj:0", "transformer.h.0.mlp.c_proj"),
        ("model.layers.0.self_attn:1", "model.layers.0.self_attn:1"),
    ],
)
def test_elements_and_parts_of_pipelines_are_named_as_the_families_do(file: str, site: str, tmp_path: Path) -> None:
    write(tmp_path, {file: state("aura")})
    fitted = load_ml_act(tmp_path, "aura")
    assert [entry.site for entry in fitted.parameters] == [site]
    save_ml_act(fitted, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == [f"{file}.statedict"]


def test_two_files_for_one_site_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"m": state("aura"), "m:0": state("aura")})
    with pytest.raises(InputError, match="two maps for site m"):
        load_ml_act(tmp_path, "aura")


# ------------------------------------------------------------------------------------------------------- both ways


def fitted_site(method: Any, *, width: int = WIDTH, seed: int = 0) -> SiteParameters:
    source, target = draw(seed, 30, width), 0.3 * draw(seed + 1, 30, width) + 1
    fit = method.fit_site(source, target, paired=False)
    banks = {name: tensor[None] for name, tensor in fit.tensors.items()}
    return SiteParameters(f"layers.{seed}", method.op, None, banks, dict(fit.options))


METHODS: dict[str, Callable[[], Any]] = {
    "linear": LinearAcT,
    "linear without support": lambda: LinearAcT(support="all"),
    "linear, odd support": lambda: LinearAcT(support="3-97.5"),
    "linear on maps": lambda: LinearAcT(of_mean=True),
    "gaussian": GaussianTransport,
    "gaussian with support": lambda: GaussianTransport(support="0-100"),
    "mean": lambda: GaussianTransport(only_mean=True),
    "aura": AurA,
    "mean difference": MeanDifference,
}


@pytest.mark.parametrize("name", METHODS)
def test_written_and_read_maps_are_the_same(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    fitted = Fitted(method, [fitted_site(method, seed=seed) for seed in (0, 7)])
    save_ml_act(fitted, tmp_path)
    kinds = {"linear": "linear_ot", "gaussian": "gaussian_ot", "mean": "mean_ot", "aura": "aura"}
    spatial = ".*" if getattr(method, "of_mean", False) else ""
    support = getattr(method, "support", "all")
    back = load_ml_act(tmp_path, kinds[name.replace(",", "").split()[0]], support, spatial=spatial)
    for before, after in zip(fitted.parameters, back.parameters, strict=True):
        assert (before.site, before.options) == (after.site, after.options)
        assert before.tensors.keys() == after.tensors.keys()
        for key, tensor in before.tensors.items():
            assert torch.equal(tensor, after.tensors[key]), key
    saved = back.save_pretrained(tmp_path / "ours")
    assert Fitted.from_pretrained(saved).parameters[0].options == back.parameters[0].options


def test_a_map_of_linear_act_goes_to_lineas_and_back(tmp_path: Path) -> None:
    method = LinearAcT(support="all")
    fitted = Fitted(method, [fitted_site(method)])
    save_ml_act(fitted, tmp_path, "lineas")
    held = torch.load(next(tmp_path.iterdir()), weights_only=True)
    assert held["dim"] == WIDTH
    assert len(held) == 1 + 2 * WIDTH
    back = load_ml_act(tmp_path, "lineas")
    assert all(torch.equal(t, back.parameters[0].tensors[name]) for name, t in fitted.parameters[0].tensors.items())


def test_gaussian_maps_keep_units_with_a_small_gain(tmp_path: Path) -> None:
    method = GaussianTransport()
    banks = {"gain": torch.tensor([[1e-6, 1e-4, 0.5, 3e4]]), "bias": torch.tensor([[0.0, 1.0, -1.0, 2.0]])}
    save_ml_act(Fitted(method, [SiteParameters("m", "affine_shift", None, banks)]), tmp_path)
    held = torch.load(tmp_path / "m:0.statedict", weights_only=True)
    assert bool((torch.minimum(held["std1"], held["std2"]) > 1e-4).all())
    back = load_ml_act(tmp_path, "gaussian_ot").parameters[0].tensors
    assert torch.equal(back["gain"], banks["gain"])
    assert torch.equal(back["bias"], banks["bias"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("aura", {"bias": torch.ones(1, 2)}, "aura of site m"),
        ("mean_ot", {"gain": torch.full((1, 2), 2.0)}, "mean_ot of site m: got 'a gain other than 1'"),
        ("gaussian_ot", {"gain": torch.tensor([[1.0, -1.0]])}, "gaussian_ot of site m: got 'gain -1'"),
        ("ot", {}, "kind of map: got 'ot'"),
    ],
)
def test_what_a_map_cannot_hold_is_refused(kind: str, change: dict, message: str, tmp_path: Path) -> None:
    banks = {"gain": torch.ones(1, 2), "bias": torch.zeros(1, 2), **change}
    fitted = Fitted(LinearAcT(support="all"), [SiteParameters("m", "affine_shift", None, banks)])
    with pytest.raises(InputError, match=message):
        save_ml_act(fitted, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    for site in ("../up", "a/b", ".hidden", "", "a..b", "x" * 300):
        entry = fitted_site(LinearAcT(support="all"))
        entry.site = site
        with pytest.raises(InputError, match="module name as a file name"):
            save_ml_act(Fitted(LinearAcT(support="all"), [entry]), tmp_path / "out")
    stepped = fitted_site(LinearAcT(support="all"))
    stepped.steps = (0,)
    with pytest.raises(InputError, match="steps of site"):
        save_ml_act(Fitted(LinearAcT(support="all"), [stepped]), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize("given", ["linear_ot", "gaussian_ot", "mean_ot", "aura", "lineas"])
@pytest.mark.parametrize("held", ["linear_ot", "gaussian_ot", "aura", "lineas"])
def test_another_kind_of_map_is_named(held: str, given: str, tmp_path: Path) -> None:
    fits = held == given or (held, given) in {("gaussian_ot", "mean_ot"), ("lineas", "linear_ot")}
    write(tmp_path, {"m": state(held)})
    if fits:
        assert load_ml_act(tmp_path, given, "all").parameters
        return
    with pytest.raises(InputError, match=f"map m is of another kind: got '{held}'; allowed: {given}"):
        load_ml_act(tmp_path, given, "all")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("linear_ot", {"net.b1": torch.zeros(1, 4)}, r"shape of map m, net.b1: got \[4\]; allowed: \[5\]"),
        ("linear_ot", {"net.w1": torch.full((1, WIDTH), torch.nan)}, "values of map m, net.w1: got 'NaN"),
        ("linear_ot", {"net.w1": torch.zeros(2, WIDTH)}, "shape of map m, net.w1"),
        ("linear_ot", {"net.w1": torch.zeros(1, WIDTH, dtype=torch.int64)}, "floating point"),
        ("linear_ot", {"net.w1": [1.0] * WIDTH}, "map m, net.w1: got 'list'"),
        ("linear_ot", {"net.w1": torch.full((1, WIDTH), 1e300, dtype=torch.float64)}, "NaN or infinity"),
        ("linear_ot", {"quantiles_dict_src": {"q_1_99": quantiles()["q_1_99"]}}, "support of map m: got 'q_0_100'"),
        ("linear_ot", {"quantiles_dict_src": {"q_0_100": [torch.zeros(3), torch.ones(3)]}}, "map m, q_0_100"),
        ("gaussian_ot", {"std1": torch.ones(4)}, "map m, std1"),
        ("aura", {"auroc": torch.full((WIDTH,), 1.5)}, "auroc: got '1.5 to 1.5'; allowed: 0 to 1"),
        ("lineas", {"net.weights.7": torch.ones(1)}, "lacks a unit"),
        ("lineas", {"dim": 6}, "units of map m: got 5; allowed: 6"),
        ("lineas", {"net.weights.0": torch.ones(2)}, "net.weights.0"),
    ],
)
def test_damaged_maps_are_named(kind: str, change: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"m": {**state(kind), **change}})
    with pytest.raises(InputError, match=message):
        load_ml_act(tmp_path, kind)


def test_there_must_be_maps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder of maps not found"):
        load_ml_act(tmp_path / "none", "aura")
    with pytest.raises(InputError, match=r"folder of maps: got .*; allowed: one with MODULE:k.statedict files"):
        load_ml_act(tmp_path, "aura")
    write(tmp_path, {"m": state("aura")})
    for given, message in (({"support": "0-100"}, "support of aura"), ({"names": "flux"}, "names: got 'flux'")):
        with pytest.raises(InputError, match=message):
            load_ml_act(tmp_path, "aura", **given)


# ---------------------------------------------------------------------------------------------------------- models


def test_maps_steer_a_model_that_they_are_looked_up_in(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    held = {
        "transformer.h.1.mlp.c_proj:0": state("linear_ot", tiny.WIDTH),
        "transformer.h.2:0": state("linear_ot", tiny.WIDTH),
    }
    fitted = load_ml_act(write(tmp_path, held), "linear_ot", "all", model=model)
    assert [entry.site for entry in fitted.parameters] == ["transformer.h.1.mlp.c_proj", "transformer.h.2"]
    with torch.no_grad():
        before = model(tiny.IDS).logits
        with pysteer.steer(model, fitted.plan(), strength=0.5):
            steered = model(tiny.IDS).logits
        handles = []
        for name, own in held.items():
            module = model.get_submodule(name.partition(":")[0])

            def change(module: Any, _: Any, output: Any, own: dict = own) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                made = hook("linear_ot", own, "all", first, 0.5)
                return (made, *output[1:]) if isinstance(output, tuple) else made

            handles.append(module.register_forward_hook(change))
        hooked = model(tiny.IDS).logits
        for handle in handles:
            handle.remove()
        assert torch.equal(model(tiny.IDS).logits, before)
    assert not torch.allclose(steered, before, atol=1e-3)
    torch.testing.assert_close(steered, hooked, rtol=1e-4, atol=1e-4)


def test_maps_of_another_model_are_refused(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    write(tmp_path, {"model.layers.0.mlp:0": state("aura", tiny.WIDTH)})
    with pytest.raises(InputError, match=r"no site of the model matches: got 'model.layers.0.mlp:0'"):
        load_ml_act(tmp_path, "aura", model=model)
    (tmp_path / "model.layers.0.mlp:0.statedict").unlink()
    write(tmp_path, {"transformer.h.0.mlp.c_proj:0": state("aura", 7)})
    with pytest.raises(InputError, match=r"width of map .*: got 7; allowed: 32"):
        load_ml_act(tmp_path, "aura", model=model)
    write(tmp_path, {"transformer.h.0.mlp.c_proj:1": state("aura", 7)})
    with pytest.raises(InputError, match=r"no site of the model matches: got 'transformer.h.0.mlp.c_proj:1'"):
        load_ml_act(tmp_path, "aura", model=model)


def test_short_names_are_written_as_modules(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    entry = fitted_site(LinearAcT(support="all"), width=tiny.WIDTH)
    entry.site = "block.2"
    save_ml_act(Fitted(LinearAcT(support="all"), [entry]), tmp_path, model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.h.2:0.statedict"]
