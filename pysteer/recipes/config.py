"""Configurations: frozen dataclasses, filled from a YAML file and from `key=value` words.

Keys match whatever their case, so `CFG=4` and `cfg=4` are the same. Values are converted to the type of the field:
bool, int, float, str, Path, Literal, Enum, Optional and other unions, list, tuple, dict, and nested dataclasses.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from pysteer.errors import InputError
from pysteer.files import plain

Config = TypeVar("Config")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NOTHING = ("", "null", "none", "~")


class Word(str):
    """The value of a `key=value` word: still text, because its meaning depends on the type of the field."""

    __slots__ = ()

    def parsed(self) -> Any:
        """The value as YAML, so `[a, 1]` is a list and `3` a number."""
        from omegaconf import OmegaConf

        if not self.strip():
            return None
        try:
            container = OmegaConf.to_container(OmegaConf.create(f"value: {self}"), resolve=True)
            return container["value"]  # type: ignore[index, call-overload]
        except Exception:  # not YAML: then it is what it looks like, a piece of text
            return str(self)


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Turn `["a=1", "b.c=x"]` into `{"a": Word("1"), "b": {"c": Word("x")}}`.

    Raises:
        InputError: a word without `=`, or a key given twice in ways that contradict each other.
    """
    values: dict[str, Any] = {}
    for word in words:
        flag = word.startswith("--") and "=" not in word  # --flat-vec is short for flat_vec=true
        key, equals, value = (f"{word}=true" if flag else word).partition("=")
        parts = key.strip().lstrip("-").replace("-", "_").split(".")
        if not equals or not all(parts):
            raise InputError("override", value=word, allowed="key=value", fix="write for example cfg=4")
        place = values
        for part in parts[:-1]:
            place = place.setdefault(part.lower(), {})
            if not isinstance(place, dict):
                raise InputError("override inside a key that already has a value", value=word)
        place[parts[-1].lower()] = Word(value)
    return values


