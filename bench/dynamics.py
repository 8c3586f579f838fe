"""What it costs to watch the channels and the weights of a small autoencoder while it trains.

    python -m bench.dynamics                             # measures and stores
    python -m bench.dynamics table                       # prints the newest stored result
    python -m bench.dynamics store results/fashion       # keeps the figures of a run of `vae-dynamics`
    python -m bench.dynamics runs                        # prints those that are kept
    python -m bench.dynamics docs                        # writes both into docs/dynamics.md

The model is an AutoencoderKL with 32, 64 and 64 channels (0.95 M parameters) on batches of 4 pictures of 32 x 32. The
contenders take turns step by step, so that a busy machine slows all of them alike. A step is forward, backward and
AdamW; what is counted is the processor time of the process and the wall time, and the middle of all rounds is compared.

"usual way" is the way of published trackers, written from their formulas: a hook per layer that takes mean |x| per
channel, mean and standard deviation of the whole tensor to NumPy in every forward pass; and for weights |w| < t per
parameter, with a message made of every parameter that is never shown.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.record import RESULTS, append, machine, stored
from pysteer.dynamics import Monitor, WeightHealth
from pysteer.dynamics.points import is_kind
from pysteer.errors import InputError
from pysteer.files import read_json, write_text

EVERY = 20
DOCS = RESULTS.parent.parent / "docs/dynamics.md"
_LOGGER = logging.getLogger("bench.dynamics")


def small_vae() -> nn.Module:
    """The autoencoder of the measurement, weights from seed 0."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
        sample_size=32,
    )  # fmt: skip


class UsualTracker:
    """Mean |x| per channel, mean and std of the tensor, taken to NumPy by a hook in every forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.buffer: dict[str, list[Any]] = defaultdict(list)
        self.modules = [(n, m) for n, m in model.named_modules() if is_kind(m, "conv") or isinstance(m, nn.GroupNorm)]
        self.hooks: list[Any] = []

    def attach(self) -> None:
        self.hooks = [module.register_forward_hook(self._hook(name)) for name, module in self.modules]

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = output.detach()
            dims = [d for d in range(x.dim()) if d != 1]
            self.buffer[f"{name}.abs"].append(x.abs().mean(dims).cpu().numpy())
            self.buffer[f"{name}.mean"].append(x.mean().item())
            self.buffer[f"{name}.std"].append(x.std().item())

        return keep

    def step(self, step: int) -> None:
        if step % EVERY == 0:
            self.buffer.clear()

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Nothing:
    def attach(self) -> None:
        pass

    def step(self, step: int) -> None:
        pass

    def detach(self) -> None:
        pass


def _monitor(window: str) -> Callable[[nn.Module], Monitor]:
    return lambda model: Monitor(model, "conv+GroupNorm", every=EVERY, window=window)


CONTENDERS: dict[str, Callable[[nn.Module], Any]] = {
    "no monitor": lambda model: _Nothing(),
    "usual way, 3 statistics, every forward": UsualTracker,
    "pysteer, 8 statistics, every forward": _monitor("all"),
    f"pysteer, 8 statistics, every {EVERY}th step": _monitor("last"),
}


def _train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    posterior = model.encode(images).latent_dist
    loss = (model.decode(posterior.sample()).sample - images).square().mean() + 1e-6 * posterior.kl().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def monitoring(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a training step under every contender, which take turns; a round is `EVERY` steps."""
    model = small_vae()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    watchers = {name: make(model) for name, make in CONTENDERS.items()}
    names = list(watchers)
    taken: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in names}
    for number in range(-1, rounds):
        sums = {name: [0.0, 0.0] for name in names}
        for step in range(1, EVERY + 1):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                watcher = watchers[name]
                watcher.attach()
                cpu, wall = time.process_time(), time.perf_counter()
                _train_step(model, optimizer, images)
                watcher.step(step)
                sums[name][0] += time.process_time() - cpu
                sums[name][1] += time.perf_counter() - wall
                watcher.detach()
        for name in names if number >= 0 else ():  # the first round warms up
            for kind, seconds in zip(("cpu", "wall"), sums[name], strict=True):
                taken[name][kind].append(1e3 * seconds / EVERY)
    base = taken["no monitor"]
    rows = []
    for name, kinds in taken.items():
        row: dict[str, Any] = {"contender": name}
        for kind, values in kinds.items():
            ratios = [own / plain for own, plain in zip(values, base[kind], strict=True)]
            row |= {f"{kind}_ms": statistics.median(values), f"{kind}_ratio": statistics.median(ratios)}
        rows.append(row)
    return rows


class UsualWeightTracker:
    """Per cent of |w| < t of every parameter, as the published tracker goes about it."""

    def __init__(self, model: nn.Module, threshold: float, message: bool) -> None:
        self.model, self.threshold, self.message = model, threshold, message

    def __call__(self) -> dict[str, float]:
        if self.message:
            _LOGGER.debug(f"parameters: {list(self.model.named_parameters())}")
        found = {}
        for name, parameter in self.model.named_parameters():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if is_kind(module, "conv") or isinstance(module, (nn.Linear, nn.GroupNorm)):
                small = (parameter.detach().abs() < self.threshold).sum().item()
                found[name] = 100 * small / parameter.numel()
        return found


