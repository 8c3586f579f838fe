"""Recipe `sae`: a sparse autoencoder for a site of an image generator, trained and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.capture.stream import capture
from pysteer.capture.taps import choose_sites
from pysteer.dream.analysis import image_scores
from pysteer.dream.capture import CapturePlan, capture_features
from pysteer.dream.evaluate import evaluate_sae
from pysteer.dream.features import Features
from pysteer.dream.selectivity import Selectivity, selectivity
from pysteer.dream.sources import StoredTokens, StreamedTokens, TokenSource
from pysteer.dream.train import TrainConfig, train_sae
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.models.load import load_model
from pysteer.models.sae import SparseAutoencoder
from pysteer.recipes.dreaming.page import training_report
from pysteer.recipes.dreaming.prompts import FIXED, Captions, find_captions
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.generator import choose_device

SOURCES = ("captured", "streaming")
_FRESH = 1_000_000  # seeds of the prompts that measure, away from those that train


@dataclass(frozen=True)
class SaeConfig:
    """Which site of which model, on what, and how the autoencoder is trained.

    Attributes:
        model: a bundled generator, a folder, or a name of the hub; any pipeline of diffusers.
        site: where activations are read; `pysteer capture MODEL --help` says how sites are named.
        prompts: file of prompts; empty for captions of the bundled generators.
        count: prompts used, of the file or drawn; 0 for all of the file.
        fixed: attributes that all captions that are drawn state.
        steps: denoising steps that are read; empty for all.
        rows: cond or uncond.
        settings: arguments of the pipeline.
        source: captured keeps the activations on disk, streaming generates them while training.
        train: activation, k, expansion, epochs and the other settings of the training.
        test_count: fresh prompts that it is measured on.
        least: area under the ROC curve from which a latent counts as selective for a label.
        batch_size: prompts generated at once.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: of prompts and noise.
    """

    model: str = "diffusion-shapes"
    site: str = "block.5"
    prompts: str = ""
    count: int = 768
    fixed: dict[str, str] = field(default_factory=lambda: dict(FIXED))
    steps: tuple[int, ...] = ()
    rows: str = "cond"
    settings: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0, "num_inference_steps": 20})
    source: str = "captured"
    train: TrainConfig = field(default_factory=TrainConfig)
    test_count: int = 300
    least: float = 0.9
    batch_size: int = 32
    device: str = "auto"
    seed: int = 61000

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InputError("source of the tokens", value=self.source, allowed=", ".join(SOURCES))
        if self.count < 0 or self.test_count < 1 or self.batch_size < 1:
            value = f"{self.count}, {self.test_count}, {self.batch_size}"
            raise InputError("count, test_count, batch_size", value=value, allowed="from 0, from 1, from 1")


@recipe("sae", SaeConfig)
def run_sae(config: SaeConfig, run: Run) -> Summary:
    """Train a sparse autoencoder on the activations of a site and measure what its latents stand for."""
    device = choose_device(config.device)
    pipe = load_model(config.model)
    if hasattr(pipe, "pipe"):
        pipe.pipe.set_progress_bar_config(disable=True)
    if device.type != "cpu":
        pipe.to(device)
    family = find_family(pipe)
    (site,) = choose_sites(family, pipe, config.site)
    told = find_captions(config.prompts, config.count, config.seed, fixed=config.fixed)
    source = _source(config, run, pipe, told)
    sae, history = _trained(config, run, source, device)
    quality, measured = _measured(config, run, pipe, Features(site, sae.width, sae))
    run.write_parquet("metrics.parquet", [{**row, "part": "training"} for row in history])
    training_report(run, sae, history, quality, measured, config)
    headline: dict[str, Any] = {**quality, "latents": sae.latents, "k": config.train.k}
    best: dict[str, Any] = {"sae": "sae"}
    if measured is not None:
        headline |= {"live": int(measured.live.sum()), "selective": measured.share(config.least)}
        best |= {"selective": measured.share(config.least)}
    return Summary(best=best, headline=headline, tables={"training": history})


def _source(config: SaeConfig, run: Run, pipe: Any, told: Captions) -> TokenSource:
    seeds = [config.seed + i for i in range(len(told.texts))]
    steps = config.steps or None
    if config.source == "streaming":
        return StreamedTokens(
            pipe, config.site, told.texts, seeds, config.batch_size, steps, config.rows, config.settings
        )
    with run.progress.follow("prompts captured", len(told.texts)) as show:
        store = capture(
            pipe, told.texts, run.path("activations"), sites=[config.site], steps=steps, rows=config.rows,
            seeds=seeds, batch_size=config.batch_size, dtype="fp16", settings=config.settings, progress=show,
        )  # fmt: skip
    return StoredTokens(store, config.site)


def _trained(
    config: SaeConfig, run: Run, source: TokenSource, device: Any
) -> tuple[SparseAutoencoder, list[dict[str, float]]]:
    folder = run.path("sae")
    with run.stage("train", [list(source.sizes)]) as stage:
        if not stage.done:
            meta = {"model": config.model, "site": config.site, "rows": config.rows, "settings": config.settings}
            with run.progress.follow("training steps") as show:
                sae, history = train_sae(
                    config.train, source, run.folder / "training", meta=meta, device=device,
                    tell=lambda step, steps, figures: show(step, steps),
                )  # fmt: skip
            sae.to("cpu").save_pretrained(folder)
            files.write_json(folder / "training.json", history)
    return SparseAutoencoder.from_pretrained(folder), files.read_json(
        folder / "training.json", "history of the training"
    )


def _measured(
    config: SaeConfig, run: Run, pipe: Any, features: Features
) -> tuple[dict[str, float], Selectivity | None]:
    """FVU, L0 and dead latents on fresh prompts, and the selectivity of all latents where prompts have labels."""
    assert features.sae is not None
    fresh = find_captions(
        config.prompts, config.test_count, config.seed + _FRESH, skip=config.count, fixed=config.fixed
    )
    seeds = [config.seed + _FRESH + i for i in range(len(fresh.texts))]
    with run.stage("quality", features.digest()) as stage:
        if not stage.done:
            few = StreamedTokens(
                pipe, config.site, fresh.texts[:64], seeds[:64], config.batch_size, config.steps or None, config.rows,
                config.settings,
            )  # fmt: skip
            stage.notes["quality"] = vars(evaluate_sae(features.sae, few))
    quality: dict[str, float] = stage.notes["quality"]
    if not fresh.attributes:
        return quality, None
    plan = CapturePlan(
        fresh.texts, seeds, rows=config.rows, top_k=features.count, block=config.batch_size, images=False,
        settings=config.settings,
    )  # fmt: skip
    with run.progress.task("fresh prompts", len(fresh.texts)) as advance:
        parts = capture_features(pipe, plan, [features], Path(run.path("fresh")), advance=advance)
    scores = image_scores(parts, features.kind, config.rows, features.count)
    return quality, selectivity(scores, fresh.attributes)
