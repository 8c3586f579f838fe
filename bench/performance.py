"""The performance page of the documentation: every stored result with what was measured and the command for it.

python -m bench.performance        prints the page
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import docs
from bench.record import RESULTS, stored


@dataclass(frozen=True)
class Measured:
    """What stands in one file of `bench/results`.

    Attributes:
        title: heading of its part of the page.
        command: what measures it again, from a checkout.
        page: page of docs/ that says more, "" where none does.
        table: makes the tables; None lists the rows of the newest result as they are.
    """

    title: str
    command: str
    page: str = ""
    table: Callable[[], str] | None = None


def _last(module: str, name: str, function: str = "table") -> Callable[[], str]:
    """The newest result of a name through the function of a module."""
    return lambda: getattr(importlib.import_module(f"bench.{module}"), function)(stored(name)[-1])


def _own(module: str, function: str) -> Callable[[], str]:
    """A function that reads what is stored by itself."""
    return lambda: getattr(importlib.import_module(f"bench.{module}"), function)()


def _ops() -> str:
    from bench.table import table

    return table(*stored("ops"))


def _unlearn() -> str:
    from bench.unlearn_table import text

    return text(stored("unlearn"))


def _experiment() -> str:
    from bench.weightspace_table import accuracy_table, bridge_table, edit_table

    run = stored("weightspace_experiment")[-1]
    return "\n\n".join("\n".join(part) for make in (accuracy_table, edit_table, bridge_table) if (part := make(run)))


def _size() -> str:
    from bench.sweep_size import table

    return table(stored("sweep_size")[-1]["sweep_size"])


MEASURED = {
    "speed": Measured("Steering beside others", "pysteer bench speed", "benchmarks.md", docs.TABLES["speed"]),
    "rows": Measured("Many settings in one batch", "python -m bench.rows", "benchmarks.md", docs.TABLES["rows"]),
    "language": Measured("A language model", "python -m bench.language", "benchmarks.md", docs.TABLES["language"]),
    "generation": Measured("A whole generation of images", "python -m bench.generation"),
    "ops": Measured("Ops", "python -m bench.run", "ops.md", _ops),
    "memory": Measured("Peak memory of ops", "python -m bench.memory", "ops.md"),
    "sweep": Measured("A sweep", "python -m bench.sweep --store", "sweeps.md", docs.TABLES["sweep"]),
    "sweep_size": Measured("A million cells", "python -m bench.sweep_size --store", "sweeps.md", _size),
    "inspector": Measured("The inspector", "python -m bench.inspector", "inspector.md", docs.TABLES["inspector"]),
    "headline": Measured("From one class to another", "pysteer run infinity-prototype", "recipes/infinity-prototype.md",
                         _last("headline", "headline")),
    "effect": Measured("What methods achieve", "pysteer bench effect", "benchmarks.md", docs.TABLES["effect"]),
    "methods": Measured("Methods compared", "pysteer run methods", "recipes/methods.md", docs.TABLES["methods"]),
    "transport": Measured("Transporting activations", "python -m bench.transport sweep", "act.md",
                          _own("transport", "table")),
    "dream": Measured("Priors and dreams", "python -m bench.dream", "dream.md", docs.TABLES["dream"]),
    "unlearn": Measured("Unlearning", "pysteer run unlearn", "dream.md", _unlearn),
    "dynamics": Measured("Watching a training", "python -m bench.dynamics", "dynamics.md",
                         _last("dynamics", "dynamics")),
    "vae-dynamics": Measured("Reviving channels", "pysteer run vae-dynamics", "dynamics.md",
                             _own("dynamics", "runs_table")),
    "weightspace": Measured("Collections of adapters", "python -m bench.weightspace", "weightspace.md",
                            _last("weightspace", "weightspace")),
    "weightspace_experiment": Measured("What adapters know", "pysteer run weightspace", "weightspace.md", _experiment),
}  # fmt: skip


def page() -> str:
    """The page as Markdown: a part for every file of results, those that have no entry above as plain rows."""
    parts = [
        "# Performance",
        "Every figure here is read from a stored measurement in `bench/results` of the repository; the command beside "
        "it measures it again in a checkout. `pysteer env` says which kernels serve on your machine.",
    ]
    names = [path.stem for path in RESULTS.glob("*.json")]
    for name in sorted(names, key=lambda name: (list(MEASURED).index(name) if name in MEASURED else 99, name)):
        entry = MEASURED.get(name, Measured(name.replace("_", " ").capitalize(), ""))
        newest = max(stored(name), key=lambda result: str(result.get("date", "")))
        again = f"`{entry.command}`; " if entry.command else ""
        more = f"; more in [{entry.page.removesuffix('.md')}]({entry.page})" if entry.page else ""
        made = entry.table() if entry.table is not None else "\n\n".join(plain_tables(newest))
        parts += [f"## {entry.title}", f"{again}`bench/results/{name}.json`{more}.", made]
        if _date(newest) not in made:
            parts.append(where(newest))
    return "\n\n".join(part for part in parts if part) + "\n"


def _date(result: dict[str, Any]) -> str:
    return str(result.get("date", ""))[:10]


def where(result: dict[str, Any]) -> str:
    """Machine, versions and day of a result."""
    machine = result.get("machine", {})
    threads = machine.get("threads", "?")
    name = machine.get("gpu") or f"{machine.get('processor', 'unknown')}, {threads} thread{'s' * (threads != 1)}"
    versions = ", ".join(f"{key} {value}" for key, value in result.get("versions", {}).items() if value)
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    return f"{name}; {versions}; {_date(result)}{commit}."


def plain_tables(result: dict[str, Any]) -> list[str]:
    """A table for every list of flat rows in a result."""
    found = []
    for rows in result.values():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            continue
        columns = [c for c in rows[0] if not isinstance(rows[0][c], dict | list) or "value" in rows[0][c]]
        lines = [_line(name.replace("_", " ") for name in columns), "|" + "---|" * len(columns)]
        found.append("\n".join([*lines, *(_line(_number(row.get(c)) for c in columns) for row in rows)]))
    return found


def _line(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _number(value: Any) -> str:
    if isinstance(value, dict):
        low, high = value.get("low"), value.get("high")
        interval = f" [{_number(low)}, {_number(high)}]" if low is not None and high is not None else ""
        return f"{_number(value.get('value'))}{interval}"
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    print(page(), end="")
