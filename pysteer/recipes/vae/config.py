"""Configuration of the recipe `vae-dynamics`; the keys of published experiment files are keys here.

Files may name a base under `defaults` (a list of file names without ending, beside the file); nested keys are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pysteer.errors import InputError
from pysteer.recipes.config import merge_values, read_values

CONDITIONS = ("baseline", "nudge")
PRESETS = ("tiny", "small", "sdxl")
# Strategy in a configuration -> operation; the first two are what published files call them.
STRATEGIES = {
    "gentle_nudge_groupnorm_scale": "scale",
    "reset_groupnorm_scale": "reset",
    "gentle_nudge": "scale",
    "reset_scale": "reset",
    "scale": "scale",
    "add": "add",
    "reset": "reset",
    "reinitialise": "reinitialise",
}


@dataclass(frozen=True)
class ModelPart:
    """Which autoencoder.

    Attributes:
        pretrained_vae_name: folder or hub name of an AutoencoderKL to fine-tune; empty trains a preset from scratch.
        preset: tiny (16, 32, 32 channels), small (32, 64, 64) or sdxl (the configuration of the SDXL autoencoder).
        plant: share of the channels of every group norm that are killed before training: scale 0, scale 1e-4, and
            scale 0 with shift 0.5, in turn. For experiments whose dead channels are known.
        gradient_checkpointing: less memory for more time.
    """

    pretrained_vae_name: str = ""
    preset: Literal["tiny", "small", "sdxl"] = "tiny"
    plant: float = 0.0
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class DataPart:
    """Which images.

    Attributes:
        dataset_name: glyphs, fashion-mnist, shapes, a folder of images, or a data set of the hub (needs `datasets`).
        dataset_config_name: configuration of a data set of the hub.
        path: where fashion-mnist or the fonts are; empty looks in the places where packages put them.
        image_column: column of a data set of the hub; image and img stand for each other.
        resolution: side of the images in pixels.
        max_samples: images to train on; empty takes all.
        batch_size: images at once, on each device.
        num_workers: processes that read images from files.
        do_validation: whether to validate while training.
        train_split_name: split to train on.
        validation_dataset_name: another data set to validate on.
        validation_dataset_config_name: its configuration.
        validation_split_name: split to validate and evaluate on.
        validation_max_samples: images to validate on; empty takes all.
        validation_batch_size: images at once.
        skip_unreadable: leave out images that cannot be read instead of stopping.
    """

    dataset_name: str = "glyphs"
    dataset_config_name: str = ""
    path: str = ""
    image_column: str = "image"
    resolution: int = 32
    max_samples: int | None = 4096
    batch_size: int = 16
    num_workers: int = 0
    do_validation: bool = True
    train_split_name: str = "train"
    validation_dataset_name: str = ""
    validation_dataset_config_name: str = ""
    validation_split_name: str = "test"
    validation_max_samples: int | None = 256
    validation_batch_size: int = 64
    skip_unreadable: bool = False


@dataclass(frozen=True)
class TrainingPart:
    """How to train. Loss: mean squared error + kl_weight KL (summed over a sample), and what else has a weight.

    Attributes:
        num_train_epochs: times through the images.
        max_train_steps: steps after which to stop, however many epochs; empty for none.
        learning_rate: after the warm-up.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_weight_decay: of AdamW.
        adam_epsilon: of AdamW.
        lr_scheduler_type: linear and cosine fall to 0, constant stays.
        lr_warmup_steps: steps in which the rate rises from 0.
        gradient_accumulation_steps: batches of one step.
        mixed_precision: no, bf16 or fp16; weights stay in fp32.
        max_grad_norm: gradients longer than this are shortened to it.
        kl_weight: of the KL divergence.
        validation_epochs: epochs between validations, 0 for none.
        validation_steps: steps between validations, 0 for none.
        ema_decay: of the moving average of the weights that is evaluated; 0 for none.
        perceptual_weight: of the squared difference of features of the bundled shapes classifier.
        adversarial_weight: of the hinge loss of a small patch discriminator that is trained along.
        adversarial_start: step from which the discriminator is used.
    """

    num_train_epochs: int = 100
    max_train_steps: int | None = 300
    learning_rate: float = 1e-3
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    lr_warmup_steps: int = 20
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    max_grad_norm: float = 1.0
    kl_weight: float = 1e-6
    validation_epochs: int = 0
    validation_steps: int = 100
    ema_decay: float = 0.0
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0


@dataclass(frozen=True)
class LoggingPart:
    """What is logged.

    Attributes:
        log_interval: steps between two lines of the training table.
        report_to: none, tensorboard, wandb or all; what is not installed is left out with a warning.
        entity: of wandb.
    """

    log_interval: int = 10
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    entity: str = ""


@dataclass(frozen=True)
class SavingPart:
    """Checkpoints, from which an interrupted run goes on.

    Attributes:
        save_interval_steps: steps between two checkpoints.
        save_interval: the same under another name.
        checkpoint_dir_prefix: name in front of the step.
        keep: checkpoints that are kept.
    """

    save_interval_steps: int = 100
    save_interval: int | None = None
    checkpoint_dir_prefix: str = "chkpt"
    keep: int = 1

    @property
    def every(self) -> int:
        return self.save_interval or self.save_interval_steps


@dataclass(frozen=True)
class WeightsPart:
    """Dead weights.

    Attributes:
        enabled: whether they are counted.
        track_interval: steps between two counts.
        threshold: |w| below it is dead; empty takes the key `threshold` of the file.
        mean_percentage: fraction of mean |w|; empty takes the key `mean_percentage` of the file.
        dead_type: threshold, percent_of_mean or both; empty takes the key `dead_type` of the file.
        target_layer_names_for_raw_weights: parameters that are drawn at the end.
    """

    enabled: bool = True
    track_interval: int = 20
    threshold: float | None = None
    mean_percentage: float | None = None
    dead_type: Literal["threshold", "percent_of_mean", "both"] | None = None
    target_layer_names_for_raw_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrackingPart:
    """Activity of channels.

    Attributes:
        enabled: whether it is tracked.
        track_interval: steps between two windows.
        target_layers: layers by name, kind or pattern, or mappings with name, capture_point and metrics; empty takes
            all group norms.
        window: all forward passes, or those of the last step of the interval.
    """

    enabled: bool = True
    track_interval: int = 10
    target_layers: tuple[Any, ...] = ()
    window: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class LensPart:
    """Pictures of channels while training.

    Attributes:
        enabled: whether they are drawn.
        visualization_interval: steps between two sets.
        visualization_output_subdir: where they go.
        target_tracked_metrics: names of layers, metrics behind them are ignored; empty takes the layers watched.
        layers_to_analyze_direct: more names of layers.
        num_channels_to_viz: channels of each layer that are projected.
        num_batch_samples_to_viz: images.
        colormap: of the grids.
        run_mini_decoder_projection: project through the trained decoder.
        projection_type: mini_decoder_single_channel, mini_decoder_full_map or both.
        ablation: also measure what channels of these layers are worth.
        ablation_channels: the most channels of a layer, spread evenly.
    """

    enabled: bool = True
    visualization_interval: int = 100
    visualization_output_subdir: str = "logit_lens_visualizations"
    target_tracked_metrics: tuple[str, ...] = ()
    layers_to_analyze_direct: tuple[str, ...] = ()
    num_channels_to_viz: int = 4
    num_batch_samples_to_viz: int = 1
    colormap: str = "viridis"
    run_mini_decoder_projection: bool = True
    projection_type: Literal["mini_decoder_single_channel", "mini_decoder_full_map", "both"] = "both"
    ablation: bool = True
    ablation_channels: int = 64


@dataclass(frozen=True)
class ClassificationPart:
    """Which channels count as dead.

    Attributes:
        enabled: whether channels are classified.
        method: std, mean_abs, gamma, near_zero_fraction, zero_fraction or threshold_groupnorm_activity (mean |x| of
            group norms, as published; `threshold` is another word for it).
        threshold: dead is below it; empty takes the method's own.
        target_metric_key: accepted where it is the metric of the method.
        layers_to_classify: layers; empty takes all that are watched.
        persistence: windows in a row.
    """

    enabled: bool = True
    method: str = "std"
    threshold: float | None = 0.1
    target_metric_key: str = ""
    layers_to_classify: tuple[str, ...] = ()
    persistence: int = 1


@dataclass(frozen=True)
class InterventionPart:
    """What is done to dead channels.

    Attributes:
        enabled: whether anything is; the condition `nudge` of a comparison needs it on.
        strategy: gentle_nudge_groupnorm_scale (scale), reset_groupnorm_scale (reset), add, reinitialise.
        nudge_factor: of the scale nudge.
        nudge_value_add: of the additive nudge.
        max_scale_value: |scale| is not nudged beyond it.
        intervention_interval: steps between two interventions.
        start_step: first step.
        stop_step: last step; empty for none.
        optimizer_state: keep, momentum (first moments of nudged channels become 0) or all.
    """

    enabled: bool = True
    strategy: str = "add"
    nudge_factor: float = 1.1
    nudge_value_add: float = 0.05
    max_scale_value: float = 1.5
    intervention_interval: int = 10
    start_step: int = 1
    stop_step: int | None = None
    optimizer_state: Literal["keep", "momentum", "all"] = "momentum"


@dataclass(frozen=True)
class EvaluationPart:
    """Evaluation of a trained model.

    Attributes:
        samples: images; empty takes all of the split.
        num_samples_to_save: pairs of pictures that are written.
        batch_size: images at once.
    """

    samples: int | None = 1024
    num_samples_to_save: int = 16
    batch_size: int = 64


@dataclass(frozen=True)
class VaeDynamicsConfig:
    """Train an autoencoder, watch its channels, revive dead ones, evaluate; or compare with and without reviving.

    Attributes:
        stage: run trains and evaluates, evaluate only evaluates `checkpoint_path`.
        checkpoint_path: folder with `vae/` inside, or of an autoencoder.
        eval_split: split to evaluate on; empty takes the validation split.
        seed: seed of weights, order and noise.
        seeds: how many seeds are trained, from `seed` on.
        conditions: baseline, nudge or both; empty takes nudge where interventions are enabled, else baseline.
        workers: trainings at the same time, each in a process of its own with its share of the cores.
        device: auto, cpu or cuda.
        threshold: |w| below it is a dead weight, where dead_neuron_tracking says nothing.
        mean_percentage: as `threshold`, relative to mean |w|.
        dead_type: as in dead_neuron_tracking.
        project_name: for trackers.
        run_name: for trackers; the folder is named by --name.
        output_dir: accepted; the folder of all runs is named by --out.
        model: the autoencoder.
        data: the images.
        training: how it is trained.
        logging: what is logged.
        saving: checkpoints.
        dead_neuron_tracking: dead weights.
        tracking: activity of channels.
        logit_lens: pictures of channels.
        classification: which channels are dead.
        intervention: what is done to them.
        evaluation: how the trained model is measured.
    """

    stage: Literal["run", "evaluate"] = "run"
    checkpoint_path: str = ""
    eval_split: str = ""
    seed: int = 42
    seeds: int = 1
    conditions: tuple[str, ...] = ()
    workers: int = 1
    device: str = "auto"
    threshold: float = 1e-8
    mean_percentage: float = 0.01
    dead_type: Literal["threshold", "percent_of_mean", "both"] = "threshold"
    project_name: str = "vae-dynamics"
    run_name: str = ""
    output_dir: str = ""
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    training: TrainingPart = field(default_factory=TrainingPart)
    logging: LoggingPart = field(default_factory=LoggingPart)
    saving: SavingPart = field(default_factory=SavingPart)
    dead_neuron_tracking: WeightsPart = field(default_factory=WeightsPart)
    tracking: TrackingPart = field(default_factory=TrackingPart)
    logit_lens: LensPart = field(default_factory=LensPart)
    classification: ClassificationPart = field(default_factory=ClassificationPart)
    intervention: InterventionPart = field(default_factory=InterventionPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)

    def __post_init__(self) -> None:
        for name in self.conditions:
            if name not in CONDITIONS:
                raise InputError("conditions", value=name, allowed=", ".join(CONDITIONS))
        positive = {
            "seeds": self.seeds,
            "workers": self.workers,
            "data.batch_size": self.data.batch_size,
            "data.resolution": self.data.resolution,
            "data.validation_batch_size": self.data.validation_batch_size,
            "training.gradient_accumulation_steps": self.training.gradient_accumulation_steps,
            "saving.save_interval_steps": self.saving.every,
            "saving.keep": self.saving.keep,
            "tracking.track_interval": self.tracking.track_interval,
            "logging.log_interval": self.logging.log_interval,
            "evaluation.batch_size": self.evaluation.batch_size,
        }
        for name, value in positive.items():
            if value < 1:
                raise InputError(name, value=value, allowed="a whole number from 1")
        if not 0 <= self.model.plant < 1:
            raise InputError("model.plant", value=self.model.plant, allowed="from 0 to below 1")
        if self.intervention.strategy not in STRATEGIES:
            allowed = ", ".join(STRATEGIES)
            raise InputError("intervention.strategy", value=self.intervention.strategy, allowed=allowed)
        if self.stage == "evaluate" and not self.checkpoint_path:
            raise InputError("checkpoint_path", value="", allowed="a folder with vae/ inside", fix="give it")
        if self.intervention.enabled and not (self.classification.enabled and self.tracking.enabled):
            raise InputError("intervention.enabled", value=True, allowed="with classification and tracking enabled")

    @property
    def cells(self) -> list[tuple[str, int]]:
        """The trainings: condition and seed, seeds in the outer loop."""
        conditions = self.conditions or (("nudge",) if self.intervention.enabled else ("baseline",))
        return [(condition, self.seed + number) for number in range(self.seeds) for condition in conditions]


def prepare(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Values of a file with those of its `defaults` below them, null taken as "leave it at the default".

    Raises:
        InputError: a file of `defaults` that is not there.
    """
    bases = values.pop("defaults", None) or []
    merged: dict[str, Any] = {}
    for name in [bases] if isinstance(bases, str) else bases:
        if name == "_self_":
            continue
        path = folder / f"{name}.yaml"
        merged = merge_values(merged, prepare(merge_values(read_values(path)), path.parent))
    values = merge_values(merged, values)
    # Published files have no such key: what they do not mention must not change what they mean.
    published = {"training": {"max_train_steps": None}}
    if isinstance(values.get("training"), Mapping) and "num_train_epochs" in values["training"]:
        values = merge_values(published, values)
    classification = values.get("classification")
    if isinstance(classification, Mapping):
        if classification.get("method") == "threshold":
            values["classification"] = {**classification, "method": "threshold_groupnorm_activity"}
        if str(classification.get("enabled")).lower() == "false" and "intervention" not in values:
            values["intervention"] = {"enabled": False}
    return values
