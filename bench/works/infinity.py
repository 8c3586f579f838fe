"""Work with the bundled Infinity generator: a mean shift at the FFN of every layer and scale, on all rows.

Kinds of contenders are `HOW MODE`, such as `pysteer compiled`. Works are `images, batch N`. What is compared are the
logits for given bits: sampled bits could flip by rounding alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines import hooks
from bench.serving import Prepared


def vectors(steps: int, layers: int, width: int) -> Tensor:
    """Shifts `[steps, layers, D]`."""
    return 0.3 * torch.randn(steps, layers, width, generator=torch.Generator().manual_seed(0))


def forced_bits(config: Any, batch: int) -> list[Tensor]:
    """Random bits of every scale, the same for all contenders."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 2, (batch, h * w, config.bits), generator=generator) for h, w in config.scales]


def _plan(shifts: Tensor) -> Any:
    from pysteer.steering import Plan, SiteParameters

    steps = tuple(range(len(shifts)))
    entries = [
        SiteParameters(f"ffn.{i}", "affine_shift", steps, {"gain": torch.ones_like(own), "bias": own})
        for i, own in enumerate(shifts.unbind(1))
    ]
    return Plan.build(entries, rows="both")


def _reference(shift: Tensor, clock: Tensor) -> hooks.Hook:
    """Our own reference in a hook: slots are steps, as a table has them."""
    from pysteer.ops.affine_shift import affine_shift_reference

    steps = len(shift)
    banks = (torch.ones(steps + 1, shift.shape[1]), torch.cat([torch.zeros_like(shift[:1]), shift]))
    slots, strengths = torch.arange(1, steps + 1, dtype=torch.int32)[:, None], torch.ones(steps, 1)

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        rows = output.shape[0]
        return affine_shift_reference(output, *banks, slots.expand(-1, rows), strengths.expand(-1, rows), clock)

    return hook


def _steer(pipe: Any, how: str, shifts: Tensor, state: dict[str, int]) -> None:
    """Steer in one of the ways of others; `state` holds the scale as a Python number."""
    lever: hooks.Lever = [1.0]
    steps, layers, _ = shifts.shape
    schedule = {str(step): list(range(layers)) for step in range(steps)}
    by_place = {(step, layer): shifts[step, layer] for step in range(steps) for layer in range(layers)}
    for i, block in enumerate(pipe.transformer.blocks):
        if how == "wrapper":
            block.ffn = hooks.InfinityWrapper(block.ffn, i, state, schedule, by_place, lever)
        elif how == "reference":
            block.ffn.register_forward_hook(_reference(shifts[:, i], pipe.transformer.clock))
        else:
            own = shifts[:, i]

            def hook(module: Any, args: Any, output: Tensor, own: Tensor = own) -> Tensor:
                return output + lever[0] * own[state["step"]]

            block.ffn.register_forward_hook(hook)


def prepare(kind: str, folder: Path, work_name: str) -> Prepared:
    """A contender of this part with a work."""
    import pysteer
    from pysteer.zoo.shapes.captions import captions_of, sample_scenes

    batch = int(work_name.rpartition("-")[2])
    how, _, mode = kind.partition(" ")
    pipe = pysteer.zoo.load("infinity-shapes")
    config, state = pipe.transformer.config, {"step": 0}
    shifts = vectors(len(config.scales), config.depth, config.dim)
    if how == "pysteer":
        pysteer.steer(pipe, _plan(shifts)).__enter__()
    elif how != "unsteered":
        _steer(pipe, how, shifts, state)
    if mode == "compiled":
        pipe.compile(fullgraph=how != "wrapper")
    text = pipe.encode_text(captions_of(sample_scenes(batch, seed=1)))

    def generate(forced: list[Tensor] | None = None) -> Tensor:
        seen: list[Tensor] = []

        def on_scale(scale: int, logits: Tensor) -> None:
            state["step"] = scale + 1
            if forced is not None:
                seen.append(logits.clone())

        state["step"] = 0
        out = pipe(text, seeds=0, decode=False, on_scale=on_scale, forced_bits=forced)
        return torch.cat(seen, dim=1) if forced is not None else out.features

    return Prepared(generate, lambda: generate(forced_bits(config, batch)), batch)
