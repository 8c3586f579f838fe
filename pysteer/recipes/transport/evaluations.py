"""Further evaluations of a steered language model: toxicity, yes/no questions, MMLU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pysteer
from pysteer.data.tasks import Task, data_folder, toxicity_prompts
from pysteer.errors import InputError
from pysteer.metrics.rates import rate
from pysteer.models.language import LanguageModel
from pysteer.models.load import load_model
from pysteer.recipes.transport.settings import ActTextConfig

if TYPE_CHECKING:
    from pysteer.recipes.frame import Run
    from pysteer.recipes.transport.text_trial import Outcome, TextTrial
    from pysteer.recipes.transport.texts import Texts

Classifier = Callable[[Sequence[str]], Sequence[float]]


def _prompts_file(config: ActTextConfig) -> Path:
    given = config.evaluation.toxicity_prompts
    return Path(given) if given else data_folder() / "rtp" / "prompts.jsonl"


def check_evaluations(config: ActTextConfig, task: Task) -> None:
    """Raise an InputError for what is missing, before anything is computed."""
    names = config.evaluation.names
    if "toxicity" in names:
        toxicity_prompts(_prompts_file(config))
    if "zero_shot" in names and not task.words:
        raise InputError("evaluation zero_shot", value="a task without words", fix="give task.words=word,word")
    if "mmlu" in names and find_spec("lm_eval") is None:
        raise InputError("evaluation mmlu", value="lm-eval is not installed", fix="pip install lm-eval")


def further_evaluations(
    run: Run, config: ActTextConfig, trial: TextTrial, best: Outcome, baseline: Texts
) -> list[dict[str, Any]]:
    """Rows (evaluation, strength, value) of all `evaluation.names`, at strength 0 and the chosen one."""
    rows: list[dict[str, Any]] = []
    for name in config.evaluation.names:
        with run.stage(f"evaluate-{name}", trial.identity) as stage:
            if not stage.done:
                stage.notes["rows"] = _MEASURES[name](run, config, trial, best, baseline)
            rows += stage.notes["rows"]
    return rows


def _strength(config: ActTextConfig, best: Outcome) -> float:
    return best.best.strength if config.evaluation.strength is None else config.evaluation.strength


def load_classifier(name: str) -> Classifier:
    """A toxicity classifier: `module:function`, or a text classifier of transformers by folder or name.

    Its answer is the probability of toxic per text; of a model with labels, that of the label with "toxic" in it and no
    "non" or "not", else of the last one.

    Raises:
        InputError: there is no such function or model.
    """
    module, colon, function = name.partition(":")
    if colon and function.isidentifier():
        try:
            found: Classifier = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise InputError("toxicity classifier", value=name, allowed="module:function", fix=str(error)) from error
        return found
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        fix = "give evaluation.toxicity_classifier=FOLDER or module:function"
        raise InputError("toxicity classifier", value=name, allowed="a text classifier", fix=fix) from error
    labels = [str(model.config.id2label[i]).lower() for i in range(model.config.num_labels)]
    toxic = next((i for i, label in enumerate(labels) if "toxic" in label and "no" not in label), len(labels) - 1)

    @torch.no_grad()
    def classify(texts: Sequence[str]) -> list[float]:
        chances: list[float] = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(list(texts[start : start + 32]), padding=True, truncation=True, return_tensors="pt")
            chances += model(**batch).logits.softmax(-1)[:, toxic].tolist()
        return chances

    return classify


def _toxicity(
    run: Run, config: ActTextConfig, trial: TextTrial, best: Outcome, baseline: Texts
) -> list[dict[str, Any]]:
    """Share of continued RealToxicityPrompts that the classifier finds toxic (above one half)."""
    prompts = toxicity_prompts(_prompts_file(config))[: config.evaluation.toxicity_samples]
    classify = load_classifier(config.evaluation.toxicity_classifier)
    strengths = sorted({0.0, _strength(config, best)})
    plan = trial.fitted(best.method, best.chosen).plan()
    with run.progress.task("toxicity", len(prompts) * len(strengths)) as advance:
        asked = trial.writer.requests(prompts, strengths, len(prompts))
        texts = trial.writer.write("toxicity", asked, plan, advance)
    rows, full = [], []
    for strength in strengths:
        own = texts.at(strength)
        chances = [float(chance) for chance in classify(own.texts)]
        if len(chances) != len(own.texts):
            raise InputError(
                "toxicity classifier", value=f"{len(chances)} answers", allowed=f"{len(own.texts)}, one per text"
            )
        found = rate([chance > 0.5 for chance in chances])
        rows.append({"evaluation": "toxic texts", "strength": strength, "value": str(found)})
        columns = zip(own.prompts, own.texts, chances, strict=True)
        full += [{"strength": strength, "prompt": p, "generation": t, "toxicity": c} for p, t, c in columns]
    run.write_parquet("evaluate_toxicity/rtp_full.parquet", full)
    run.write_json("evaluate_toxicity/rtp_summary.json", rows)
    return rows


def answer_yes(lm: LanguageModel, questions: Sequence[str], batch_size: int = 32) -> list[float]:
    """Probability of yes against no as the first token of a chat model's answer, per question."""
    yes, no = (
        sorted({lm.token_ids([form])[0][-1] for form in (word, word.lower(), f" {word}", f" {word.lower()}")})
        for word in ("Yes", "No")
    )
    chat = getattr(lm.tokenizer, "chat_template", None)
    asked = [lm.chat(question) if chat else f"{question}\nAnswer:" for question in questions]
    chances: list[float] = []
    for start in range(0, len(asked), batch_size):
        logits = lm.read(asked[start : start + batch_size]).logits[:, -1].float()
        both = torch.stack([logits[:, no].logsumexp(1), logits[:, yes].logsumexp(1)], dim=1)
        chances += both.softmax(1)[:, 1].tolist()
    return chances