def read_values(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) configuration file, with OmegaConf's `${...}` references resolved.

    Raises:
        InputError: missing file, not YAML, or not a mapping of keys to values.
    """
    from omegaconf import OmegaConf

    if not path.is_file():
        raise InputError("configuration file not found", value=str(path), fix="check the path")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    # Dates, numbers and tags that are none fail in the parser with errors of every kind.
    except Exception as error:
        raise InputError(
            f"configuration file is not YAML ({error})", value=str(path), allowed="YAML or JSON"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            "configuration file", value=str(path), allowed="keys with values", fix="write key: value lines"
        )
    return {str(key): value for key, value in values.items()}


def merge_values(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later ones win; keys are compared without regard to case."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            name = str(key).lower()
            before = merged.get(name)
            if isinstance(value, Mapping) and isinstance(before, dict):
                merged[name] = merge_values(before, value)
            else:
                merged[name] = merge_values(value) if _is_section(value) else value
    return merged


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def build_config(kind: type[Config], values: Mapping[str, Any], prefix: str = "") -> Config:
    """Make a `kind` (a dataclass) from nested values; fields without a value keep their default.

    Raises:
        InputError: a key the dataclass does not have (with the nearest one), a value that does not fit its field, or a
            field without a default left out.
    """
    fields = {field.name.lower(): field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, value in values.items():
        field = fields.get(str(key).lower())
        if field is None:
            raise _unknown(prefix + str(key), [prefix + known.name for known in fields.values()])
        given[field.name] = convert(value, hints[field.name], prefix + field.name)
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise InputError("missing key", value=prefix + field.name, fix=f"give {prefix}{field.name}=...")
    return kind(**given)


def _unknown(key: str, allowed: list[str]) -> InputError:
    near = difflib.get_close_matches(key.lower(), [name.lower() for name in allowed], n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else "use one of them"
    return InputError("unknown key", value=key, allowed=", ".join(allowed), fix=fix)


def _bad(key: str, value: Any, allowed: str) -> InputError:
    return InputError(key, value=value if not isinstance(value, Word) else str(value), allowed=allowed)


def describe(hint: Any) -> str:
    """A type hint in words a user understands."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join("nothing" if item is None else str(item) for item in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if item is type(None) else describe(item) for item in arguments)
    if origin in (list, tuple) and arguments:
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return "keys with values"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(str(member.value) for member in hint)
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def convert(value: Any, hint: Any, key: str) -> Any:
    """Convert one value to the type `hint`; see the module for the types.

    Raises:
        InputError: naming `key`, the value and what was allowed.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value.parsed() if isinstance(value, Word) else value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, hint, key)
    if origin is Literal:
        return _convert_choice(value, {str(item).lower(): item for item in arguments}, hint, key)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, hint):
            return value
        return _convert_choice(value, {str(member.value).lower(): member for member in hint}, hint, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        value = value.parsed() if isinstance(value, Word) else value
        if not isinstance(value, Mapping):
            raise _bad(key, value, f"keys of {hint.__name__}")
        return build_config(hint, value, prefix=f"{key}.")
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_list(value, origin or hint, arguments, hint, key)
    if origin is dict or hint is dict:
        return _convert_dict(value, arguments, hint, key)
    return _convert_scalar(value, hint, key)


def _convert_union(value: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> Any:
    if type(None) in arguments and (value is None or (isinstance(value, Word) and value.strip().lower() in _NOTHING)):
        return None
    # Text accepts anything, so it is asked last: `int | str` takes 3 as a number.
    for option in sorted(arguments, key=lambda item: item in (str, Path)):
        if option is type(None):
            continue
        try:
            return convert(value, option, key)
        except InputError as error:
            if len(arguments) == 2 and type(None) in arguments:
                raise
            failure = error
    raise _bad(key, value, describe(hint)) from failure


def _convert_choice(value: Any, choices: Mapping[str, Any], hint: Any, key: str) -> Any:
    found = choices.get(str(value).strip().lower(), dataclasses.MISSING)
    if found is dataclasses.MISSING:
        raise _bad(key, value, describe(hint))
    return found


def _convert_list(value: Any, kind: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> Any:
    if isinstance(value, Word):
        value = value.parsed() if value.strip().startswith("[") else [Word(item) for item in value.split(",") if item]
    if isinstance(value, str) or not isinstance(value, Sequence):
        value = [value]
    repeated = kind is list or (len(arguments) == 2 and arguments[1] is Ellipsis)
    if not repeated and arguments and len(arguments) != len(value):
        raise _bad(key, list(value), f"{len(arguments)} values")
    options = (arguments[:1] or (Any,)) * len(value) if repeated or not arguments else arguments
    items = [convert(item, option, f"{key}[{i}]") for i, (item, option) in enumerate(zip(value, options, strict=True))]
    return tuple(items) if kind is tuple else items


def _convert_dict(value: Any, arguments: tuple[Any, ...], hint: Any, key: str) -> dict[Any, Any]:
    value = value.parsed() if isinstance(value, Word) else value
    if not isinstance(value, Mapping):
        raise _bad(key, value, describe(dict[str, Any]))
    name_hint, item_hint = arguments or (Any, Any)
    return {
        convert(name, name_hint, f"{key} key"): convert(item, item_hint, f"{key}.{name}")
        for name, item in value.items()
    }


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is str and value is None:  # `KEY:` without a value in a YAML file
        return ""
    if hint in (str, Path) and isinstance(value, (str, int, float, Path)) and not isinstance(value, bool):
        if hint is Path and not str(value).strip():
            raise _bad(key, value, describe(hint))
        return hint(str(value))
    text = str(value).strip().lower()
    if hint is bool and (isinstance(value, (bool, str)) or value in (0, 1)):
        if text in _TRUE + _FALSE:
            return text in _TRUE
    elif hint in (int, float) and not isinstance(value, bool) and value is not None:
        try:
            number = float(text)
            if hint is float and math.isfinite(number):
                return number
            if hint is int and number == int(number):
                return int(text) if text.lstrip("+-").isdigit() else int(number)
        except (ValueError, OverflowError):
            pass
    raise _bad(key, value, describe(hint))


def field_notes(kind: type) -> dict[str, str]:
    """What the `Attributes:` or `Args:` part of a class docstring says about each field, on one line; bases first.

    Fields that share a note stand before one colon, with commas between.
    """
    lines = re.split(r"^(?:Attributes|Args):\n", inspect.cleandoc(kind.__doc__ or ""), maxsplit=1, flags=re.MULTILINE)
    bases = [base for base in kind.__bases__ if dataclasses.is_dataclass(base)]
    notes: dict[str, str] = {name: note for base in bases for name, note in field_notes(base).items()}
    names: list[str] = []
    for line in lines[1].splitlines() if len(lines) > 1 else ():
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            notes |= dict.fromkeys(names, start[2].strip())
        elif names and line.startswith("        "):
            notes |= {name: f"{notes[name]} {line.strip()}" for name in names}
        else:
            break
    return notes


def describe_fields(kind: type, prefix: str = "") -> list[dict[str, Any]]:
    """The fields of a configuration dataclass, those of nested ones as `field.key`.

    Returns:
        A row per field: `key`, `default` as a plain value, `allowed` in words, `note` from the docstring.
    """
    hints, notes, defaults = typing.get_type_hints(kind), field_notes(kind), config_values(kind())
    rows: list[dict[str, Any]] = []
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            rows += describe_fields(hint, f"{key}.")
        else:
            note = notes.get(field.name, "")
            rows.append({"key": key, "default": defaults[field.name], "allowed": describe(hint), "note": note})
    return rows


def config_values(config: Any) -> dict[str, Any]:
    """The configuration as plain types, ready for YAML and JSON."""
    values = plain(config)
    assert isinstance(values, dict)
    return values


def identity_values(config: Any) -> dict[str, Any]:
    """The values that decide what a run computes: without fields of metadata `identity` False (how, not what)."""
    known = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    apart = {field.name for field in known if not field.metadata.get("identity", True)}
    return {name: value for name, value in config_values(config).items() if name not in apart}


def config_yaml(config: Any) -> str:
    """The resolved configuration as YAML text."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config_values(config)))


def config_hash(*values: Any) -> str:
    """A hash (16 hexadecimal digits) of configurations and other plain values; equal values give equal hashes."""
    text = json.dumps([plain(value) for value in values], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
