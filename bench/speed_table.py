"""Tables of stored speed results, and where pysteer is not the fastest."""

from __future__ import annotations

from typing import Any

from bench.record import stored

Row = dict[str, Any]


def machine_of(result: dict[str, Any]) -> str:
    """The GPU, else the processor."""
    machine = result["machine"]
    return str(machine["gpu"] or machine["processor"])


def where_of(result: dict[str, Any]) -> str:
    """Machine, versions, commit, date, in words."""
    how = "Quick run: small sizes and few rounds on a busy machine, " if result.get("quick") else ""
    versions = f"torch {result['versions']['torch']}"
    return f"{how}{machine_of(result)}, {versions}, {result['date'][:10]}, commit {result['commit']}"


def newest_parts(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest result of every part; a full one comes before a quick one."""
    found: dict[str, dict[str, Any]] = {}
    for result in sorted(results, key=lambda one: not one.get("quick", False)):
        for part in result["parts"]:
            found[part] = result
    return found


def ratio_of(row: Row) -> str:
    """`1.02 [1.00, 1.05]`."""
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def line(row: Row) -> str:
    """One line of the table; who was refused has no time."""
    name = f"**{row['contender']}**" if row.get("ours") else row["contender"]
    if row.get("not_measured"):
        return f"| {row['work']} | {name} | not measured ({row['not_measured']}) | | | | |"
    if row.get("refused") or "ratio" not in row:
        return f"| {row['work']} | {name} | no time: {row.get('refused') or 'never ran'} | | | | |"
    peak = f"{row['peak_bytes'] / (1 << 20):.0f}" if row.get("peak_bytes") else "-"
    counts = [row.get(key) for key in ("graph_breaks", "recompiles")] if "eager" not in name else ["-", "-"]
    calls, syncs = ("-" if row.get(key) is None else row[key] for key in ("calls", "syncs"))
    return (
        f"| {row['work']} | {name} | {ratio_of(row)} | {row['per_second']:.3g} | "
        f"{counts[0]} / {counts[1]} | {calls} / {syncs} | {peak} |"
    )


HEAD = "| work | contender | time / base | tokens or images/s | breaks / recompiles | calls / syncs | peak, MiB |"
UNSTEERED = ("unsteered", "the activation itself")  # how the names of contenders begin that change nothing


def base_of(rows: list[Row]) -> str:
    """The contender that the times of the others are divided by."""
    return next((row["contender"] for row in rows if row.get("ratio_quartiles") == [1.0, 1.0]), "nobody")


def not_fastest(rows: list[Row]) -> list[str]:
    """For every work where something that steers was faster than pysteer beyond the quartiles: which, by how much."""
    found = []
    for work in dict.fromkeys(row["work"] for row in rows):
        timed = [row for row in rows if row["work"] == work and "ratio" in row]
        ours = min((row for row in timed if row.get("ours")), key=lambda row: row["ratio"], default=None)
        if ours is None:
            found.append(f"{work}: pysteer has no time")
            continue
        for row in timed:
            rival = not row.get("ours") and not row["contender"].startswith(UNSTEERED)
            if rival and row["ratio"] < ours["ratio"]:
                sure = row["ratio_quartiles"][1] < ours["ratio_quartiles"][0]
                how = "" if sure else ", within the spread"
                found.append(f"{work}: {row['contender']} {row['ratio']:.3f} against {ours['ratio']:.3f}{how}")
    return found


def speed_table(results: list[dict[str, Any]]) -> str:
    """The Markdown tables of the newest result of every part."""
    blocks = []
    for part, result in newest_parts(results).items():
        rows = [row for row in result["rows"] if row["part"] == part]
        lines = [f"### {part}", "", HEAD, "|---" * 7 + "|", *(line(row) for row in rows)]
        slower = not_fastest(rows)
        lines += ["", "Pysteer is not the fastest here: " + "; ".join(slower) + "." if slower else
                  "Nothing that steers was faster than pysteer here."]  # fmt: skip
        blocks.append("\n".join([*lines, "", f"Base: {base_of(rows)}. {where_of(result)}."]))
    gpu = [line(row) for result in results[-1:] for row in result.get("gpu", [])]
    if gpu:
        head = "| work | contender | | | | | |"
        blocks.append("\n".join(["### On a GPU", "", head, "|---" * 7 + "|", *gpu]))
    return "\n\n".join(blocks)


def main() -> None:
    """Print the tables."""
    results = stored("speed")
    print(speed_table(results) if results else "nothing is stored yet: run pysteer bench speed")


if __name__ == "__main__":
    main()