def weights(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of looking at all weights once."""
    model = small_vae()
    health = WeightHealth(model, 1e-3)
    contenders: dict[str, Callable[[], Any]] = {
        "usual way": UsualWeightTracker(model, 1e-3, message=True),
        "usual way without its message": UsualWeightTracker(model, 1e-3, message=False),
        "pysteer, three modes": health.measure,
    }
    usual = contenders["usual way"]()
    ours = dict(zip(health.parameters, health.measure().percent["threshold"].tolist(), strict=True))
    assert usual.keys() == ours.keys()
    assert all(abs(usual[name] - ours[name]) < 1e-9 for name in usual)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - start))
    base = statistics.median(taken["usual way"])
    return [
        {"contender": name, "cpu_ms": (middle := statistics.median(values)), "times_faster": base / middle}
        for name, values in taken.items()
    ]


def table(result: dict[str, Any]) -> str:
    """A stored result as two tables in Markdown."""
    lines = [
        "| training step of the small VAE | CPU, ms | more | wall, ms | more |",
        "|---" * 5 + "|",
    ]
    for row in result["monitoring"]:
        figures = f"{row['cpu_ms']:.1f} | {100 * row['cpu_ratio'] - 100:+.1f} % | {row['wall_ms']:.1f}"
        lines.append(f"| {row['contender']} | {figures} | {100 * row['wall_ratio'] - 100:+.1f} % |")
    lines += ["", "| all weights once | CPU, ms | times faster |", "|---|---|---|"]
    for row in result["weights"]:
        lines.append(f"| {row['contender']} | {row['cpu_ms']:.2f} | {row['times_faster']:.1f} |")
    where = result["machine"]
    about = (
        f"{where['processor']}, {where['threads']} threads, torch {result['versions']['torch']}, {result['date'][:10]}"
    )
    return "\n".join([*lines, "", f"Medians of {result['rounds']} rounds of {EVERY} steps each. {about}."])


def store(folder: Path) -> Path:
    """Keep what a run of the recipe `vae-dynamics` found out."""
    summary = read_json(folder / "summary.json", "summary of the run")
    if summary.get("recipe") != "vae-dynamics":
        raise InputError("run to keep", value=str(folder), allowed="a run of vae-dynamics")
    config = read_json(folder / "run.json", "run")["config"]
    first = next(iter(sorted(folder.glob("**/result.json"))))
    about = {key: read_json(first)[key] for key in ("images", "steps", "parameters")}
    trainings = len(summary["tables"]["trainings"])
    took = {"seconds": summary["seconds"], "trainings": trainings, "workers": config["workers"]}
    kept = {"name": folder.name, "about": about, "took": took, "headline": summary["headline"], **machine()}
    return append("vae-dynamics", kept)


def runs_table() -> str:
    """The newest stored run of every name as a table in Markdown."""
    newest = {result["name"]: result for result in stored("vae-dynamics")}
    names = {"mse": "MSE", "kl": "KL", "psnr": "PSNR, dB", "ssim": "SSIM", "feature_distance": "feature distance"}
    lines = ["| run | measure | baseline | nudge | difference | p, paired t | p, sign flips |", "|---" * 7 + "|"]
    notes = []
    for name, result in newest.items():
        found = result["headline"]
        for key, title in names.items():
            row = found[key]
            ends = f"{row['difference']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
            chances = f"{row['p_t']:.3f} | {row['p_signs']:.3f}"
            lines.append(f"| {name} | {title} | {row['first']:.4g} | {row['second']:.4g} | {ends} | {chances} |")
        planted = [found[condition] for condition in ("baseline", "nudge")]
        counts = ", ".join(
            f"alive at the end with {condition} {own['planted_revived']:.1f}"
            for condition, own in zip(("baseline", "nudge"), planted, strict=True)
        )
        about, where = result["about"], result["machine"]
        notes.append(
            f"{name}: {about['images']}, {found['mse']['pairs']} seeds, {about['steps']} steps, {about['parameters']} "
            f"parameters; of {planted[1]['planted_total']:.0f} planted channels {planted[1]['planted_found']:.0f} were "
            f"found, {counts} (mean of the seeds). {_time(result['took'])}; {where['processor']}, "
            f"{where['threads']} threads, {result['date'][:10]}."
        )
    return "\n".join([*lines, "", *notes])


def _time(took: dict[str, Any]) -> str:
    minutes, each = took["seconds"] / 60, took["seconds"] / took["trainings"]
    beside = f"{took['workers']} at a time" if took["workers"] > 1 else "one after the other"
    return (
        f"All {took['trainings']} trainings with tracking, classifying, nudging, evaluation and the report took "
        f"{minutes:.1f} minutes, {beside}, {each:.0f} s each"
    )


def docs_text(text: str) -> str:
    """The page of the docs with the newest figures between their marks."""
    tables = {"dynamics": table(stored("dynamics")[-1]), "vae-dynamics": runs_table()}
    for name, block in tables.items():
        start, end = text.index(f"<!-- {name}: "), text.index(f"<!-- /{name} -->")
        start = text.index("\n", start) + 1
        text = f"{text[:start]}{block}\n{text[end:]}"
    return text


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="measure", choices=["measure", "table", "store", "runs", "docs"])
    parser.add_argument("folder", nargs="?", type=Path, help="of the run to store")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dry-run", action="store_true", help="do not store the result")
    asked = parser.parse_args()
    if asked.what == "store":
        print(store(asked.folder))
    elif asked.what == "docs":
        write_text(DOCS, docs_text(DOCS.read_text(encoding="utf-8")))
    elif asked.what != "measure":
        print(table(stored("dynamics")[-1]) if asked.what == "table" else runs_table())
    else:
        result = {**machine(), "rounds": asked.rounds, "monitoring": monitoring(asked.rounds), "weights": weights(15)}
        print(table(result))
        if not asked.dry_run:
            append("dynamics", result)


if __name__ == "__main__":
    main()
