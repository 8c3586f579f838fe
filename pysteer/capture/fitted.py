"""Fitted parameters of a method at a list of sites: the thing that is saved, loaded, steered with."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer import files
from pysteer.errors import InputError
from pysteer.methods import Method, SiteFit, create, random_direction
from pysteer.steering.plan import Plan, SiteParameters
from pysteer.steering.site import brief, did_you_mean

WEIGHTS, CONFIG = "parameters.safetensors", "config.json"
_FORMAT = "pysteer-fitted-1"


def stack_fits(site: str, op: str, fits: Mapping[int, SiteFit], *, lasting: bool = False) -> SiteParameters:
    """Put the fits of one site, by step, into one set of parameters; ranks and the like are filled up with zeros.

    `lasting`: there is one step, and what was fitted there serves all.
    """
    steps = tuple(sorted(fits))
    stacked = {}
    for name in fits[steps[0]].tensors:
        tensors = [fits[step].tensors[name] for step in steps]
        size = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
        stacked[name] = torch.stack([_fill(tensor, size) for tensor in tensors])
    first = fits[steps[0]]
    return SiteParameters(site, op, None if lasting else steps, stacked, dict(first.options), dict(first.shared))


def _fill(tensor: Tensor, size: list[int]) -> Tensor:
    if list(tensor.shape) == size:
        return tensor
    room = tensor.new_zeros(size)
    room[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return room


@dataclass(frozen=True)
class Fitted:
    """Parameters of one method at a list of sites.

    Attributes:
        method: the method with its configuration.
        parameters: one entry per site, in the order of the model's execution.
        meta: how they were fitted (sites, steps, rows, sequential, ...), plain JSON types.
    """

    method: Method
    parameters: list[SiteParameters]
    meta: dict[str, Any] = field(default_factory=dict)

    def plan(
        self,
        rows: str | None = None,
        strength: float = 1.0,
        schedule: Mapping[str, Mapping[Any, tuple[float, float]]] | None = None,
    ) -> Plan:
        """The plan that applies the parameters.

        Args:
            rows: "cond", "uncond" or "both"; by default those that were steered during the fit.
            strength: at every fitted site and step; dimensionless, 1 applies the fitted shift in full.
            schedule: site -> {step: (strength of cond rows, of uncond rows)} instead of the two; sites that it leaves
                out are off.

        Raises:
            InputError: the schedule names a site or a step that was not fitted.
        """
        if schedule is None:
            return Plan.build(self.parameters, rows=rows or str(self.meta.get("rows", "cond")), strength=strength)
        fitted = {entry.site: entry for entry in self.parameters}
        for site, strengths in schedule.items():
            if site not in fitted:
                fix = did_you_mean(site, fitted)
                raise InputError("scheduled site was not fitted", value=site, allowed=brief(fitted), fix=fix)
            steps = fitted[site].steps
            for step in strengths:
                if steps is not None and step not in steps:
                    allowed = ", ".join(map(str, steps))
                    raise InputError(f"scheduled step of {site} was not fitted", value=step, allowed=allowed)
        chosen = [entry for entry in self.parameters if entry.site in schedule]
        return Plan(chosen, {site: dict(strengths) for site, strengths in schedule.items()})

    def select(self, sites: Iterable[str]) -> "Fitted":
        """The same with only some of the sites; "ffn" stands for all its layers."""
        names = list(sites)
        known = [entry.site for entry in self.parameters]
        for name in names:
            if not any(name in (site, site.rpartition(".")[0]) for site in known):
                raise InputError("site was not fitted", value=name, allowed=brief(known), fix=did_you_mean(name, known))
        chosen = [e for e in self.parameters if e.site in names or e.site.rpartition(".")[0] in names]
        return Fitted(self.method, chosen, dict(self.meta))

    def random_direction(self, seed: int = 0) -> "Fitted":
        """The control: at every site and step one random direction, with every token's shift as long as before."""
        controls = []
        for i, entry in enumerate(self.parameters):
            steps = entry.steps or (0,)
            fits = {
                step: random_direction(
                    entry.op,
                    {name: tensor[row] for name, tensor in entry.tensors.items()},
                    entry.options,
                    seed=(seed * 1_000_003 + i * 1_009 + step),
                )
                for row, step in enumerate(steps)
            }
            control = stack_fits(entry.site, entry.op, fits)
            controls.append(replace(entry, tensors=control.tensors))
        return Fitted(self.method, controls, {**self.meta, "control": "random_direction"})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `parameters.safetensors` (tensors named `site/tensor`) and `config.json` into `folder`."""
        tensors = {f"{e.site}/{name}": t for e in self.parameters for name, t in (e.tensors | e.shared).items()}
        sites = [
            {"site": e.site, "op": e.op, "steps": None if e.steps is None else list(e.steps), "options": e.options}
            | ({"shared": sorted(e.shared)} if e.shared else {})
            for e in self.parameters
        ]
        config = {
            "format": _FORMAT,
            "method": self.method.name,
            "method_config": self.method.config(),
            "sites": sites,
            "meta": self.meta,
        }
        files.write_safetensors(Path(folder) / WEIGHTS, tensors)
        files.write_json(Path(folder) / CONFIG, config)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Fitted":
        """Read what `save_pretrained` wrote.

        Raises:
            InputError: a file is missing or damaged; tensors are missing, unknown, of a wrong shape or dtype, or hold
                NaN or infinite values. The message names the tensor.
        """
        config = files.read_json(Path(folder) / CONFIG, "configuration of fitted parameters")
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise InputError("format of fitted parameters", value=found, allowed=_FORMAT)
        method = create(str(config.get("method")), **_mapping(config.get("method_config"), "method_config"))
        tensors, _ = files.read_safetensors(Path(folder) / WEIGHTS, "fitted parameters", finite=False)
        entries = config.get("sites")
        if not isinstance(entries, list):
            raise InputError("sites of fitted parameters", value=entries, allowed="a list")
        parameters = [_read_site(method, _mapping(entry, "site"), tensors) for entry in entries]
        if tensors:
            raise InputError("fitted parameters hold unexpected tensors", value=", ".join(sorted(tensors)[:3]))
        return cls(method, parameters, _mapping(config.get("meta"), "meta"))


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} of fitted parameters", value=value, allowed="a JSON object")
    return value


def _read_site(method: Method, entry: dict[str, Any], tensors: dict[str, Tensor]) -> SiteParameters:
    """One site's parameters, taken out of `tensors` and checked against the method's shapes."""
    name, op, steps = entry.get("site"), entry.get("op"), entry.get("steps")
    if not isinstance(name, str) or op != method.op:
        raise InputError(f"op of site {name}", value=op, allowed=f"{method.op}, the op of method {method.name}")
    if steps is not None and not (isinstance(steps, list) and all(type(s) is int and s >= 0 for s in steps)):
        raise InputError(f"steps of site {name}", value=steps, allowed="a list of whole numbers, or null")
    found: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for tensor_name, dims in method.shapes.items():
        key = f"{name}/{tensor_name}"
        if key not in tensors:
            raise InputError("fitted parameters lack a tensor", value=key, fix="fit or fetch them again")
        tensor = tensors.pop(key)
        _check_tensor(key, tensor, 1 if steps is None else len(steps), dims, sizes)
        found[tensor_name] = tensor
    options = _mapping(entry.get("options"), f"options of site {name}")
    shared, names = {}, entry.get("shared", [])
    if not isinstance(names, list) or not all(isinstance(common, str) for common in names):
        raise InputError(f"shared tensors of site {name}", value=names, allowed="a list of names")
    for common in names:
        if f"{name}/{common}" not in tensors:
            raise InputError("fitted parameters lack a tensor", value=f"{name}/{common}", fix="fit or fetch them again")
        shared[common] = tensors.pop(f"{name}/{common}")
    parameters = SiteParameters(name, str(op), None if steps is None else tuple(steps), found, options, shared)
    parameters.check()
    return parameters


def _check_tensor(key: str, tensor: Tensor, sets: int, dims: tuple[str, ...], sizes: dict[str, int]) -> None:
    if tensor.dtype not in (torch.float32, torch.int32):
        raise InputError(f"dtype of {key}", value=str(tensor.dtype), allowed="torch.float32")
    shape = [sets, *(sizes.get(dim, 1 if dim == "1" else "any") for dim in dims)]
    fits = tensor.dim() == len(shape) and all(b in ("any", a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits:
        raise InputError(f"shape of {key}", value=list(tensor.shape), allowed=str(shape).replace("'", ""))
    sizes.update({dim: size for dim, size in zip(dims, tensor.shape[1:], strict=True) if dim != "1"})
    if bool((tensor.isnan() | (tensor == math.inf)).any()):
        raise InputError(f"values of {key}", value="NaN or infinity", allowed="finite values")
