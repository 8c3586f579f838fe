"""Maps of ml-act (Linear-AcT, Gaussian and mean transport, AurA) and of LinEAS, both ways.

Their folders hold one `MODULE:k.statedict` per site, k being the element of a tuple that the module returns. Neither
the kind of map nor the range of values it was limited to is read back from there, so both are given.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.capture.fitted import Fitted
from pysteer.convert.reading import check_vector, natural, pattern, read_pickle, state_of
from pysteer.errors import InputError
from pysteer.families import find_family
from pysteer.methods import AurA, GaussianTransport, LinearAcT, Method
from pysteer.methods.unit_map import check_std_eps, check_support
from pysteer.steering.plan import SiteParameters
from pysteer.steering.site import Site, brief, did_you_mean

SUFFIX = ".statedict"
MAPS = ("linear_ot", "gaussian_ot", "mean_ot", "aura", "lineas")
_OTHER_NAMES = {"linear_act": "linear_ot", "gaussian_act": "gaussian_ot", "mean_act": "mean_ot"}
_LARGEST_FILE = 256 * 1024 * 1024
_NO_BOUNDS = [-1e6, 1e6]  # what ml-act takes for no limit
_NAMES = ("auto", "transformers", "diffusers")
_DENOISER = re.compile(r"unet\.|text_encoder(_\d)?\.|vae\.|transformer\.((single_)?transformer_blocks|norm_out)\b")


@dataclass(frozen=True)
class MLActOptions:
    """Options of `load_ml_act` and `save_ml_act`.

    Attributes:
        map: what the maps are: linear_ot, gaussian_ot, mean_ot, aura or lineas (also linear_act, gaussian_act,
            mean_act). Needed for reading; by default that of the method for writing.
        support: range of values that is moved, all or percentages of the source such as 0-100 (theirs: q_all, q_0_100).
            Default: as published, 0-100 for linear_ot and all for the others.
        modules: regular expression that the whole module name matches; others are left out.
        spatial: regular expression of the modules that return maps [B, C, H, W], where their hooks work on the mean.
        names: auto, transformers or diffusers: how to turn module names into sites of pysteer.
        std_eps: gaussian_ot and mean_ot leave units alone of which source or target have a standard deviation of at
            most this.
    """

    map: str = ""
    support: str = ""
    modules: str = ".*"
    spatial: str = ""
    names: str = "auto"
    std_eps: float = 1e-4


def kind_of_map(name: str) -> str:
    """The map under the name that is used here; InputError for another one."""
    kind = _OTHER_NAMES.get(name, name)
    if kind not in MAPS:
        allowed = ", ".join((*MAPS, *_OTHER_NAMES))
        raise InputError("kind of map", value=name, allowed=allowed, fix=did_you_mean(name, MAPS) or "give map=...")
    return kind


# ---------------------------------------------------------------------------------------------------------- reading


def load_ml_act(
    folder: str | Path,
    kind: str,
    support: str = "",
    *,
    modules: str = ".*",
    spatial: str = "",
    names: str = "auto",
    std_eps: float = 1e-4,
    model: Any = None,
) -> Fitted:
    """Read a folder of state dicts as fitted parameters; strength 1 is theirs.

    At values beyond +-1e6 the support "all" moves what ml-act would not.

    Args:
        folder: with the files `MODULE:k.statedict`.
        model: model or pipeline they are for. Sites are then looked up in it, and `spatial` and `names` not needed.
        kind: `map` of `MLActOptions`.
        support, modules, spatial, names, std_eps: see there.

    Raises:
        InputError: no file, no module matches, no site of the model matches, a file is damaged, holds code or another
            map, or tensors do not fit together.
    """
    given, kind = kind, kind_of_map(kind)
    support = _support_of(kind, support)
    stems = _stems(Path(folder), pattern(modules, "modules"))
    sites = None if model is None else find_family(model).sites(model)
    named = _in_model(stems, sites) if sites is not None else _without_model(stems, names)
    maps_at, method = pattern(spatial, "spatial"), _method(kind, support, std_eps)
    parameters = []
    for site, stem in named.items():
        known = None if sites is None else sites[site]
        on_maps = (
            known.layout == "channels" if known is not None else bool(spatial and maps_at.fullmatch(_module(stem)))
        )
        state = state_of(read_pickle(Path(folder) / f"{stem}{SUFFIX}", "map", largest=_LARGEST_FILE), f"map {stem}")
        tensors = _tensors(kind, support, state, std_eps, f"map {stem}")
        if known is not None and known.width and known.width != len(tensors["gain"]):
            allowed = f"{known.width}, the width of site {site}"
            raise InputError(f"width of map {stem}", value=len(tensors["gain"]), allowed=allowed)
        banks = {name: tensor[None] for name, tensor in tensors.items()}
        options = method.options_of_layout("channels" if on_maps else "tokens")
        entry = SiteParameters(site, method.op, None, banks, options)
        entry.check()
        parameters.append(entry)
    meta = {"rows": "both", "source": "ml-act", "map": given, "files": named}
    return Fitted(method, parameters, meta)


def _support_of(kind: str, support: str) -> str:
    default = "0-100" if kind == "linear_ot" else "all"
    chosen = re.sub(r"^q_", "", support or default).replace("_", "-")
    check_support(chosen)
    if kind in ("aura", "lineas") and chosen != "all":
        raise InputError(f"support of {kind}", value=support, allowed="all")
    return chosen


def _stems(folder: Path, wanted: re.Pattern[str]) -> list[str]:
    if not folder.is_dir():
        raise InputError("folder of maps not found", value=str(folder), fix="check the path")
    found = sorted((path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")), key=natural)
    if not found:
        raise InputError("folder of maps", value=str(folder), allowed=f"one with MODULE:k{SUFFIX} files")
    chosen = [stem for stem in found if wanted.fullmatch(stem) or wanted.fullmatch(_module(stem))]
    if not chosen:
        raise InputError("no map matches", value=wanted.pattern, allowed=brief(map(_module, found)))
    return chosen


def _module(stem: str) -> str:
    return re.sub(r":\d+$", "", stem)


def _element(stem: str) -> int | None:
    found = re.search(r":(\d{1,3})$", stem)
    return int(found[1]) if found else None


def _without_model(stems: Iterable[str], names: str) -> dict[str, str]:
    """Site -> file, by what the names look like."""
    if names not in _NAMES:
        raise InputError("names", value=names, allowed=", ".join(_NAMES), fix=did_you_mean(names, _NAMES))
    stems = list(stems)
    pipeline = names == "diffusers" or (names == "auto" and any(_DENOISER.match(stem) for stem in stems))
    named: dict[str, str] = {}
    for stem in stems:
        site, element = _in_pipeline(_module(stem)) if pipeline else _module(stem), _element(stem)
        # Blocks with two streams return both; everything else that names element 0 returns one tensor, or it first.
        if element is not None and (element or re.fullmatch(r"transformer_blocks\.\d+", site)):
            site = f"{site}:{element}"
        if site in named:
            raise InputError(f"two maps for site {site}", value=stem, allowed="one", fix=f"remove it or {named[site]}")
        named[site] = stem
    return named


def _in_pipeline(module: str) -> str:
    for before, after in (("unet.", ""), ("transformer.", ""), ("text_encoder.", "text.")):
        if module.startswith(before):
            return after + module.removeprefix(before)
    return re.sub(r"^text_encoder_(\d)\.", r"text_\1.", module)


def _in_model(stems: Iterable[str], sites: Mapping[str, Site]) -> dict[str, str]:
    """Site -> file, by the sites that a model has.

    Raises:
        InputError: one of them is not there.
    """
    named: dict[str, str] = {}
    for stem in stems:
        module, element = _module(stem), _element(stem)
        readings = [reading for base in (module, _in_pipeline(module)) for reading in (f"{base}:{element}", base)]
        elements = (element, None) if element in (0, None) else (element,)
        fitting = [name for name in readings if name in sites and (element is None or sites[name].element in elements)]
        if not fitting:
            fix = did_you_mean(module, sites)
            raise InputError("no site of the model matches", value=stem, allowed=brief(list(sites)[:40]), fix=fix)
        named[fitting[0]] = stem
    return named


def _needed(kind: str) -> tuple[str, ...]:
    own = {
        "gaussian_ot": ("mu1", "mu2", "std1", "std2"),
        "aura": ("auroc",),
        "lineas": ("net.weights.0", "net.biases.0"),
    }
    return {**own, "mean_ot": own["gaussian_ot"]}.get(kind, ("net.w1", "net.b1"))


def _check_kind(kind: str, state: Mapping[str, Any], where: str) -> None:
    """Refuse the state dict of another kind of map by its name."""
    if all(name in state for name in _needed(kind)) or (kind == "aura" and "alpha" in state):
        return
    others = ("linear_ot", "lineas", "gaussian_ot", "aura")
    found = next((other for other in others if all(name in state for name in _needed(other))), "")
    found = found or ("aura" if "alpha" in state else f"a file with {', '.join(list(state)[:4])}")
    allowed = f"{kind}, with {', '.join(_needed(kind))}"
    raise InputError(f"{where} is of another kind", value=found, allowed=allowed, fix="give its own map and support")


def _tensors(kind: str, support: str, state: Mapping[str, Any], std_eps: float, where: str) -> dict[str, Tensor]:
    """Gain, bias and, with a support, bounds `[D]` of one site."""
    linear_in_lineas = kind == "linear_ot" and "net.weights.0" in state
    _check_kind("lineas" if linear_in_lineas else kind, state, where)
    if kind == "lineas" or linear_in_lineas:
        gain, bias = _per_unit(state, "net.weights", where), _per_unit(state, "net.biases", where)
        if len(gain) != len(bias):
            raise InputError(f"biases of {where}", value=len(bias), allowed=f"{len(gain)}, as many as weights")
    elif kind == "linear_ot":
        gain = check_vector(state["net.w1"], None, f"{where}, net.w1")
        bias = check_vector(state["net.b1"], len(gain), f"{where}, net.b1")
    elif kind == "aura":
        gain = _aura_gain(state, where)
        bias = torch.zeros_like(gain)
    else:
        gain, bias = _gaussian(state, kind == "mean_ot", std_eps, where)
    return {"gain": gain, "bias": bias, **_bounds(state, support, len(gain), where)}


def _per_unit(state: Mapping[str, Any], stem: str, where: str) -> Tensor:
    """LinEAS has a parameter of its own for every unit."""
    units = [name for name in state if name.startswith(f"{stem}.")]
    values = []
    for unit in range(len(units)):
        name = f"{stem}.{unit}"
        if name not in state:
            raise InputError(f"{where} lacks a unit", value=name, allowed=f"{stem}.0 to {stem}.{len(units) - 1}")
        values.append(check_vector(state[name], 1, f"{where}, {name}"))
    count = state.get("dim", len(values))
    count = count.item() if isinstance(count, Tensor) and count.numel() == 1 else count
    if count != len(values):
        raise InputError(f"units of {where}", value=len(values), allowed=f"{count}, its dim")
    return torch.cat(values)


def _aura_gain(state: Mapping[str, Any], where: str) -> Tensor:
    if "auroc" not in state:  # older files hold what was made of it
        return check_vector(state["alpha"], None, f"{where}, alpha")
    check_vector(state["auroc"], None, f"{where}, auroc")
    auroc = state["auroc"].detach().reshape(-1).double()
    if bool(((auroc < 0) | (auroc > 1)).any()):
        raise InputError(f"{where}, auroc", value=f"{auroc.min():g} to {auroc.max():g}", allowed="0 to 1")
    return (1 - 2 * (auroc - 0.5).clamp_min(0)).float()


def _gaussian(state: Mapping[str, Any], only_mean: bool, std_eps: float, where: str) -> tuple[Tensor, Tensor]:
    check_std_eps(std_eps)
    width = len(check_vector(state["mu1"], None, f"{where}, mu1"))
    names = ("mu1", "mu2", "std1", "std2")
    mu1, mu2, std1, std2 = (check_vector(state[name], width, f"{where}, {name}").double() for name in names)
    alive = (std1 > std_eps) & (std2 > std_eps)
    one = torch.ones_like(std1)
    gain = one if only_mean else torch.where(alive, std2 / torch.where(alive, std1, one), one).float().double()
    bias = torch.where(alive, mu2 - gain * mu1, 0.0).float()
    return gain.float(), check_vector(bias, width, f"{where}, shift")


def _bounds(state: Mapping[str, Any], support: str, width: int, where: str) -> dict[str, Tensor]:
    if support == "all":
        return {}
    name = quantile_name(support)
    known = state.get("quantiles_dict_src")
    pair = known.get(name) if isinstance(known, Mapping) else None
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        allowed = ", ".join(map(str, known)) if isinstance(known, Mapping) else "none, it holds no quantiles"
        raise InputError(f"support of {where}", value=name, allowed=allowed, fix="give another support, or all")
    low, high = (check_vector(edge, width, f"{where}, {name}") for edge in pair)
    return {"low": low, "high": high}


def quantile_name(support: str) -> str:
    """`0-100` as ml-act calls it, `q_0_100`."""
    return "q_" + support.replace("-", "_")


def _method(kind: str, support: str, std_eps: float) -> Method:
    if kind == "aura":
        return AurA()
    if kind in ("linear_ot", "lineas"):
        return LinearAcT(support=support)
    return GaussianTransport(only_mean=kind == "mean_ot", support=support, std_eps=std_eps)


# ---------------------------------------------------------------------------------------------------------- writing


def save_ml_act(fitted: Fitted, folder: str | Path, kind: str = "", *, model: Any = None) -> Path:
    """Write fitted parameters as `MODULE:k.statedict` files; `load_ml_act` gives the same parameters back.

    Gaussian maps are written with a source of mean 0 and standard deviation 1 (a power of two where the gain is small),
    which is the same map. Their hooks treat maps `[B, C, H, W]` in their own way whatever is written, see
    `MLActOptions.spatial`.

    Args:
        fitted: one that moves every unit by itself (op `affine_shift`), the same at all steps.
        folder: where they go; files that are there already are replaced.
        kind: `map` of `MLActOptions`; by default that of the method.
        model: model they are for, to turn names such as `block.3` into those of its modules.

    Raises:
        InputError: parameters that the map cannot hold.
    """
    kind = kind_of_map(kind or _map_of(fitted.method))
    support = str(getattr(fitted.method, "support", "all"))
    if kind == "lineas" and support != "all":
        raise InputError("support of lineas", value=support, allowed="all")
    sites = {} if model is None else find_family(model).sites(model)
    written = fitted.meta.get("files")
    known = written if isinstance(written, Mapping) else {}
    states = {}
    for entry in fitted.parameters:
        stem = _file_name(entry.site, sites, known)
        if stem in states:
            raise InputError("two sites of one module", value=entry.site, allowed=f"one map for {stem}")
        states[stem] = _state(kind, support, entry)
    for stem, state in states.items():
        with files.atomic_path(Path(folder) / f"{stem}{SUFFIX}") as temporary:
            torch.save(state, temporary)
    return Path(folder)


def _map_of(method: Method) -> str:
    own = {"linear_act": "linear_ot", "aura": "aura", "mean_difference": "mean_ot", "vector_steering": "mean_ot"}
    if method.name == "gaussian_transport":
        return "mean_ot" if getattr(method, "only_mean", False) else "gaussian_ot"
    if method.name not in own:
        raise InputError("ml-act has no map for the method", value=method.name, allowed=", ".join(own), fix="give map")
    return own[method.name]


def _file_name(site: str, sites: Mapping[str, Site], known: Mapping[str, Any]) -> str:
    stem = str(known.get(site, site))
    if site not in known and site in sites:
        stem = f"{sites[site].path}:{sites[site].element or 0}"
    stem = stem if re.search(r":\d+$", stem) else f"{stem}:0"
    if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*:\d{1,3}", stem) or len(stem) > 200:
        raise InputError("module name as a file name", value=stem, allowed="names with dots between, then :k")
    return stem


def _state(kind: str, support: str, entry: SiteParameters) -> dict[str, Any]:
    where = f"site {entry.site}"
    if entry.op != "affine_shift":
        raise InputError(f"op of {where}", value=entry.op, allowed="affine_shift: a gain and a bias per unit")
    if entry.steps is not None:
        raise InputError(f"steps of {where}", value=entry.steps, allowed="one map for all steps")
    entry.check()
    tensors = {name: tensor[0].detach().cpu().float() for name, tensor in entry.tensors.items()}
    option = next((name for name, value in entry.options.items() if value), "")
    if option and option != ("of_mean" if kind in ("linear_ot", "lineas") else "bounds_of_mean"):
        raise InputError(f"option of {where}", value=option, allowed=f"none that {kind} has not")
    gain, bias = tensors["gain"], tensors["bias"]
    if kind == "lineas":
        state: dict[str, Any] = {"dim": len(gain)}
        state |= {f"net.weights.{unit}": value.reshape(1) for unit, value in enumerate(gain)}
        return state | {f"net.biases.{unit}": value.reshape(1) for unit, value in enumerate(bias)}
    if kind == "aura":
        if bool(bias.any()) or bool(((gain < 0) | (gain > 1)).any()) or "low" in tensors:
            raise InputError(f"aura of {where}", value="a bias, a gain outside 0 to 1 or a support", allowed="none")
        return {"auroc": 1 - gain.double() / 2}  # in fp32 gains near 0 would lose digits
    bounds = {quantile_name(support): [tensors["low"], tensors["high"]]} if "low" in tensors else {}
    limits = {"quantiles_dict_src": bounds, "quantiles_src": next(iter(bounds.values()), list(_NO_BOUNDS))}
    if kind == "linear_ot":
        return {"net.w1": gain[None], "net.b1": bias[None], **limits}
    return {**_gaussian_state(kind, gain, bias, where), **limits}


def _gaussian_state(kind: str, gain: Tensor, bias: Tensor, where: str) -> dict[str, Tensor]:
    if kind == "mean_ot" and not bool((gain == 1).all()):
        raise InputError(
            f"mean_ot of {where}", value="a gain other than 1", allowed="a shift alone", fix="map=linear_ot"
        )
    if not bool((gain > 0).all()):
        raise InputError(
            f"gaussian_ot of {where}", value=f"gain {gain.min():g}", allowed="above 0", fix="map=linear_ot"
        )
    # A wider source where the gain is small: units whose target hardly varies are left alone. Powers of two are exact.
    small = (2e-4 / gain.double()).clamp_min(1.0)
    std1 = torch.exp2(torch.ceil(torch.log2(small))).float()
    zero = torch.zeros_like(bias)
    return {"mu1": zero, "mu2": bias, "std1": std1, "std2": gain * std1}


def convert_ml_act(source: Path, out: Path, options: MLActOptions) -> str:
    """Convert a folder of theirs to a folder of ours, or a folder of ours to one of theirs."""
    if is_fitted(source):
        fitted = Fitted.from_pretrained(source)
        save_ml_act(fitted, out, options.map)
        return f"{len(fitted.parameters)} maps in {out}"
    given = {name: getattr(options, name) for name in ("modules", "spatial", "names", "std_eps")}
    fitted = load_ml_act(source, options.map, options.support, **given)
    fitted.save_pretrained(out)
    return f"{fitted.method.name} at {len(fitted.parameters)} sites in {out}"


def is_fitted(source: Path) -> bool:
    """Whether a folder was written by `Fitted.save_pretrained`."""
    return (source / "config.json").is_file() and (source / "parameters.safetensors").is_file()
