"""Many settings in one batch against one setting of the same batch size.

    python -m bench.rows --rounds 9

On layers of SmolLM2 (decode, a mean shift at every block) and on the bundled Infinity generator (a mean shift at every
FFN): R rows with R different vectors, against R rows with the same one. Both are one compiled model each; a contender
whose rows are not those of separate runs gets no time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pysteer
from bench.contest import PATIENCE, counted, numbers_of_rounds, quartiles, verdict
from bench.record import append, machine
from bench.serving import seconds_of
from bench.works import decoding
from bench.works.language import keep_layers
from pysteer.steering import Plan, SiteParameters

BATCHES = (1, 4, 16, 64, 256)
INFINITY_BATCHES = (16,)  # compiling every scale takes a minute and more
LAYERS = 2  # of 30: all are alike, and compiling all of them would tell nothing more
Call = Callable[[], Tensor]


def shift_plans(sites: Sequence[tuple[str, int]], count: int, seed: int, rows: str = "cond") -> list[Plan]:
    """`count` plans with a vector of their own at every site (name, width)."""
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for _ in range(count):
        entries = []
        for name, width in sites:
            bias = 0.3 * torch.randn(1, width, generator=generator)
            entries.append(SiteParameters(name, "affine_shift", None, {"gain": torch.ones(1, width), "bias": bias}))
        plans.append(Plan.build(entries, rows=rows))
    return plans


def language_pair(batch: int, layers: int, compiled: bool = True) -> dict[str, tuple[Call, Call]]:
    """`one` and `many` settings, and `none` to compare with, which is eager: set-up and decode of the same prompt.

    Args:
        batch: rows.
        layers: how many are taken, without the head.
        compiled: whether the model is compiled.
    """
    from pysteer.models.language import smollm2

    whole, made = smollm2().model, {}
    keep_layers(whole, layers)
    for name in ("none", "one", "many"):
        model = copy.deepcopy(whole)
        width = model.config.hidden_size
        sites = [(f"block.{i}", width) for i in range(len(model.model.layers))]
        if name != "none":
            plans = shift_plans(sites, batch if name == "many" else 1, seed=0)
            pysteer.steer(model, plans if name == "many" else plans[0], capacity=batch).__enter__()
        body = model.model
        call = torch.compile(body, dynamic=False) if compiled and name != "none" else None
        decoder = decoding.Decoder(body, decoding.Work(1, 8, 4 if batch < 64 else 2), call, rows=batch)
        made[name] = (decoder.setup, decoder.run)
    return made


def infinity_pair(batch: int) -> dict[str, tuple[Call, Call]]:
    """The same with the bundled generator; what is compared are the logits of the last scale."""
    from bench.works.infinity import forced_bits

    made = {}
    for name in ("none", "one", "many"):
        pipe = pysteer.zoo.load("infinity-shapes")
        config = pipe.transformer.config
        if name != "none":
            sites = [(f"ffn.{i}", config.dim) for i in range(config.depth)]
            plans = shift_plans(sites, batch if name == "many" else 1, seed=0)
            pysteer.steer(pipe, plans if name == "many" else plans[0]).__enter__()
            pipe.compile()
        text, bits = pipe.encode_text(["a large red circle"] * batch), forced_bits(config, batch)
        bits = [each[:1].expand(batch, -1, -1) for each in bits]

        def run(pipe: Any = pipe, text: Any = text, bits: list[Tensor] = bits) -> Tensor:
            last: list[Tensor] = []
            pipe(text, seeds=0, decode=False, forced_bits=bits, on_scale=lambda i, logits: last.append(logits))
            return last[-1].flatten(1)

        made[name] = (lambda: torch.empty(0), run)
    return made


def check_rows(outputs: dict[str, Tensor]) -> str:
    """Why the rows may not be timed, or nothing: row 0 has the vector of the single setting, the others have not."""
    one, many, none = outputs["one"], outputs["many"], outputs["none"]
    wrong = verdict(many[:1], none[:1], one[:1])
    if wrong:
        return f"row 0 of many settings: {wrong}"
    if len(many) > 1:
        change = (one[1:] - none[1:]).abs().amax(1)
        if bool(((many[1:] - one[1:]).abs().amax(1) < 0.01 * change).any()):
            return "a row with a vector of its own came out like the others"
    return ""


def measure(
    label: str, batch: int, calls: dict[str, tuple[Call, Call]], rounds: int, patience: float = PATIENCE
) -> dict[str, Any]:
    """One row: how much longer many settings take than one, within a round; see `numbers_of_rounds`."""
    outputs = {}
    for name, (setup, run) in calls.items():
        setup()
        outputs[name] = run().float()
    row: dict[str, Any] = {"model": label, "settings": batch, "refused": check_rows(outputs)}
    if row["refused"]:
        return row
    seconds: dict[str, list[float]] = {"one": [], "many": []}
    for number in numbers_of_rounds(rounds, patience):
        for name in list(seconds)[:: 1 if number % 2 else -1]:
            setup, run = calls[name]
            setup()
            seconds[name].append(seconds_of(run))
    many, one = (counted(seconds[name], rounds) for name in ("many", "one"))
    ratios = [mine / base for mine, base in zip(many, one, strict=True)]
    return row | {
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "seconds": statistics.median(many),
        "rounds": len(ratios),
    }


@torch.no_grad()
def run_rows(*, quick: bool, rounds: int, patience: float = PATIENCE, store: bool = True) -> dict[str, Any]:
    """Measure all sizes and store them."""
    torch.set_num_threads(1)
    rows = []
    for batch in (4, 16) if quick else BATCHES:
        torch.compiler.reset()
        layers = 1 if quick else LAYERS
        pair = language_pair(batch, layers)
        rows.append(measure(f"{layers} layers of SmolLM2, decode", batch, pair, rounds, patience))
        print(rows[-1], flush=True)
    for batch in INFINITY_BATCHES:
        torch.compiler.reset()
        rows.append(measure("infinity-shapes", batch, infinity_pair(batch), rounds, patience))
        print(rows[-1], flush=True)
    result = {"quick": quick, "patience": patience, "rows": rows, **machine()}
    if store:
        append("rows", result)
    return result


def table(result: dict[str, Any]) -> str:
    """The Markdown table of a stored result."""
    from bench.speed_table import ratio_of, where_of

    lines = ["| model | settings in one batch | time / one setting |", "|---" * 3 + "|"]
    for row in result["rows"]:
        figure = ratio_of(row) if "ratio" in row else f"no time: {row['refused']}"
        lines.append(f"| {row['model']} | {row['settings']} | {figure} |")
    return "\n".join([*lines, "", where_of(result) + "."])


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds after which no further round begins")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    result = run_rows(quick=asked.quick, rounds=asked.rounds, patience=asked.patience, store=not asked.dry_run)
    print(table(result))


if __name__ == "__main__":
    main()
