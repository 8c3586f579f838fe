"""Tasks: source and target texts that a map is learned from, and what to generate from and look for afterwards.

A task is a concept that ships, a data set on disk (toxicity, captions with a style, captions with something negated), a
pair of classes of the bundled generators, or the user's own files.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.capture.prompts import read_prompts
from pysteer.data.concepts import concept, concept_names, concept_sentences, openings
from pysteer.errors import InputError
from pysteer.methods.base import did_you_mean

DATASETS = ("toxicity", "coco_styles", "coco_concepts")


@dataclass(frozen=True)
class TaskSettings:
    """What is to be learned from.

    Attributes:
        name: football, food, music, weather, happy or giraffe (sentences that ship), toxicity, coco_styles,
            coco_concepts, a pair of classes of the bundled generators such as circle->square, or `own`.
        path: own file with both classes: .json (label -> list, or objects with text and label), .jsonl, .csv or .tsv
            with the columns text and label; for toxicity the Jigsaw table, for captions the COCO file.
        source_path: own file with the source texts alone, in place of `path`.
        target_path: own file with the target texts alone.
        source: label of the source texts; they are what the map starts from.
        target: label of the target texts.
        words: words that tell that a generated text is about the target; those of the concept when empty.
        prompts: file with what to generate from; neutral openings, or the source texts of an image task, when empty.
        search_prompts: file with prompts for the search; other neutral openings when empty.
        samples: texts per class, drawn with the seed; 0 takes all.
        balance: true drops the surplus of the larger class, false keeps it; unset, unequal classes are an error.
        styles: file with style -> words that are added to a caption (task coco_styles), the bundled ones when empty.
        cut: target texts end right before a word of `words`, source texts anywhere; for fits on the last token
            (method.position=last), which then tell what comes before a word of the concept.
    """

    name: str = "football"
    path: Path | None = None
    source_path: Path | None = None
    target_path: Path | None = None
    source: str = ""
    target: str = ""
    words: tuple[str, ...] = ()
    prompts: Path | None = None
    search_prompts: Path | None = None
    samples: int = 0
    balance: bool | None = None
    styles: Path | None = None
    cut: bool = False


@dataclass(frozen=True)
class Task:
    """What `load_task` found.

    Attributes:
        name: its name.
        source: texts the map starts from.
        target: texts it leads to.
        paired: text i of both belongs together.
        words: a generated text that holds one of them is about the target; may be empty.
        prompts: what to generate from.
        search_prompts: what to search settings on; none of `prompts`.
        pair: the two classes, for a task of the bundled generators.
    """

    name: str
    source: list[str]
    target: list[str]
    paired: bool = False
    words: tuple[str, ...] = ()
    prompts: list[str] = field(default_factory=list)
    search_prompts: list[str] = field(default_factory=list)
    pair: tuple[str, str] | None = None


def data_folder() -> Path:
    """Where downloaded data sets are: $PYSTEER_DATA, else $DATA_DIR, else `data` in the working folder."""
    return Path(os.environ.get("PYSTEER_DATA") or os.environ.get("DATA_DIR") or "data")


def load_task(settings: TaskSettings, seed: int = 0) -> Task:
    """Read what the settings name.

    Raises:
        InputError: an unknown task or label, a missing file, one class only, an empty text, unequal classes.
    """
    name = settings.name.strip()
    own = settings.path or settings.source_path or settings.target_path
    if "->" in name:
        task = _shapes(name, settings, seed)
    elif name in DATASETS:
        task = _READERS[name](settings)
    elif own:
        task = _own(name, settings)
    elif name in concept_names() or name == "giraffes":
        task = _concept("giraffe" if name == "giraffes" else name)
    else:
        allowed = [*concept_names(), *DATASETS, "SHAPE->SHAPE", "COLOUR->COLOUR"]
        fix = did_you_mean(name, allowed) or "give task.path=FILE for your own sentences"
        raise InputError("task", value=name, allowed=", ".join(allowed), fix=fix)
    task = _with_prompts(_chosen(task, settings, seed), settings)
    if settings.cut:
        from pysteer.data.cuts import cut_before_words

        task = cut_before_words(task, seed)
    return task


def _concept(name: str) -> Task:
    neutral, about = concept_sentences(name)
    return Task(name, neutral, about, words=concept(name).words)


def _own(name: str, settings: TaskSettings) -> Task:
    if settings.path is not None:
        if settings.source_path or settings.target_path:
            raise InputError("task.path", value="with source_path or target_path", allowed="one way of the two")
        found = read_prompts(settings.path)
        source, target = _two_classes(settings.path, found.texts, found.labels, settings)
    elif settings.source_path is None or settings.target_path is None:
        missing = "target_path" if settings.target_path is None else "source_path"
        raise InputError(
            "task with one class only", value=f"no task.{missing}", fix=f"give task.{missing}=FILE as well"
        )
    else:
        source, target = read_prompts(settings.source_path).texts, read_prompts(settings.target_path).texts
    words = settings.words or (concept(name).words if name in concept_names() else ())
    return Task(name, source, target, words=words)


def _two_classes(
    path: Path, texts: Sequence[str], labels: Sequence[str], settings: TaskSettings
) -> tuple[list[str], list[str]]:
    """The texts of the source and of the target label; without labels in the settings, the file's two in order."""
    known = list(dict.fromkeys(labels))
    if len(known) < 2:
        raise InputError(
            f"task file {path.name} holds one class only",
            value=known[0] or "no labels",
            allowed="texts of two labels, source and target",
            fix="add the other class, or give task.source_path and task.target_path",
        )
    if not settings.source and not settings.target and len(known) > 2:
        shown = ", ".join(known[:8])
        raise InputError("classes of the task file", value=shown, fix="give task.source=LABEL and task.target=LABEL")
    source = settings.source or next(label for label in known if label != settings.target)
    target = settings.target or next(label for label in known if label != source)
    for what, label in (("source", source), ("target", target)):
        if label not in known:
            fix = did_you_mean(label, known)
            raise InputError(f"task.{what}", value=label, allowed=", ".join(known[:12]), fix=fix)
    if source == target:
        raise InputError("task.source and task.target", value=source, allowed="two different labels")
    own: tuple[list[str], ...] = ([], [])
    for text, label in zip(texts, labels, strict=True):
        if label in (source, target):
            own[label == target].append(text)
    return own[0], own[1]


