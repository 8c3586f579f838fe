"""Features of the bundled diffusion pipeline: priors in batches of features, and the step of a deep dream.

    python -m bench.dream
    python -m bench.dream --judged results/dream     # keeps what a finished run of the recipe found as well

Priors: one image of each of 32 features as rows of one batch, against one feature at a time; the latents must agree to
1e-4. Steps: a frozen model that is left at the site and one row of the encoder, against the usual form (parameters that
ask for gradients, a hook that leaves by an exception, all latents encoded to read one); the activations must agree.
Contenders take turns, medians are compared, and a contender that computes something else gets no time. Besides the
time on the clock the processor seconds are given, which do not count what else the machine was busy with.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.memory import peak
from bench.record import append, machine
from pysteer import zoo
from pysteer.dream.deep_dream import Objective, frozen
from pysteer.dream.denoiser import Denoiser
from pysteer.dream.features import Features
from pysteer.dream.prior import EVERY, PriorPlan, PriorRow, draw_priors
from pysteer.families.base import find_family
from pysteer.files import read_json
from pysteer.models.sae import SparseAutoencoder

SITE = "up.1.0"
EXPANSION = 16
STEPS = 20


def autoencoder(width: int) -> SparseAutoencoder:
    """Random, with the usual number of latents per channel; what they are does not matter for the time."""
    torch.manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(EXPANSION * width, width), dim=1)
    zeros = torch.zeros(EXPANSION * width)
    return SparseAutoencoder(decoder.clone(), zeros, decoder, torch.zeros(width), "topk", 32)


def alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds on the clock and of the processor of every call; the order turns round every time."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start, busy = time.perf_counter(), time.process_time()
            calls[name]()
            seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    return seconds


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the time on the clock, and of the processor seconds."""
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def priors(pipe: Any, features: Features, count: int, rounds: int) -> dict[str, Any]:
    """Images per second of `count` features at once and one at a time, and how far their latents are apart."""
    plan = PriorPlan(settings={"num_inference_steps": STEPS})
    rows = [PriorRow(feature, 1024, EVERY, dict.fromkeys(range(STEPS), 8.0)) for feature in range(count)]

    def together() -> Tensor:
        return draw_priors(pipe, features, rows, plan).latents

    def alone() -> Tensor:
        return torch.cat([draw_priors(pipe, features, [row], plan).latents for row in rows])

    first = together()
    apart = float((first - alone()).abs().max())
    spread = float(first.std(0).max())
    if apart > 1e-4 or spread < 1e-2:
        return {"refused": f"latents differ by {apart:.1e}, features by {spread:.1e}"}
    seconds = {name: medians(each) for name, each in alternate({"together": together, "alone": alone}, rounds).items()}
    rates = {f"images_per_second_{name}": count / clock for name, (clock, _) in seconds.items()}
    ratios = [one / many for many, one in zip(seconds["together"], seconds["alone"], strict=True)]
    return {"features": count, "apart": apart, **rates, "ratio": ratios[0], "ratio_processor": ratios[1]}


