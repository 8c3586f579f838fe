"""The two configuration files of the prototype experiments: `experiment_configuration.yml` and
`infinity_configuration.yml`.

The keys of the first are the keys of the recipe, whatever their case. This module adds what the files mean by their
paths: they are relative to the folder the command runs in, to the folder of the configuration file or its parent, or,
beginning with `../`, to the `Infinity` folder beside the experiment folder (the scripts changed into it). The second
file names official weights by the arguments of Infinity's own `run_infinity.py`, or one of the bundled generators.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pysteer.errors import InputError
from pysteer.recipes.config import build_config, merge_values, read_values

_PATH_KEYS = ("dataset_path", "experiment_dir", "infinity")

# Arguments of run_infinity.py that only choose how it caches files or that hold one value for every published model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "use_bit_label": (1,),
    "use_scale_schedule_embedding": (0,),
    "rope2d_each_sa_layer": (1,),
    "rope2d_normalized_by_hw": (2,),
    "add_lvl_embeding_only_first_block": (1,),
    "sampling_per_bits": (1,),
    "enable_positive_prompt": (0,),
    "checkpoint_type": ("torch", "torch_shard"),
    "use_flex_attn": (0, 1),
    "enable_model_cache": (0, 1),
    "cache_dir": (),
    "bf16": (0, 1),
}


@dataclass(frozen=True)
class InfinityFiles:
    """Which generator to use.

    Attributes:
        model: name of a bundled generator, or folder of a converted pipeline; empty when official weights are named.
        model_path: official transformer weights (`.pth` file or folder of shards).
        vae_path: official weights of the image tokenizer.
        text_encoder_ckpt: folder of the T5 text encoder.
        model_type: `infinity_layer12`, `infinity_2b`, `infinity_8b` and so on.
        vae_type: bits per token of the image tokenizer.
        pn: image size, 0.06M, 0.25M, 0.60M or 1M.
        text_channels: width of the text encoder.
        apply_spatial_patchify: 1 for the 8b model, else 0.
        h_div_w_template: height / width of the images.
        tau: temperature; None takes the recipe's.
        cfg: guidance; None takes the recipe's.
        cfg_insertion_layer: 0 mixes the logits; -k mixes the features after layer depth - k.
        seed: accepted; the recipe's seed is used.
    """

    model: str = ""
    model_path: str = ""
    vae_path: str = ""
    text_encoder_ckpt: str = ""
    model_type: str = ""
    vae_type: int | None = None
    pn: str | None = None
    text_channels: int = 2048
    apply_spatial_patchify: int | None = None
    h_div_w_template: float = 1.0
    tau: float | None = None
    cfg: float | None = None
    cfg_insertion_layer: int = 0
    seed: int | None = None


def locate(path: str, bases: Sequence[Path]) -> Path | None:
    """The first existing reading of `path`: as it is, below one of `bases`, or below their `Infinity` folder.

    The last is worked out as text, so that `../experiment/weights` is found where no `Infinity` folder exists.
    """
    given = Path(path).expanduser()
    candidates = [given]
    if not given.is_absolute():
        candidates += [Path(os.path.normpath(base / inner / given)) for inner in ("", "Infinity") for base in bases]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def prepare(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values of an experiment file (keys in lower case) for the recipe's dataclass: empty keys dropped, paths found.

    `folder` is the folder of the file. Raises `InputError` for a path that no reading of it finds.
    """
    ready = {key: value for key, value in values.items() if value is not None}
    bases = [Path.cwd(), folder, folder.parent]
    for key in _PATH_KEYS:
        path = str(ready.get(key, "")).strip()
        if not path or (key == "infinity" and _is_name(path)):
            continue
        found = locate(path, bases)
        if found is None:
            raise InputError(
                f"{key.upper()} not found",
                value=path,
                allowed=f"a path from {', '.join(str(base) for base in dict.fromkeys(bases))}",
                fix="correct the path",
            )
        ready[key] = os.path.relpath(found) if not Path(path).is_absolute() else str(found)
    return ready


def _is_name(text: str) -> bool:
    from pysteer.zoo import available

    return text in available()["generators"]


def experiment_file(experiment_dir: str, part: str, name: str) -> Path:
    """Path of `name` in folder `part` (setup, weights, results) of an experiment.

    Understands names with the folder in front (`setup/a.json`) and the habit of paths from the `Infinity` folder
    (`../experiment_7/weights/unchanged.pth`). The file need not exist.
    """
    base = Path(experiment_dir) if experiment_dir else Path()
    given = Path(name).expanduser()
    if given.is_absolute():
        return given
    readings = [base / part / given, base / given, Path(os.path.normpath(base.parent / "Infinity" / given)), given]
    return next((path for path in readings if path.exists()), readings[0])


def read_infinity(path: str | Path) -> InfinityFiles:
    """Read `infinity_configuration.yml` and check that its fields fit together.

    Raises `InputError` for unknown keys, values that no published model has, and fields that do not match.
    """
    values = merge_values(read_values(Path(path)))
    values = {key: value for key, value in values.items() if value is not None}
    known = [field.name for field in fields(InfinityFiles)]
    plain = {}
    for key, value in values.items():
        if key in _FIXED:
            _check_fixed(key, value)
        elif key in known:
            plain[key] = value
        else:
            near = difflib.get_close_matches(key, [*known, *_FIXED], n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise InputError(f"unknown key in {path}", value=key, allowed=", ".join([*known, *_FIXED]), fix=fix)
    found = build_config(InfinityFiles, plain)
    return found if found.model else _check_official(found, path)


def _check_fixed(key: str, value: Any) -> None:
    allowed = _FIXED[key]
    if allowed and value not in allowed and str(value) not in map(str, allowed):
        raise InputError(
            key, value=value, allowed=" or ".join(map(str, allowed)), fix="no published model has another value"
        )


def _check_official(found: InfinityFiles, path: str | Path) -> InfinityFiles:
    from pysteer.models.infinity.presets import PRESETS, preset

    for key in ("model_path", "vae_path", "text_encoder_ckpt", "model_type"):
        if not getattr(found, key):
            raise InputError(
                f"missing key in {path}",
                value=key,
                allowed="model: infinity-shapes, or model_path, vae_path, text_encoder_ckpt and model_type",
                fix=f"add {key}",
            )
    preset(found.model_type, pn=found.pn, h_div_w=found.h_div_w_template)
    shape = PRESETS[found.model_type.removeprefix("infinity_")]
    if found.vae_type is not None and found.vae_type != shape.vae_bits:
        raise InputError("vae_type", value=found.vae_type, allowed=f"{shape.vae_bits} for {found.model_type}")
    if found.apply_spatial_patchify is not None and bool(found.apply_spatial_patchify) != shape.patchify:
        raise InputError(
            "apply_spatial_patchify",
            value=found.apply_spatial_patchify,
            allowed=f"{int(shape.patchify)} for {found.model_type}",
        )
    if found.text_channels != 2048:
        raise InputError("text_channels", value=found.text_channels, allowed="2048 (flan-t5-xl)")
    return found
