"""Errors that are meant for the person who gave the input."""

import difflib
from collections.abc import Iterable
from typing import Any

_MISSING: Any = object()
_LONGEST_VALUE = 160


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    if len(text) > _LONGEST_VALUE:
        text = text[: _LONGEST_VALUE - 3] + "..."
    return repr(text) if isinstance(value, str) else text


class PysteerError(Exception):
    """Base class of the errors raised by pysteer."""


class InputError(PysteerError, ValueError):
    """Something given by the user cannot be used; the message is one line.

    The line reads `what: got <value>; allowed: <allowed>; fix: <fix>`, leaving out the parts that were not given.

    Args:
        what: what is wrong, in a few words.
        value: the value that was given; shortened when long.
        allowed: what would have been accepted.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, value: Any = _MISSING, allowed: str = "", fix: str = "") -> None:
        self.what = what
        self.value = None if value is _MISSING else value
        self.allowed = allowed
        self.fix = fix
        parts = [] if value is _MISSING else [f"got {_show(value)}"]
        parts += [f"allowed: {allowed}"] if allowed else []
        parts += [f"fix: {fix}"] if fix else []
        line = f"{what}: {'; '.join(parts)}" if parts else what
        super().__init__(" ".join(line.split()))


def did_you_mean(given: object, allowed: Iterable[object]) -> str:
    """The advice "did you mean X?" for the closest allowed name, or "" when none is close."""
    close = difflib.get_close_matches(str(given), [str(name) for name in allowed], n=1)
    return f"did you mean {close[0]}?" if close else ""
