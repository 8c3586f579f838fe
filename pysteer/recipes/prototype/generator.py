"""The generator that the configuration names: bundled, a folder, or official weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pysteer import zoo
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.infinity.convert import convert_pipeline
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.recipes.prototype.settings import ModelSize
from pysteer.recipes.source_config import InfinityFiles, locate, read_infinity


@dataclass(frozen=True)
class Generator:
    """A pipeline, the settings that its configuration file asks for, what identifies it, and its size."""

    pipe: Any
    settings: dict[str, Any]
    identity: dict[str, Any]
    size: ModelSize


def model_size(pipe: Any) -> ModelSize:
    """Scales, layers and text encoder blocks of a pipeline."""
    family, sites = find_family(pipe), find_family(pipe).sites(pipe)
    layers = sum(name.startswith("ca_block.") for name in sites)
    return ModelSize(family.steps(pipe, "visual"), layers, sum(name.startswith("text.block.") for name in sites))


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises `InputError` for a device this machine does not have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    name = "cuda:0" if device == "cuda" else device
    if name not in allowed:
        raise InputError("device", value=device, allowed=", ".join(["auto", *allowed]), fix="use device=auto")
    return torch.device(name)


def load_generator(infinity: str, device: str = "auto") -> Generator:
    """Load what `infinity` names: a bundled generator, a pipeline folder or an `infinity_configuration.yml`.

    `device` is "auto", "cpu" or "cuda:0" and so on. Official weights are converted once, into a folder beside them.
    Raises `InputError` for anything that is not there.
    """
    place = choose_device(device)
    found = _load(infinity)
    if place.type != "cpu":
        found.pipe.to(place)
    return replace(found, identity={**found.identity, "device": place.type})


def _load(infinity: str) -> Generator:
    path = Path(infinity)
    if infinity in zoo.available()["generators"]:
        return _generator(zoo.load(infinity), {}, {"model": infinity})
    if (path / "pipeline.json").is_file():
        return _generator(InfinityPipeline.from_pretrained(path), {}, {"model": str(path.resolve())})
    if path.is_file():
        return _from_file(path)
    raise InputError(
        "generator",
        value=infinity,
        allowed=f"{', '.join(zoo.available()['generators'])}, a pipeline folder, or an infinity_configuration.yml",
        fix="correct --infinity",
    )


def _from_file(path: Path) -> Generator:
    named = read_infinity(path)
    settings: dict[str, Any] = {
        name: value for name, value in (("cfg", named.cfg), ("tau", named.tau)) if value is not None
    }
    if named.cfg_insertion_layer != 0:
        settings["cfg_insertion_layer"] = (named.cfg_insertion_layer,)
    if named.model in zoo.available()["generators"]:
        return _generator(zoo.load(named.model), settings, {"model": named.model, **settings})
    bases = [Path.cwd(), path.parent, path.parent.parent]
    if named.model:
        folder = _found(named.model, bases, "model")
    else:
        folder = _convert(named, bases)
    return _generator(InfinityPipeline.from_pretrained(folder), settings, {"model": str(folder.resolve()), **settings})


def _found(path: str, bases: list[Path], key: str) -> Path:
    found = locate(path, bases)
    if found is None:
        raise InputError(f"{key} not found", value=path, fix="correct infinity_configuration.yml")
    return found


def _convert(named: InfinityFiles, bases: list[Path]) -> Path:
    weights = _found(named.model_path, bases, "model_path")
    folder = weights.with_name(f"{weights.stem}-{named.pn or 'own-size'}-pysteer")
    if not (folder / "pipeline.json").is_file():
        convert_pipeline(
            folder,
            transformer=weights,
            vae=_found(named.vae_path, bases, "vae_path"),
            text_encoder=_found(named.text_encoder_ckpt, bases, "text_encoder_ckpt"),
            pn=named.pn,
            h_div_w=named.h_div_w_template,
        )
    return folder


def _generator(pipe: Any, settings: dict[str, Any], identity: dict[str, Any]) -> Generator:
    return Generator(pipe, settings, {**identity, "weights": weights_mark(pipe)}, model_size(pipe))


def weights_mark(pipe: Any) -> str:
    """A hash over the first values of every weight: another training under the same name is another generator."""
    digest = hashlib.sha256()
    inner = getattr(pipe, "pipe", pipe)
    parts = getattr(inner, "components", vars(inner))
    for part in (part for part in parts.values() if isinstance(part, torch.nn.Module)):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