class Usual:
    """The step as it is usually written: nothing frozen, all latents encoded, the hook leaves by an exception."""

    class Left(Exception):
        """The site has run."""

    def __init__(self, denoiser: Denoiser, features: Features) -> None:
        assert features.sae is not None
        self.denoiser, self.sae = denoiser, features.sae
        self.module = denoiser.module.get_submodule(features.site.path)
        self.encoder = torch.nn.Parameter(self.sae.encoder.clone())
        self.held: list[Tensor] = []

    def hook(self, module: Any, args: Any, output: Any) -> None:
        """Keep the output and leave."""
        self.held[:] = [output[0] if isinstance(output, tuple) else output]
        raise self.Left

    def __call__(self, z: Tensor, times: Tensor, feature: int) -> tuple[Tensor, Tensor]:
        """The gradient in `z` and the activation `[R]`."""
        z = z.detach().requires_grad_(True)
        handle = self.module.register_forward_hook(self.hook)
        with contextlib.suppress(self.Left):
            self.denoiser.module(z, times, **self.denoiser.arguments(len(z)))
        handle.remove()
        tokens = self.held[0].permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        latents = torch.relu((tokens - self.sae.bias) @ self.encoder.T + self.sae.encoder_bias)
        value = latents.mean(1)[:, feature]
        (-value.mean()).backward()
        assert z.grad is not None
        return z.grad, value.detach()

    def gradient_bytes(self) -> int:
        """Bytes of gradients of parameters that nobody uses."""
        parameters = [*self.denoiser.module.parameters(), self.encoder]
        return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def steps(pipe: Any, features: Features, rows: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and peak memory of one gradient, both ways."""
    denoiser = Denoiser(pipe, settings={"num_inference_steps": STEPS})
    usual = Usual(denoiser, features)
    torch.manual_seed(1)
    z, times = torch.randn(rows, *denoiser.shape), torch.full((rows,), 500.0)
    objective = Objective(features, [7] * rows, z.device, leak=0.0)
    with denoiser.reading(features.site) as read:

        def mine() -> tuple[Tensor, Tensor]:
            with frozen(denoiser.module):
                own = z.detach().requires_grad_(True)
                soft, value = objective(read(own, times))
                return torch.autograd.grad(-soft.mean(), own)[0], value

        def theirs() -> tuple[Tensor, Tensor]:
            return usual(z, times, 7)

        (first, one), (second, two) = mine(), theirs()
        apart = max(float((one - two).abs().max()), float((first - second).abs().max()))
        if apart > 1e-4 * float(two.abs().max().clamp_min(1)) or not float(first.abs().max()):
            return {"refused": f"gradients or activations differ by {apart:.1e}"}
        denoiser.module.zero_grad()
        memory = {"peak_frozen": peak(mine)}
        mine()
        own_bytes = sum(p.grad.nbytes for p in denoiser.module.parameters() if p.grad is not None)
        memory["peak_usual"] = peak(theirs)
        seconds = alternate({"frozen": mine, "usual": theirs}, rounds)
    middle = {name: medians(each) for name, each in seconds.items()}
    found = {f"ms_{name}": 1e3 * clock for name, (clock, _) in middle.items()}
    ratios = [slow / fast for fast, slow in zip(middle["frozen"], middle["usual"], strict=True)]
    held = {"gradient_bytes_frozen": own_bytes, "gradient_bytes_usual": usual.gradient_bytes()}
    denoiser.module.zero_grad()
    return {
        "rows": rows,
        "latents": features.count,
        **found,
        **memory,
        **held,
        "ratio": ratios[0],
        "ratio_processor": ratios[1],
    }


def judged(folder: Path) -> dict[str, Any]:
    """What a run of the recipe `dream` found: how often priors and dreams show the label of their feature."""
    found = read_json(folder / "summary.json", "summary of a run")["headline"]["sae"]
    return {name: found[name] for name in ("prior", "dream")}


def table(results: list[dict[str, Any]]) -> str:
    """The newest times and the newest judged images as a table in Markdown."""
    result = next(each for each in reversed(results) if "prior" in each)
    p, s, where = result["prior"], result["step"], result["machine"]
    lines = [
        "| what | pysteer | the usual way | ratio |",
        "|---|---|---|---|",
        f"| priors, images per second | {p['images_per_second_together']:.1f} ({p['features']} features per batch) | "
        f"{p['images_per_second_alone']:.1f} (one at a time) | {p['ratio']:.1f} x |",
        f"| a step of {s['rows']} dreams, {s['latents']:,} latents | {s['ms_frozen']:.0f} ms | "
        f"{s['ms_usual']:.0f} ms | {s['ratio']:.2f} x |",
        f"| its peak memory | {s['peak_frozen'] / 1e6:.0f} MB | {s['peak_usual'] / 1e6:.0f} MB | "
        f"{s['peak_usual'] / s['peak_frozen']:.2f} x |",
        f"| gradients of parameters | {s['gradient_bytes_frozen'] / 1e6:.0f} MB | "
        f"{s['gradient_bytes_usual'] / 1e6:.0f} MB | |",
        "",
        f"{where['processor']}, {where['threads']} threads, torch {result['versions']['torch']}, "
        f"{result['date'][:10]}.",
    ]
    seen = next((each["judged"] for each in reversed(results) if "judged" in each), None)
    if seen:
        shown = " and ".join(
            f"{100 * r['value']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}] of {r['n']} {name}s (by chance "
            f"{100 * r['chance']:.1f} %)"
            for name, r in seen.items()
        )
        lines += ["", f"With `examples/dream/colours.yaml`, {shown} show the label of their latent."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    parser.add_argument("--judged", type=Path, help="keep what this finished run of the recipe found, measure nothing")
    asked = parser.parse_args()
    if asked.judged:
        append("dream", {"judged": judged(asked.judged), **machine()})
        return
    pipe = zoo.load("diffusion-shapes")
    pipe.pipe.set_progress_bar_config(disable=True)
    site = find_family(pipe).sites(pipe)[SITE]
    features = Features(site, site.width, autoencoder(site.width))
    result = {
        "prior": priors(pipe, features, asked.features, max(1, asked.rounds // 3)),
        "step": steps(pipe, features, asked.rows, asked.rounds),
        **machine(),
    }
    for name in ("prior", "step"):
        row = result[name]
        print(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if not asked.dry_run:
        append("dream", result)


if __name__ == "__main__":
    main()
