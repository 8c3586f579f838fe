"""Configuration of the recipe `dream`: what is looked at, and the settings of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pysteer.dream.augment import LEVELS
from pysteer.dream.capture import ROLES
from pysteer.dream.deep_dream import DreamConfig
from pysteer.dream.prior import TIMES
from pysteer.errors import InputError
from pysteer.recipes.dreaming.prompts import FIXED

STAGES = ("provision", "capture", "timestep_analysis", "plots", "prior", "deep_dream", "representation")
SEEDS = (1024, 1111, 4359, 3248, 1026)
_HOW = {"identity": False}  # how a run is done, not what comes out of it


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(name, value=value, allowed=", ".join(allowed))


@dataclass(frozen=True)
class CaptureSettings:
    """How prompts are drawn and what is kept.

    Attributes:
        num_images_per_prompt: images of every prompt.
        batch_size: rows generated at once, and kept in one block on disk.
        dev_n_prompts: prompts that are used; 0 for all of the file.
        rows: cond, uncond or both.
        top_k: features kept per row and step.
        maps: keep the features that are kept token by token too.
    """

    num_images_per_prompt: int = 1
    batch_size: int = 32
    dev_n_prompts: int = 320
    rows: str = "cond"
    top_k: int = 64
    maps: bool = False

    def __post_init__(self) -> None:
        _check("capture.rows", self.rows, tuple(ROLES))
        if self.num_images_per_prompt < 1 or self.batch_size < 1 or self.dev_n_prompts < 0 or self.top_k < 1:
            raise InputError("capture", value=self, allowed="numbers above 0; dev_n_prompts from 0")


@dataclass(frozen=True)
class AnalysisSettings:
    """When a feature counts as active, and how peaks are found.

    Attributes:
        top_k: a feature counts as active in a row if it is among so many that are largest there.
        examples: rows kept per feature and timestep, those that activate it most.
        total_timesteps: of the schedule.
        peak_threshold: least height of a peak.
        peak_separation: least distance of two peaks, in timesteps.
        top_peak_count: peaks that are kept.
        rows: cond or uncond, whichever was captured.
        capture_run: name of the run whose capture is used; empty for this one.
    """

    top_k: int = 20
    examples: int = 20
    total_timesteps: int = 1000
    peak_threshold: float = 0.0
    peak_separation: int = 100
    top_peak_count: int = 3
    rows: str = "cond"
    capture_run: str = ""

    def __post_init__(self) -> None:
        _check("timestep_analysis.rows", self.rows, ("cond", "uncond"))
        if min(self.top_k, self.examples, self.total_timesteps, self.top_peak_count) < 1:
            raise InputError("timestep_analysis", value=self, allowed="numbers above 0")


@dataclass(frozen=True)
class PlotSettings:
    """How profiles are drawn.

    Attributes:
        format: png (one picture of all peaks) or gif (a frame per peak).
        frame_duration: seconds per frame of a gif.
        timestep_analysis_run: name of the run whose analysis is used; empty for this one.
    """

    format: str = "png"
    frame_duration: float = 2.0
    timestep_analysis_run: str = ""

    def __post_init__(self) -> None:
        _check("plots.format", self.format, ("png", "gif"))


@dataclass(frozen=True)
class PriorSettings:
    """How priors are drawn.

    Attributes:
        timesteps: active_timesteps, all_timesteps or activity_peaks (an image per peak, steered around it).
        n_results: images per feature; as many of the seeds are used.
        seeds: of the images.
        prompt: what is drawn while steered; usually nothing.
        guidance_scale: of the pipeline, for a prompt; above 1 conditional rows are steered alone.
        steer_strength_scale: what is added for a raw channel, in units of its largest mean activation at the timestep.
        steer_strength_scale_sae: the same for a latent.
        start_channel: first feature, with end_channel instead of the choice by `features`.
        end_channel: last feature, included.
        features_per_batch: features drawn as rows of one batch.
        timestep_analysis_run: name of the run whose analysis is used; empty for this one.
    """

    timesteps: str = "active_timesteps"
    n_results: int = 5
    seeds: tuple[int, ...] = SEEDS
    prompt: str = ""
    guidance_scale: float = 1.0
    steer_strength_scale: float = 8.0
    steer_strength_scale_sae: float = 8.0
    start_channel: int | None = None
    end_channel: int | None = None
    features_per_batch: int = 16
    timestep_analysis_run: str = ""

    def __post_init__(self) -> None:
        _check("prior.timesteps", self.timesteps, TIMES)
        if not 1 <= self.n_results <= len(self.seeds):
            raise InputError(
                "prior.n_results", value=self.n_results, allowed=f"1 to {len(self.seeds)}, the seeds given"
            )
        if self.features_per_batch < 1:
            raise InputError("prior.features_per_batch", value=self.features_per_batch, allowed="a number above 0")


@dataclass(frozen=True)
class DreamSettings(DreamConfig):
    """How dreams are started and optimised; the settings of `DreamConfig` besides.

    Attributes:
        timesteps: numbers, and activity_peaks or active_timesteps for those of every feature.
        use_just_one_timestep: dream at the first of them only.
        use_prior: start from the latents of the priors; otherwise from noise.
        n_results: dreams per feature and timestep when starting from noise; from priors, as many as there are.
        seeds: of dreams that start from noise.
        start_channel: first feature, with end_channel instead of the choice by `features`.
        end_channel: last feature, included.
        channels: the features themselves, instead.
        rows_per_batch: dreams optimised at once.
        robustness: level_0 to level_3 sets jitter_max, rotate_max and scale_max; empty leaves them.
        total_variation_penalty_weight_sae: for latents; so with the other names that end in _sae.
        range_penalty_weight_sae: for latents.
        moment_penalty_weight_sae: for latents.
        gradient_smoothing_sigma_start_sae: for latents.
        gradient_smoothing_sigma_end_sae: for latents.
        learning_rate_sae: for latents; none for the same.
        num_steps_sae: for latents; none for the same.
        prior_run: name of the run whose priors are used; empty for this one.
        timestep_analysis_run: name of the run whose analysis is used; empty for this one.
    """

    timesteps: tuple[int | str, ...] = (0, "activity_peaks")
    use_just_one_timestep: bool = False
    use_prior: bool = True
    n_results: int = 5
    seeds: tuple[int, ...] = SEEDS
    start_channel: int | None = None
    end_channel: int | None = None
    channels: tuple[int, ...] = ()
    rows_per_batch: int = 48
    robustness: str = ""
    total_variation_penalty_weight_sae: float = 0.0
    range_penalty_weight_sae: float = 0.5
    moment_penalty_weight_sae: float = 0.5
    gradient_smoothing_sigma_start_sae: float = 0.0
    gradient_smoothing_sigma_end_sae: float = 0.0
    learning_rate_sae: float | None = None
    num_steps_sae: int | None = None
    prior_run: str = ""
    timestep_analysis_run: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for time in self.timesteps:
            if isinstance(time, str):
                _check("deep_dream.timesteps", time, ("activity_peaks", "active_timesteps"))
        if not self.timesteps:
            raise InputError("deep_dream.timesteps", value="none", allowed="numbers, activity_peaks, active_timesteps")
        if self.robustness:
            _check("deep_dream.robustness", self.robustness, tuple(LEVELS))
        if self.rows_per_batch < 1 or not 1 <= self.n_results <= len(self.seeds):
            value = f"{self.rows_per_batch}, {self.n_results}"
            allowed = f"from 1, and 1 to {len(self.seeds)}, the seeds given"
            raise InputError("deep_dream.rows_per_batch, n_results", value=value, allowed=allowed)

    def config(self, kind: str) -> DreamConfig:
        """The settings of the optimisation for `raw` channels or `sae` latents."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(DreamConfig)}
        if kind == "sae":
            own = {name: getattr(self, f"{name}_sae", None) for name in values}
            values |= {name: value for name, value in own.items() if value is not None}
        if self.robustness:
            values |= dict(zip(("jitter_max", "rotate_max", "scale_max"), LEVELS[self.robustness], strict=True))
        return DreamConfig(**values)