def _file(given: Path | None, *inside: str, fetch: str) -> Path:
    path = given or data_folder().joinpath(*inside)
    if not path.is_file():
        raise InputError("data of the task", value=str(path), fix=f"pysteer data get {fetch}, or give task.path=FILE")
    return path


def _toxicity(settings: TaskSettings) -> Task:
    """Comments of the Jigsaw table: source `toxic`, target `non-toxic`, or another of its columns."""
    path = _file(settings.path, "jigsaw", "train.csv", fetch="jigsaw")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        columns = list(rows.fieldnames or [])
        kinds = [column for column in columns if column not in ("id", "comment_text")]
        source = (settings.source or "toxic").replace("-", "_")
        target = settings.target or "non-toxic"
        if "comment_text" not in columns or source not in kinds:
            raise InputError(
                f"columns of {path.name}",
                value=", ".join(columns),
                allowed=f"id, comment_text, {source}, as Jigsaw has them",
            )
        if target != "non-toxic":
            raise InputError("task.target", value=target, allowed="non-toxic")
        bad, good = [], []
        for row in rows:
            text = " ".join((row["comment_text"] or "").split())
            if text and row[source] == "1":
                bad.append(text)
            elif text and all(row[kind] == "0" for kind in kinds):
                good.append(text)
    if not bad or not good:
        value = f"{len(bad)} toxic and {len(good)} not"
        raise InputError(f"task file {path.name} holds one class only", value=value, allowed="comments of both")
    return Task("toxicity", bad, good)


def _captions(settings: TaskSettings) -> list[str]:
    path = _file(settings.path, "coco", "annotations", "captions_train2017.json", fetch="coco")
    content = files.read_json(path, "COCO captions")
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("caption"), str) for e in entries
    ):
        raise InputError("COCO captions", value=str(path), allowed='{"annotations": [{"caption": "..."}]}')
    first: dict[Any, str] = {}  # one caption per picture
    for entry in entries:
        text = " ".join(entry["caption"].split())
        if text:
            first.setdefault(entry.get("image_id", len(first)), text)
    if not first:
        raise InputError("COCO captions", value=str(path), allowed="at least one caption")
    return list(first.values())


def _styles(settings: TaskSettings) -> Task:
    """Captions, and the same with the words of a style behind them."""
    path = settings.styles or Path(__file__).parent / "styles.json"
    known = files.read_json(path, "styles")
    if not isinstance(known, dict) or not all(isinstance(words, str) for words in known.values()):
        raise InputError("styles", value=str(path), allowed='{"style": "words", ...}')
    texts = _captions(settings)
    sides = []
    for what, style in (("source", settings.source or "none"), ("target", settings.target or "art_nouveau")):
        if style not in known and style != "none":
            raise InputError(f"task.{what}", value=style, allowed=", ".join(known), fix=did_you_mean(style, known))
        words = known.get(style, "").replace("_", " ").strip()
        plain = [text.rstrip(". ") for text in texts]
        sides.append([f"{text}, {words}" if words else text for text in plain])
    return Task("coco_styles", sides[0], sides[1], paired=True, prompts=sides[0])


NEGATIONS = ("There is no {}.", "A {} cannot be seen anywhere.", "Without any {}.", "It does not contain a {}.")


