"""The query of an address, with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pysteer.app.store import RunInfo
from pysteer.errors import InputError, did_you_mean

ROWS_PER_PAGE = 60


class Query(dict[str, str]):
    """The query of an address, with checks."""

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        return self.get(name, "") or default

    def choice(self, name: str, allowed: list[str], default: str = "") -> str:
        """One of a list of words; the default, or the first, where none is given."""
        given = self.get(name, "")
        if not given:
            return default if default in allowed else (allowed[0] if allowed else "")
        if given not in allowed:
            shown = ", ".join(allowed[:30]) or "none"
            raise InputError(name, value=given, allowed=shown, fix=did_you_mean(given, allowed))
        return given

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in a range."""
        given = self.get(name, "")
        if not given:
            return default
        try:
            number = int(given[:20])
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise InputError(name, value=given, allowed=f"{low} to {high}")
        return number

    @property
    def filters(self) -> dict[str, str]:
        """`f.column=value` as column -> value."""
        return {name[2:]: value for name, value in self.items() if name.startswith("f.") and value}

    @property
    def state(self) -> dict[str, str]:
        """What links of the page keep."""
        return {name: value for name, value in self.items() if value and name not in ("runs", "pick")}


def named(found: list[RunInfo], query: Query) -> str:
    """The run of a page: the one of the query, or the first that fits."""
    return query.text("run") or (found[0].id if found else "")


def flat_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `key.key -> text`."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat_config(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found
