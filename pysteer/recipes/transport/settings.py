"""Configuration of the recipes `act-text` and `act-image`, in groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pysteer.data.tasks import TaskSettings
from pysteer.errors import InputError

METHODS = ("mean_difference", "linear_act", "gaussian_transport", "aura", "prototype", "affine_transport")


def check_numbers(group: str, settings: Any, **least: float) -> None:
    """Raise an InputError unless fields are at least so large."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise InputError(f"{group}.{name}", value=getattr(settings, name), allowed=f"at least {value:g}")


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where it is steered.

    Attributes:
        name: smollm2, a bundled generator, a folder, or a name of the hub.
        sites: short names (block.18), kinds (mlp) or regular expressions over module paths that match in full, each
            perhaps with an element of the output behind a colon (`.*blocks.[0-9]+:[0-1]`); empty takes those of AcT for
            this kind of model.
        dtype: auto is bfloat16 where the hardware multiplies it fast, else float32.
        device: auto (a GPU where there is one), cpu, cuda:0 and so on.
    """

    name: str = "smollm2"
    sites: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class MethodSettings:
    """What is learned, and how.

    Attributes:
        names: methods, compared with each other: linear_act, gaussian_transport, mean_difference, aura, prototype,
            affine_transport and every other of `pysteer.methods`.
        options: options of the methods by name, for example {linear_act: {support: all}}.
        incremental: atonce fits every site from the unsteered model; incr fits each with the earlier ones steered.
        position: all tokens of a text are steered, or the last one of the prompt and every new one.
        steered_new: new tokens that are drawn under steering, the first ones of every text; 0 for all. A topic that is
            under way goes on by itself.
        skip_tokens: first tokens of every text that neither enter the fit nor are steered: the first one is the
            attention sink, whose activations dwarf all others.
        batch_size: texts read at once while fitting.
    """

    names: tuple[str, ...] = ("linear_act",)
    options: dict[str, Any] = field(default_factory=dict)
    incremental: Literal["atonce", "incr"] = "atonce"
    position: Literal["all", "last"] = "all"
    steered_new: int = 0
    skip_tokens: int = 1
    batch_size: int = 50

    def __post_init__(self) -> None:
        check_numbers("method", self, skip_tokens=0, steered_new=0, batch_size=1)
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError("method.names", value=", ".join(self.names) or "none", allowed="at least one, each once")
        for name, options in self.options.items():
            if name not in self.names or not isinstance(options, dict):
                allowed = f"options of {', '.join(self.names)}"
                raise InputError("method.options", value=f"{name}: {options}", allowed=allowed)


@dataclass(frozen=True)
class StrengthSettings:
    """Over which strengths texts or images are generated.

    Attributes:
        min: the first strength.
        max: the last one.
        steps: how many, evenly spaced.
        values: the strengths themselves, in place of the three above.
    """

    min: float = 0.0
    max: float = 1.0
    steps: int = 11
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_numbers("strengths", self, steps=1)

    def all(self) -> tuple[float, ...]:
        """The strengths, ascending, each once."""
        if self.values:
            return tuple(sorted(set(self.values)))
        if self.steps == 1:
            return (self.max,)
        width = (self.max - self.min) / (self.steps - 1)
        return tuple(sorted({round(self.min + i * width, 6) for i in range(self.steps)}))


@dataclass(frozen=True)
class TextSettings:
    """How texts are generated.

    Attributes:
        num_sentences: texts per strength, over the prompts in turn.
        new_seq_len: the most tokens of a text.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: probability of the tokens that are drawn from.
        repetition_penalty: of tokens the text holds already.
        rows: texts in work at a time.
    """

    num_sentences: int = 100
    new_seq_len: int = 48
    temperature: float = 1.0
    top_p: float = 0.3
    repetition_penalty: float = 1.2
    rows: int = 128

    def __post_init__(self) -> None:
        check_numbers("generation", self, num_sentences=1, new_seq_len=1, rows=1, temperature=0)
        if not 0 < self.top_p <= 1 or not 0 < self.repetition_penalty <= 100:
            value = f"top_p {self.top_p}, repetition_penalty {self.repetition_penalty}"
            raise InputError("generation", value=value, allowed="top_p in (0, 1], repetition_penalty in (0, 100]")


@dataclass(frozen=True)
class SearchSettings:
    """Search of sites and strength for every method, on prompts of its own.

    At every place the strongest setting with a perplexity of at most `perplexity` times the unsteered one stands for
    the place; the place with the highest concept rate is taken, and measured on the prompts of the report.

    Attributes:
        sites: places that are tried; `block.14+block.18` steers both. Empty: no search, `model.sites` are steered.
        strengths: tried at every place; empty takes a list that suits the method.
        num_sentences: texts per setting.
        report: all methods are measured on the prompts of the report, or the best one alone; the others then keep the
            scores of the search.
        perplexity: the most that counts as readable, a factor on the unsteered perplexity. Below the bar the report is
            held against, because the best of many is partly luck.
    """

    sites: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    num_sentences: int = 40
    report: Literal["all", "best"] = "all"
    perplexity: float = 1.4

    def __post_init__(self) -> None:
        check_numbers("search", self, num_sentences=2)
        if not self.perplexity > 0:
            raise InputError("search.perplexity", value=self.perplexity, allowed="above 0")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured beside concept rate and perplexity.

    Attributes:
        names: of toxicity (RealToxicityPrompts with a classifier), zero_shot (the model itself answers yes or no),
            mmlu (through lm-eval).
        strength: at which these are measured, beside 0; empty takes the best or the largest one.
        toxicity_classifier: a text classifier of transformers, folder or name, or `module:function` of your own that
            takes a list of texts and returns the probability of toxic for each.
        toxicity_prompts: prompts.jsonl of RealToxicityPrompts.
        toxicity_samples: prompts that are continued.
        zero_shot_model: model that answers yes or no whether a text is about the concept; the unsteered one when empty.
        mmlu_limit: questions per subject, 0 for all.
        perplexity_bar: factor on the unsteered perplexity up to which a setting counts as reached in the report.
    """

    names: tuple[Literal["toxicity", "zero_shot", "mmlu"], ...] = ()
    strength: float | None = None
    toxicity_classifier: str = "s-nlp/roberta_toxicity_classifier"
    toxicity_prompts: str = ""
    toxicity_samples: int = 1000
    zero_shot_model: str = ""
    mmlu_limit: int = 0
    perplexity_bar: float = 1.5

    def __post_init__(self) -> None:
        check_numbers("evaluation", self, toxicity_samples=1, mmlu_limit=0)
        if self.strength is not None and not math.isfinite(self.strength):
            raise InputError("evaluation.strength", value=self.strength, allowed="a finite number")


