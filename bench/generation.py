"""Cost of steering a whole generation: the compiled generator with and without a plan, in one interleaved run.

    python -m bench.generation --rounds 15

Every contender is its own copy of the bundled generator, compiled with `pipe.compile()`. A contender whose output does
not differ from the unsteered one, or whose strength 0 is not bit-identical to it, gets no time.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pysteer
from bench.record import append, machine
from pysteer.models.infinity.pipeline import InfinityPipeline
from pysteer.steering import Plan, SiteParameters
from pysteer.zoo.shapes.captions import captions_of, sample_scenes

PROTOTYPES = 64
UNSTEERED_AGAIN = "unsteered, a second copy (what the noise does to a ratio)"


def mean_shift(site: str, steps: tuple[int, ...], width: int, generator: torch.Generator) -> SiteParameters:
    """A shift of about a tenth of a standard deviation."""
    bias = 0.1 * torch.randn(len(steps), width, generator=generator)
    return SiteParameters(site, "affine_shift", steps, {"gain": torch.ones(len(steps), width), "bias": bias})


def prototypes(site: str, steps: tuple[int, ...], width: int, generator: torch.Generator) -> SiteParameters:
    """Random prototypes with small shifts; what they are does not matter for the time."""
    shape = (len(steps), PROTOTYPES, width)
    banks = {
        "weight": torch.randn(shape, generator=generator),
        "offset": torch.randn(shape[:2], generator=generator),
        "delta": 0.1 * torch.randn(shape, generator=generator),
    }
    return SiteParameters(site, "prototype_shift", steps, banks)


def plans(pipe: InfinityPipeline) -> dict[str, Plan | None]:
    """The contenders."""
    generator = torch.Generator().manual_seed(0)
    config = pipe.transformer.config
    every, last = tuple(range(len(config.scales))), tuple(range(len(config.scales)))[-2:]
    layers = range(config.depth)

    def build(make: Callable[..., SiteParameters], places: list[str], steps: tuple[int, ...]) -> Plan:
        return Plan.build([make(f"{p}.{i}", steps, config.dim, generator) for i in layers for p in places])

    return {
        "unsteered": None,
        UNSTEERED_AGAIN: None,
        "mean shift, ffn and ca, all layers and scales": build(mean_shift, ["ffn", "ca"], every),
        f"{PROTOTYPES} prototypes, ca, all layers and scales": build(prototypes, ["ca"], every),
        f"{PROTOTYPES} prototypes, ca_block, last two scales": build(prototypes, ["ca_block"], last),
    }


class Contender:
    """One compiled generator, steered or not."""

    def __init__(self, name: str, plan: Plan | None, text: Any, stack: contextlib.ExitStack) -> None:
        self.name, self.text = name, text
        self.pipe = pysteer.zoo.load("infinity-shapes")
        self.handle = None
        if plan is not None:
            self.handle = stack.enter_context(pysteer.steer(self.pipe, plan))
        self.pipe.compile()
        self.seconds: list[float] = []

    def features(self) -> Tensor:
        """One generation without decoding: the decoder is not what is compared."""
        return self.pipe(self.text, seeds=0, decode=False).features

    def check(self, unsteered: Tensor) -> str:
        """An empty string, or why this contender may not be timed."""
        if self.handle is None:
            return ""
        if torch.equal(self.features(), unsteered):
            return "the output did not change"
        self.handle.strength = 0.0
        same = torch.equal(self.features(), unsteered)
        self.handle.strength = 1.0
        self.features()
        return "" if same else "strength 0 is not bit-identical"

    def time(self) -> None:
        """One timed generation."""
        start = time.perf_counter()
        self.features()
        self.seconds.append(time.perf_counter() - start)


def run(batch: int, rounds: int) -> dict[str, Any]:
    """Time all contenders in turn, round after round; ratios are medians over rounds."""
    with contextlib.ExitStack() as stack:
        pipe = pysteer.zoo.load("infinity-shapes")
        text = pipe.encode_text(captions_of(sample_scenes(batch, seed=1)))
        contenders = [Contender(name, plan, text, stack) for name, plan in plans(pipe).items()]
        unsteered = contenders[0].features()
        faults = {c.name: c.check(unsteered) for c in contenders}
        valid = [c for c in contenders if not faults[c.name]]
        for number in range(rounds + 2):
            for contender in valid if number % 2 else valid[::-1]:
                contender.time()
    base = valid[0].seconds[2:]
    rows = []
    for contender in contenders:
        seconds = contender.seconds[2:]
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=False)]
        rows.append(
            {
                "contender": contender.name,
                "refused": faults[contender.name],
                "ms_per_image": 1e3 * statistics.median(seconds) / batch if seconds else None,
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None,
            }
        )
    return {"batch": batch, "rounds": rounds, "rows": rows, **machine()}


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    arguments = parser.parse_args()
    result = run(arguments.batch, arguments.rounds)
    for row in result["rows"]:
        if row["refused"]:
            print(f"{row['contender']}: not timed, {row['refused']}")
            continue
        low, high = row["ratio_quartiles"]
        print(f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]  {row['ms_per_image']:.2f} ms/image  {row['contender']}")
    if not arguments.dry_run:
        append("generation", result)


if __name__ == "__main__":
    main()
