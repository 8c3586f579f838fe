"""The axes of a sweep: which values a field of the setting takes, read from `key=value` words.

    strength=0,0.5,1             these values
    seed=range(8)                0 to 7; range(first, end, step) as in Python
    strength=linspace(0,2,5)     evenly spaced, both ends included; logspace(0.01,1,3) by equal factors
    prompt=["a, b", c]           a YAML list, for values with commas
    strength=uniform(0,2)        a range that points are drawn from; so loguniform(a,b), integers(a,b) and choice(x,y)

A field with one value is no axis. Axes with values are combined with each other; those that are drawn from are drawn
together, and every point is combined with the rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pysteer.errors import InputError
from pysteer.recipes.config import Word, convert
from pysteer.steering.site import did_you_mean

_CALL = re.compile(r"(\w+)\((.*)\)\s*$", re.DOTALL)
_MOST = 100_000_000  # values of one axis; more is a slip of the keyboard


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: field of the setting.
        values: the values it takes, empty for a range.
        low, high: ends of a range that is drawn from; both may come up.
        log: whether equal factors are equally likely.
        whole: whether whole numbers are drawn.
        drawn: whether points are drawn along it; with `values`, one of them is.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    drawn: bool = False

    def at(self, u: float) -> Any:
        """The value at the quantile `u` in [0, 1)."""
        if self.values:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        if self.whole:
            return int(self.low) + min(int(u * (self.high - self.low + 1)), int(self.high - self.low))
        if self.log:
            return math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return self.low + u * (self.high - self.low)


def parse_axes(words: Sequence[str], setting: type) -> tuple[dict[str, Any], list[Axis]]:
    """Fields with one value, and axes, of `key=value` words.

    Raises:
        InputError: a word without `=`, an unknown or repeated key, no value, or one that does not fit its field.
    """
    hints, names = typing.get_type_hints(setting), [field.name for field in dataclasses.fields(setting)]
    fixed: dict[str, Any] = {}
    axes: list[Axis] = []
    seen: set[str] = set()
    for word in words:
        key, equals, value = word.partition("=")
        name = key.strip().lstrip("-").lower()
        if not equals or not name:
            raise InputError("axis of a sweep", value=word, allowed="key=value", fix="write for example strength=0,1,2")
        if name not in names:
            raise InputError("unknown key", value=name, allowed=", ".join(names), fix=did_you_mean(name, names))
        if name in seen:
            raise InputError("axis given twice", value=name, fix=f"put all values into one {name}=...")
        seen.add(name)
        axis = parse_axis(name, value, hints[name])
        if axis.drawn or len(axis.values) > 1:
            axes.append(axis)
        else:
            fixed[name] = axis.values[0]
    return fixed, axes


def parse_axis(name: str, text: str, hint: Any) -> Axis:
    """The axis that `text` describes for a field of type `hint`."""
    call = _CALL.match(text.strip())
    if call is not None and call[1] in _FUNCTIONS:
        return _FUNCTIONS[call[1]](name, [part.strip() for part in _split(call[2])], hint)
    if text.strip().startswith("["):
        parsed = Word(text).parsed()
        items: Sequence[Any] = parsed if isinstance(parsed, list) else [text]
    elif typing.get_origin(hint) is dict or hint is dict:
        items = [Word(text)]
    else:
        items = [Word(part.strip()) for part in _split(text)]
    return _listed(name, items, hint)


def _split(text: str) -> list[str]:
    """Parts between commas that are not inside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if text.strip() else []


def _listed(name: str, items: Sequence[Any], hint: Any, drawn: bool = False) -> Axis:
    if not items:
        raise InputError(f"axis {name}", value="no values", allowed="at least one", fix=f"write {name}=VALUE,VALUE")
    values = tuple(convert(item, hint, name) for item in items)
    shown = [repr(value) for value in values]
    if len(set(shown)) != len(shown):
        twice = next(value for i, value in enumerate(shown) if value in shown[:i])
        raise InputError(f"axis {name}", value=f"{twice} twice", allowed="each value once", fix="drop the second one")
    return Axis(name, values, drawn=drawn)


def _numbers(name: str, arguments: Sequence[str], least: int, most: int, form: str) -> list[float]:
    try:
        numbers = [float(argument) for argument in arguments]
    except ValueError:
        numbers = []
    if not least <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise InputError(f"axis {name}", value=", ".join(arguments), allowed=form)
    return numbers


def _range(name: str, arguments: Sequence[str], hint: Any) -> Axis:
    form = "range(end), range(first, end) or range(first, end, step) of whole numbers"
    numbers = _numbers(name, arguments, 1, 3, form)
    if any(number != int(number) for number in numbers) or (len(numbers) == 3 and numbers[2] == 0):
        raise InputError(f"axis {name}", value=", ".join(arguments), allowed=form)
    values = range(*(int(number) for number in numbers))
    if len(values) > _MOST:
        raise InputError(f"axis {name}", value=f"{len(values)} values", allowed=f"at most {_MOST}")
    return _listed(name, list(values), hint)


def _spaced(name: str, arguments: Sequence[str], hint: Any, log: bool) -> Axis:
    form = f"{'logspace' if log else 'linspace'}(first, last, count)"
    first, last, count = _numbers(name, arguments, 3, 3, form)
    if count != int(count) or not 1 <= count <= _MOST or (log and (first <= 0 or last <= 0)):
        raise InputError(f"axis {name}", value=", ".join(arguments), allowed=form)
    steps = max(int(count) - 1, 1)
    if log:
        values = [first * (last / first) ** (i / steps) for i in range(int(count))]
    else:
        values = [first + (last - first) * i / steps for i in range(int(count))]
    return _listed(name, [float(f"{value:.12g}") for value in values], hint)


def _drawn(name: str, arguments: Sequence[str], hint: Any, log: bool = False, whole: bool = False) -> Axis:
    form = "two numbers, the lower one first" + (", above 0" if log else "")
    low, high = _numbers(name, arguments, 2, 2, form)
    if low >= high or (log and low <= 0) or (whole and (low != int(low) or high != int(high))):
        raise InputError(f"axis {name}", value=f"{low:g}, {high:g}", allowed=form)
    for end in (low, high):
        convert(int(end) if whole else end, hint, name)
    return Axis(name, (), low, high, log, whole, drawn=True)


_FUNCTIONS: Mapping[str, Callable[[str, Sequence[str], Any], Axis]] = {
    "range": _range,
    "linspace": lambda name, arguments, hint: _spaced(name, arguments, hint, log=False),
    "logspace": lambda name, arguments, hint: _spaced(name, arguments, hint, log=True),
    "uniform": _drawn,
    "loguniform": lambda name, arguments, hint: _drawn(name, arguments, hint, log=True),
    "integers": lambda name, arguments, hint: _drawn(name, arguments, hint, whole=True),
    "choice": lambda name, arguments, hint: _listed(name, [Word(a) for a in arguments], hint, drawn=True),
}