@dataclass(frozen=True)
class TrackingSettings:
    """Where metrics go beside the run folder.

    Attributes:
        wandb: disabled, offline or online.
        wandb_project: its project.
        tensorboard: write event files into the run folder.
    """

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "pysteer"
    tensorboard: bool = False


@dataclass(frozen=True)
class ActTextConfig:
    """Transport the activations of a language model and generate over a range of strengths.

    Attributes:
        model: the model and its sites.
        task: source and target texts.
        method: what is learned from them.
        strengths: over which texts are generated.
        generation: how.
        search: of sites and strength, on other prompts.
        evaluation: further measures.
        tracking: wandb and tensorboard.
        seed: seed of samples, fits and generation.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    strengths: StrengthSettings = field(default_factory=StrengthSettings)
    generation: TextSettings = field(default_factory=TextSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    seed: int = 42


@dataclass(frozen=True)
class ImageMethodSettings:
    """What is learned of a generator, and how.

    Attributes:
        names: methods, compared with each other; see act-text.
        options: options of the methods by name, for example {linear_act: {pooled: false}}.
        incremental: atonce fits every site from the unsteered model; incr fits each with the earlier ones steered; auto
            is what suits the classes of a bundled generator, else atonce.
        response_steps: steps of the runs that are learned from, one map for all steps coming from them (the published
            pipeline takes 1); 0 learns from whole generations, a map for every step.
        steps: steps that are steered, all when empty (those that draw the class, in a bundled Infinity generator).
        rows: which rows of classifier-free guidance are steered.
        batch_size: prompts run at once while fitting.
    """

    names: tuple[str, ...] = ("linear_act",)
    options: dict[str, Any] = field(default_factory=dict)
    incremental: Literal["auto", "atonce", "incr"] = "auto"
    response_steps: int = 0
    steps: tuple[int, ...] = ()
    rows: Literal["cond", "uncond", "both"] = "cond"
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_numbers("method", self, response_steps=0, batch_size=1)
        MethodSettings(self.names, self.options)


@dataclass(frozen=True)
class ImageSettings:
    """How images are generated.

    Attributes:
        num_prompts: prompts, each generated at every strength.
        guidance: guidance scales, the generator's own when empty; every one of them is generated.
        inference_steps: denoising steps of a diffusion model, 0 for its own.
        rows: images generated at once; all strengths of a prompt are rows of one batch.
        size: side of the stored images in pixels, 0 leaves them as they are.
        animation: a picture that goes through the strengths, per prompt: webp, gif or none.
        frame_ms: how long a strength is shown, in milliseconds.
        settings: further arguments of the generator, for example {height: 512}.
    """

    num_prompts: int = 48
    guidance: tuple[float, ...] = ()
    inference_steps: int = 0
    rows: int = 96
    size: int = 0
    animation: Literal["webp", "gif", "none"] = "webp"
    frame_ms: int = 500
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_numbers("generation", self, num_prompts=1, inference_steps=0, rows=1, size=0, frame_ms=10)


@dataclass(frozen=True)
class ImageEvaluationSettings:
    """What is measured of images.

    Attributes:
        clip: a CLIP model of transformers, folder or name: similarity to the source and the target texts, and how far
            an image has moved along the direction from one to the other. Pairs of classes of the bundled generators
            are judged by their classifier in any case.
        source_text: text that stands for the source (for CLIP), the source label when empty.
        target_text: text that stands for the target.
    """

    clip: str = ""
    source_text: str = ""
    target_text: str = ""


@dataclass(frozen=True)
class GeneratorSettings(ModelSettings):
    __doc__ = ModelSettings.__doc__

    name: str = "diffusion-shapes"


@dataclass(frozen=True)
class ImageTaskSettings(TaskSettings):
    __doc__ = TaskSettings.__doc__

    name: str = "red->blue"


@dataclass(frozen=True)
class ActImageConfig:
    """Transport the activations of an image generator and generate over a range of strengths.

    Attributes:
        model: the generator and its sites.
        task: source and target prompts; circle->square and the like for the bundled generators.
        method: what is learned from them.
        strengths: over which images are generated.
        generation: how.
        evaluation: what is measured.
        tracking: wandb and tensorboard.
        seed: seed of samples, fits and noise.
    """

    model: GeneratorSettings = field(default_factory=GeneratorSettings)
    task: ImageTaskSettings = field(default_factory=ImageTaskSettings)
    method: ImageMethodSettings = field(default_factory=ImageMethodSettings)
    strengths: StrengthSettings = field(default_factory=StrengthSettings)
    generation: ImageSettings = field(default_factory=ImageSettings)
    evaluation: ImageEvaluationSettings = field(default_factory=ImageEvaluationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    seed: int = 42