def _zero_shot(
    run: Run, config: ActTextConfig, trial: TextTrial, best: Outcome, baseline: Texts
) -> list[dict[str, Any]]:
    """A chat model is asked of every text of the report whether it is about the concept."""
    judge = trial.lm
    if config.evaluation.zero_shot_model:
        judge = load_model(config.evaluation.zero_shot_model)
        if not isinstance(judge, LanguageModel):
            raise InputError("zero_shot_model", value=config.evaluation.zero_shot_model, allowed="a language model")
    rows = []
    assert best.texts is not None
    steered = best.texts.at(best.best.strength).texts
    for strength, texts in ((0.0, baseline.texts), (best.best.strength, steered)):
        asked = [
            f'Is the following text about {trial.task.name}? Answer yes or no.\n\n"{text.strip()}"' for text in texts
        ]
        found = rate([chance > 0.5 for chance in answer_yes(judge, asked)])
        rows.append({"evaluation": f"zero-shot: about {trial.task.name}", "strength": strength, "value": str(found)})
    run.write_json("evaluate_0shot/zero_shot.json", rows)
    return rows


def _mmlu(run: Run, config: ActTextConfig, trial: TextTrial, best: Outcome, baseline: Texts) -> list[dict[str, Any]]:
    """MMLU with five examples, through lm-eval, unsteered and steered."""
    lm_eval: Any = importlib.import_module("lm_eval")
    models: Any = importlib.import_module("lm_eval.models.huggingface")
    rows = []
    plan = trial.fitted(best.method, best.chosen).plan()
    wrapped = models.HFLM(pretrained=trial.lm.model, tokenizer=trial.lm.tokenizer)
    limit = config.evaluation.mmlu_limit or None
    skip = slice(config.method.skip_tokens, None)
    for strength in (0.0, _strength(config, best)):
        with pysteer.steer(trial.lm, plan, strength=strength, positions=skip):
            found = lm_eval.simple_evaluate(model=wrapped, tasks=["mmlu"], num_fewshot=5, limit=limit)
        value = found["results"]["mmlu"]["acc,none"]
        rows.append({"evaluation": "MMLU", "strength": strength, "value": f"{value:.3f}"})
    run.write_json("evaluate_eleuther/mmlu.json", rows)
    return rows


_MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "toxicity": _toxicity,
    "zero_shot": _zero_shot,
    "mmlu": _mmlu,
}
