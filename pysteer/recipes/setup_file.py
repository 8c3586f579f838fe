"""Steering setups: which layers are steered at which scales, how strongly, for which rows.

The JSON format is that of the prototype experiments:

    {"scales": {"0": {"layers": [-1], "strength_cond": 3.0, "strength_uncond": 1.0}, ...},
     "layers_text": [0, 1], "strength_text": 5.0}

`[-1]` means every layer, `[]` none; scales left out are not steered. `layers_text` names blocks of the text encoder;
without it the output of the encoder is steered. Strengths are dimensionless factors on the fitted shift.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError

_LARGEST = sys.float_info.max
_SCALE_KEYS = ("layers", "strength_cond", "strength_uncond")
_KEYS = ("scales", "layers_text", "strength_text")


@dataclass(frozen=True)
class ScaleSetup:
    """One scale: layers (None = all), strength of the conditional and of the unconditional rows."""

    layers: tuple[int, ...] | None
    cond: float
    uncond: float

    @property
    def active(self) -> bool:
        return self.layers != () and (self.cond != 0.0 or self.uncond != 0.0)


@dataclass(frozen=True)
class Setup:
    """A whole setup. `text_layers`: blocks of the text encoder, None = its output, `(-1,)` = all blocks."""

    scales: Mapping[int, ScaleSetup]
    text_layers: tuple[int, ...] | None = None
    text_strength: float = 0.0

    def check(self, scales: int, layers: int, text_layers: int, where: str = "steering setup") -> None:
        """Raise `InputError` where the setup names a scale or a layer that the model does not have."""
        for scale, entry in self.scales.items():
            if scale >= scales:
                raise InputError(
                    f"{where}, scale", value=scale, allowed=f"0 to {scales - 1}", fix="remove it or use another model"
                )
            _check_layers(entry.layers or (), layers, f"{where}, layer at scale {scale}")
        if self.text_layers != (-1,):
            _check_layers(self.text_layers or (), text_layers, f"{where}, layers_text")

    def strengths(self, layers: int) -> dict[int, dict[int, tuple[float, float]]]:
        """Layer -> scale -> (cond, uncond) of every place that is steered, for a model of `layers` layers."""
        table: dict[int, dict[int, tuple[float, float]]] = {}
        for scale, entry in sorted(self.scales.items()):
            if entry.active:
                for layer in range(layers) if entry.layers is None else entry.layers:
                    table.setdefault(layer, {})[scale] = (entry.cond, entry.uncond)
        return table

    def as_json(self) -> dict[str, Any]:
        """The setup in the JSON format of the module."""
        scales = {
            str(scale): {
                "layers": [-1] if entry.layers is None else list(entry.layers),
                "strength_cond": entry.cond,
                "strength_uncond": entry.uncond,
            }
            for scale, entry in sorted(self.scales.items())
        }
        text = {} if self.text_layers is None else {"layers_text": list(self.text_layers)}
        return {"scales": scales, **text, "strength_text": self.text_strength}


def _check_layers(given: tuple[int, ...], layers: int, where: str) -> None:
    for layer in given:
        if layer >= layers:
            raise InputError(where, value=layer, allowed=f"0 to {layers - 1}, or -1 for all", fix="correct the setup")


def _loads(text: str, path: str) -> Any:
    try:
        return files.parse_json(text, "steering setup", path)
    except InputError:
        # Setup files are often cut out of a longer list, with the comma that followed them.
        return files.parse_json(re.sub(r",(\s*[}\]])", r"\1", text.rstrip().rstrip(",")), "steering setup", path)


def read_setup(path: str | Path) -> Setup:
    """Read a setup file. Raises `InputError` (one line, naming the key) for anything that is not one."""
    source = Path(path)
    if not source.is_file():
        raise InputError("steering setup not found", value=str(path), fix="check EXPERIMENT_SETUP and EXPERIMENT_DIR")
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("steering setup is not UTF-8 text", value=str(path), allowed="JSON in UTF-8") from error
    return parse_setup(_loads(text, str(path)), source.name)


def parse_setup(values: Any, name: str = "steering setup") -> Setup:
    """Make a `Setup` from the parsed JSON; `name` is what errors call it."""
    where = f"setup {name}"
    values = _section(values, _KEYS, where)
    if "scales" not in values:
        raise InputError(f"{where}, missing key", value="scales", allowed='{"0": {"layers": ...}, ...}', fix="add it")
    if not isinstance(values["scales"], dict):
        raise InputError(f"{where}, scales", value=values["scales"], allowed="scale numbers with settings")
    scales = {}
    for key, entry in values["scales"].items():
        if not re.fullmatch(r"\d{1,3}", str(key)):
            raise InputError(f"{where}, scale", value=key, allowed="a whole number from 0", fix="count scales from 0")
        scales[int(key)] = _scale(entry, f"{where}, scale {key}")
    text_layers = None
    if values.get("layers_text") is not None:
        parsed = _layers(values["layers_text"], f"{where}, layers_text")
        text_layers = (-1,) if parsed is None else parsed
    return Setup(scales, text_layers, _strength(values.get("strength_text", 0.0), f"{where}, strength_text"))


def _section(values: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(where, value=values, allowed=f"an object with {', '.join(keys)}", fix="see the example setups")
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            fix = f"did you mean {near[0]}?" if near else "remove it"
            raise InputError(f"{where}, unknown key", value=key, allowed=", ".join(keys), fix=fix)
    return values


def _scale(entry: Any, where: str) -> ScaleSetup:
    entry = _section(entry, _SCALE_KEYS, where)
    for key in _SCALE_KEYS:
        if key not in entry:
            raise InputError(f"{where}, missing key", value=key, allowed=", ".join(_SCALE_KEYS), fix=f"add {key}")
    layers = _layers(entry["layers"], f"{where}, layers")
    cond = _strength(entry["strength_cond"], f"{where}, strength_cond")
    return ScaleSetup(layers, cond, _strength(entry["strength_uncond"], f"{where}, strength_uncond"))


def _layers(value: Any, where: str) -> tuple[int, ...] | None:
    if value == [-1]:
        return None
    numbers = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    if not numbers or len(set(value)) != len(value):
        raise InputError(
            where, value=value, allowed="[-1] for all, or different numbers from 0", fix="correct the list"
        )
    return tuple(value)


def _strength(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise InputError(where, value=value, allowed="a finite number", fix="give 0 for no steering")
    return float(value)


def write_setup(path: str | Path, setup: Setup) -> Path:
    """Write a setup file atomically."""
    return files.write_json(path, setup.as_json())
