"""Recipe `act-image`: learn maps from the activations of two sets of prompts, and generate images over strengths.

Extract responses and learn (at once, or site after site with the earlier ones steered), generate with all strengths of
a prompt as rows of one batch, measure what the images show, and report. Images lie in
`images/METHOD/{strength:.03f}_{guidance:.03f}/INDEX.png`, an animation per prompt beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pysteer.data.tasks import load_task
from pysteer.errors import InputError
from pysteer.models.language import LanguageModel
from pysteer.models.load import load_model
from pysteer.recipes.frame import Run, Summary, recipe
from pysteer.recipes.prototype.generator import choose_device
from pysteer.recipes.prototype.page import versions
from pysteer.recipes.transport.image_page import image_sentence, ranked_images, write_image_report
from pysteer.recipes.transport.image_trial import ImageOutcome, ImageTrial
from pysteer.recipes.transport.settings import ActImageConfig, ModelSettings
from pysteer.recipes.transport.trackers import Trackers


def load_generator_of_images(settings: ModelSettings) -> Any:
    """The generator of the settings, in the type and on the device that they name.

    Raises:
        InputError: the model is missing, or makes no images.
    """
    import torch

    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    device = choose_device(settings.device)
    pipe = load_model(settings.name)
    if isinstance(pipe, LanguageModel):
        raise InputError("model.name", value=settings.name, allowed="a generator of images", fix="pysteer run act-text")
    if hasattr(pipe, "pipe"):  # diffusers; the run has a bar of its own
        pipe.pipe.set_progress_bar_config(disable=True)
        dtype = named.get(settings.dtype) or (torch.float16 if device.type != "cpu" else torch.float32)
        return pipe.to(device, dtype)
    if settings.dtype not in ("auto", "float32"):
        raise InputError("model.dtype", value=settings.dtype, allowed="float32 for this model")
    return pipe.to(device) if device.type != "cpu" else pipe


@recipe("act-image", ActImageConfig)
def run_act_image(config: ActImageConfig, run: Run) -> Summary:
    """Steer an image generator towards a class or a style: fit, generate over strengths, measure."""
    for name in ("words", "search_prompts"):
        if getattr(config.task, name):
            raise InputError(f"task.{name}", value=str(getattr(config.task, name)), allowed="nothing for images")
    task = load_task(config.task, config.seed)
    trackers = Trackers(config.tracking, run.folder, config)
    pipe = load_generator_of_images(config.model)
    trial = ImageTrial(run, config, pipe, task)
    run.log.info(
        "task %s: %d and %d prompts; %d sites", task.name, len(task.source), len(task.target), len(trial.sites)
    )
    with run.progress.task("images", trial.planned) as advance:
        outcomes = ranked_images([trial.outcome(name, advance) for name in trial.methods])
    for outcome in outcomes:
        for score in outcome.scores:
            values = {"target_rate": score.target.value, "kept_rate": score.kept.value, "distance": score.distance}
            trackers.log(outcome.method, score.strength, {**values, **score.clip})
    run.write_parquet("metrics.parquet", _rows(outcomes))
    run.write_json("prompts.json", [{"id": i, "prompt": p, "seed": s} for i, (p, s) in enumerate(_asked(trial))])
    run.log.info("%s", image_sentence(outcomes[0], trial))
    write_image_report(run, trial, outcomes, f"pysteer run act-image, {config.model.name}, {versions()}")
    trackers.close()
    return _summary(outcomes)


def _asked(trial: ImageTrial) -> list[tuple[str, int]]:
    return list(zip(trial.prompts, trial.seeds, strict=True))


def _rows(outcomes: Sequence[ImageOutcome]) -> list[dict[str, Any]]:
    rows = []
    for outcome in outcomes:
        for score in outcome.scores:
            target = {
                "target_rate": score.target.value,
                "target_low": score.target.low,
                "target_high": score.target.high,
            }
            kept = {"kept_rate": score.kept.value, "feature_distance": score.distance, "pixel_change": score.change}
            where = {"method": outcome.method, "place": outcome.place, "guidance": score.guidance}
            rows.append({**where, "strength": score.strength, **target, **kept, **score.clip})
    return rows


def _summary(outcomes: Sequence[ImageOutcome]) -> Summary:
    best = outcomes[0]
    named = {"method": best.method, "place": best.place, "strength": best.best.strength}
    rates = {"target_rate": best.best.target.value, "kept_rate": best.best.kept.value}
    table = [{"method": o.method, "place": o.place, **score.as_dict()} for o in outcomes for score in o.scores]
    return Summary(best={**named, **rates}, headline=best.best.as_dict(), tables={"methods": table})