@dataclass(frozen=True)
class RepresentationSettings:
    """What is put together for the inspector.

    Attributes:
        timestep_analysis_run: name of the run whose analysis is used; empty for this one.
        prior_run: name of the run whose priors are used; empty for this one.
        deep_dream_run: name of the run whose dreams are used; empty for this one.
        deep_dream_no_noise_run: name of a run with dreams that did not see through noise; empty for none.
        examples: dataset examples shown per feature and peak.
    """

    timestep_analysis_run: str = ""
    prior_run: str = ""
    deep_dream_run: str = ""
    deep_dream_no_noise_run: str = ""
    examples: int = 6


@dataclass(frozen=True)
class DreamRecipeConfig:
    """What features of a diffusion model stand for: when they are active, what they draw, what they dream of.

    Attributes:
        stage: all, or one of provision, capture, timestep_analysis, plots, prior, deep_dream, representation.
        model: a bundled generator, a folder, or a name of the hub; any pipeline of diffusers.
        site: where activations are read.
        sae: name of a bundled autoencoder, or a folder of one (`pysteer convert` reads those of others).
        use_sae: look at the latents of the autoencoder.
        use_raw: look at the channels of the site.
        prompts: file of prompts; empty for captions of the bundled generators.
        fixed: attributes that all captions that are drawn state.
        features: how many features priors and dreams are made of, for each kind; 0 for all that are active.
        choose: activity takes those that are active most, selectivity those that tell a label best (where prompts
            have labels).
        settings: arguments of the pipeline; its steps are those that are captured and steered.
        capture: settings of the stage.
        timestep_analysis: settings of the stage.
        plots: settings of the stage.
        prior: settings of the stage.
        deep_dream: settings of the stage.
        representation: settings of the stage.
        workers: processes that share capture, prior and deep_dream, one per GPU where there are GPUs.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
        seed: of prompts and noise.
    """

    stage: str = field(default="all", metadata=_HOW)
    model: str = "diffusion-shapes"
    site: str = ""
    sae: str = "diffusion-shapes"
    use_sae: bool = True
    use_raw: bool = True
    prompts: str = ""
    fixed: dict[str, str] = field(default_factory=lambda: dict(FIXED))
    features: int = 16
    choose: str = "selectivity"
    settings: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0, "num_inference_steps": 20})
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    timestep_analysis: AnalysisSettings = field(default_factory=AnalysisSettings)
    plots: PlotSettings = field(default_factory=PlotSettings)
    prior: PriorSettings = field(default_factory=PriorSettings)
    deep_dream: DreamSettings = field(default_factory=DreamSettings)
    representation: RepresentationSettings = field(default_factory=RepresentationSettings)
    workers: int = field(default=1, metadata=_HOW)
    device: str = field(default="auto", metadata=_HOW)
    seed: int = 7000

    def __post_init__(self) -> None:
        _check("stage", self.stage, ("all", *STAGES))
        _check("choose", self.choose, ("activity", "selectivity"))
        if not (self.use_sae or self.use_raw):
            raise InputError("use_sae and use_raw", value="neither", allowed="at least one")
        if self.use_sae and not self.sae:
            raise InputError("sae", value="none", allowed="a bundled autoencoder or a folder", fix="or use_sae=false")
        if not self.use_sae and not self.site:
            raise InputError("site", value="none", allowed="a site", fix="give site=NAME where no autoencoder says it")
        if self.features < 0 or self.workers < 1:
            raise InputError("features, workers", value=f"{self.features}, {self.workers}", allowed="from 0, from 1")