def _negated(settings: TaskSettings) -> Task:
    """Captions in which something is negated, which generators draw all the same, and the captions alone."""
    texts = _captions(settings)
    thing = (settings.source or "pink_elephant").replace("_", " ")
    if (settings.target or "none") != "none":
        raise InputError("task.target", value=settings.target, allowed="none: the caption alone")
    source = [f"{text.rstrip('. ')}. {NEGATIONS[i % len(NEGATIONS)].format(thing)}" for i, text in enumerate(texts)]
    return Task("coco_concepts", source, texts, paired=True, prompts=source)


_READERS: dict[str, Callable[[TaskSettings], Task]] = {
    "toxicity": _toxicity,
    "coco_styles": _styles,
    "coco_concepts": _negated,
}


def _shapes(name: str, settings: TaskSettings, seed: int) -> Task:
    """Captions of the bundled generators in pairs that differ in one word; what is reported on is not fitted on."""
    from pysteer.zoo.shapes.captions import COLOURS, SHAPES, sample_pairs

    source, _, target = (part.strip() for part in name.partition("->"))
    attribute = next(
        (kind for kind, known in (("shape", SHAPES), ("colour", COLOURS)) if source in known and target in known), ""
    )
    if not attribute or source == target:
        allowed = f"two of {', '.join(SHAPES)}, or two of {', '.join(COLOURS)}"
        raise InputError("task", value=name, allowed=allowed)
    count = settings.samples or 192
    drawn = sample_pairs(count + 256, attribute, source, target, seed=seed)
    captions = [(first.caption, second.caption) for first, second in drawn]
    fit = captions[:count]
    return Task(
        f"{source}-to-{target}",
        [first for first, _ in fit],
        [second for _, second in fit],
        paired=True,
        prompts=[first for first, _ in captions[count : count + 192]],
        search_prompts=[first for first, _ in captions[count + 192 :]],
        pair=(source, target),
    )


def _chosen(task: Task, settings: TaskSettings, seed: int) -> Task:
    """The texts that enter the fit: as many as asked for, as many of each class unless that is not wanted."""
    for what, texts in (("source", task.source), ("target", task.target)):
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise InputError(
                    f"{what} text {number} of task {task.name}", value=text, allowed="a text that is not empty"
                )
    counts = (len(task.source), len(task.target))
    balance = True if settings.balance is None and (task.name == "toxicity" or settings.samples) else settings.balance
    if counts[0] != counts[1] and balance is None:
        raise InputError(
            f"numbers of source and target texts of task {task.name}",
            value=f"{counts[0]} and {counts[1]}",
            allowed="equal numbers",
            fix="task.balance=true drops the surplus, task.balance=false keeps it",
        )
    if settings.samples and settings.samples > min(counts):
        raise InputError("task.samples", value=settings.samples, allowed=f"at most {min(counts)}, which there are")
    size = settings.samples or (min(counts) if balance else 0)
    if not size or counts == (size, size):
        return task
    order = [_order(count, seed, task.paired or i) for i, count in enumerate(counts)]
    source = [task.source[i] for i in order[0][:size]]
    target = [task.target[i] for i in order[1][:size]]
    rest = [task.source[i] for i in order[0][size:]] if task.prompts == task.source else task.prompts
    return Task(
        task.name, source, target, task.paired, task.words, rest or task.prompts, task.search_prompts, task.pair
    )


def _order(count: int, seed: int, key: object) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {key}").shuffle(order)
    return order


def _with_prompts(task: Task, settings: TaskSettings) -> Task:
    """With prompts to generate from, those of the settings first."""
    report = _prompts(settings.prompts) if settings.prompts else task.prompts or openings("report")
    search = _prompts(settings.search_prompts) if settings.search_prompts else task.search_prompts or openings("search")
    return Task(
        task.name, task.source, task.target, task.paired, settings.words or task.words, report, search, task.pair
    )


def _prompts(path: Path) -> list[str]:
    """Prompts of a file; that of RealToxicityPrompts has them inside objects."""
    if path.suffix == ".jsonl" and path.is_file():
        first = path.read_text(encoding="utf-8").lstrip()[:100_000].split("\n", 1)[0]
        try:
            entry = json.loads(first)
        except json.JSONDecodeError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), dict):
            return toxicity_prompts(path)
    return read_prompts(path).texts


def toxicity_prompts(path: Path) -> list[str]:
    """The prompts of RealToxicityPrompts (`prompts.jsonl`): lines `{"prompt": {"text": ...}, ...}`.

    Raises:
        InputError: the file is missing or of another format.
    """
    if not path.is_file():
        raise InputError("toxicity prompts", value=str(path), fix="pysteer data get rtp, or give the file")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(str(json.loads(line)["prompt"]["text"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                allowed = '{"prompt": {"text": "..."}}'
                raise InputError(f"line {number} of {path.name}", value=line[:60], allowed=allowed) from error
    if not found:
        raise InputError("toxicity prompts", value=str(path), allowed="at least one prompt")
    return found
