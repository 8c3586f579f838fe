"""One task on one language model: fits, a search of sites and strengths, texts over strengths, and their scores."""

from __future__ import annotations

import shutil
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pysteer
from pysteer.capture.fit_stored import fit_stored
from pysteer.capture.fitted import Fitted
from pysteer.capture.stream import capture_moments, fingerprint
from pysteer.capture.taps import choose_sites
from pysteer.data.tasks import Task
from pysteer.errors import InputError
from pysteer.families.base import find_family
from pysteer.methods import REGISTRY, Method, create
from pysteer.methods.base import did_you_mean
from pysteer.models.language import LanguageModel
from pysteer.recipes.config import Word, config_hash, convert
from pysteer.recipes.frame import Run
from pysteer.recipes.progress import Advance
from pysteer.recipes.transport.decoder import RowDecoder
from pysteer.recipes.transport.places import expand_sites
from pysteer.recipes.transport.sampling import Sampling
from pysteer.recipes.transport.settings import ActTextConfig
from pysteer.recipes.transport.texts import Score, Texts, Writer, scores
from pysteer.steering.positions import Positions

# Maps that only damp, and maps of tokens, want other strengths than a shift of the mean.
_STRENGTHS = {
    "mean_difference": (0.75, 1.0, 1.5, 2.0),
    "gaussian_transport": (0.75, 1.0, 1.5, 2.0),
    "linear_act": (0.75, 1.0, 1.5, 2.0),
    "aura": (0.5, 1.0, 2.0, 4.0),
}
_OTHER_STRENGTHS = (0.5, 1.0, 1.5, 2.0)


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method with options as they were given on the command line.

    Raises:
        InputError: no such method or option.
    """
    if name not in REGISTRY:
        raise InputError("method", value=name, allowed=", ".join(sorted(REGISTRY)), fix=did_you_mean(name, REGISTRY))
    hints = typing.get_type_hints(REGISTRY[name])
    given = {
        key: convert(Word(value) if isinstance(value, str) else value, hints[key], f"method.options.{name}.{key}")
        if key in hints
        else value
        for key, value in options.items()
    }
    return create(name, **given)


def takes_moments(method: Method) -> bool:
    """Whether a method is fitted from means and variances alone, so that no response is kept."""
    return type(method).fit_moments is not Method.fit_moments and getattr(method, "support", "all") in ("all", "0-100")


def fit_texts(
    lm: LanguageModel,
    method: Method,
    task: Task,
    sites: Sequence[str],
    *,
    sequential: bool = False,
    positions: Positions = slice(1, None),
    batch_size: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Fitted:
    """Fit a method on the texts of a task.

    Memory at once: `64 D` bytes per site for methods of moments (mean, Gaussian), whatever the number of texts; `4 n D`
    for methods that pool n texts (the sorted transport); `4 n L D` for methods of tokens. Sequentially one site is held
    at a time, and every text runs once.
    """
    if sequential or not takes_moments(method):
        return pysteer.fit(
            lm,
            method,
            task.source,
            task.target,
            sites=list(sites),
            sequential=sequential,
            paired=task.paired and not method.pooled,
            positions=positions,
            batch_size=batch_size,
            fit_seed=seed,
            progress=progress,
        )
    pool = "mean" if method.pooled else "tokens"
    source, target = (
        capture_moments(lm, texts, sites=list(sites), pool=pool, positions=positions, batch_size=batch_size)
        for texts in (task.source, task.target)
    )
    return fit_stored(method, source, target, fit_seed=seed, progress=progress)


@dataclass(frozen=True)
class Place:
    """Sites that are steered together, and the name of the choice."""

    label: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A method at a place, with the scores of its strengths."""

    method: str
    place: Place
    scores: list[Score]


@dataclass(frozen=True)
class Outcome:
    """What one method came to.

    Attributes:
        method: its name.
        searched: all places and strengths that were tried, on the prompts of the search.
        chosen: the place that was taken.
        texts: those of the report, unsteered ones not included; None where only the search was run.
        scores: of the report, by strength; of the search where only that was run.
        best: strength with the highest concept rate among those whose perplexity stays below the bar, else the one with
            the lowest perplexity.
    """

    method: str
    searched: list[Setting]
    chosen: Place
    texts: Texts | None
    scores: list[Score]
    best: Score


def best_of(found: Sequence[Score], limit: float) -> Score:
    """The score with the highest concept rate among those with a perplexity ratio of at most `limit`.

    Of equal rates the one with the lower perplexity; when none stays below the limit, the one with the lowest.
    """
    readable = [score for score in found if score.ratio <= limit]
    if not readable:
        return min(found, key=lambda score: score.ratio)
    # A rate that was not measured is NaN, which must not win.
    return max(readable, key=lambda s: (s.concept.value if s.concept.total else 0.0, -s.ratio))


def strongest(found: Sequence[Score], limit: float) -> Score:
    """The strongest score with a perplexity ratio of at most `limit`; the one with the lowest ratio when there is none.

    From a few dozen texts the strength with the highest rate is mostly luck, while rates rise with the strength until
    the text breaks, which the perplexity tells.
    """
    readable = [score for score in found if score.ratio <= limit]
    return max(readable, key=lambda s: s.strength) if readable else min(found, key=lambda score: score.ratio)


class TextTrial:
    """All stages of one run of `act-text`.

    Args:
        run: the run.
        config: its configuration.
        lm: the model.
        task: what to learn.
    """

    def __init__(self, run: Run, config: ActTextConfig, lm: LanguageModel, task: Task) -> None:
        self.run, self.config, self.lm, self.task = run, config, lm, task
        self.family = find_family(lm)
        self.methods = {name: make_method(name, config.method.options.get(name, {})) for name in config.method.names}
        self.places = self._places()
        known = self.family.sites(lm)
        sites = [known[name] for name in dict.fromkeys(name for place in self.places for name in place.sites)]
        texts = config_hash(task.source, task.target, task.prompts, task.search_prompts)
        model = [fingerprint(lm, sites), str(next(lm.model.parameters()).dtype)]
        self.identity = [model, texts]
        decoder = RowDecoder(
            lm,
            rows=config.generation.rows,
            max_new_tokens=config.generation.new_seq_len,
            sampling=Sampling(
                config.generation.temperature, config.generation.top_p, config.generation.repetition_penalty
            ),
            skip=config.method.skip_tokens,
            position=config.method.position,
            steered_new=config.method.steered_new,
        )
        self.writer = Writer(run, lm, decoder, model, texts)

    def _places(self) -> list[Place]:
        known = self.family.sites(self.lm)
        wanted = self.config.search.sites or ("+".join(self.config.model.sites or default_sites(self.lm)),)
        found = []
        for label in wanted:
            names = [site.name for site in choose_sites(self.family, self.lm, expand_sites(known, label.split("+")))]
            found.append(Place(label, tuple(names)))
        return found

    @property
    def searching(self) -> bool:
        return bool(self.config.search.sites)

    def strengths(self, method: str) -> tuple[float, ...]:
        """What is tried of a method in the search."""
        return self.config.search.strengths or _STRENGTHS.get(method, _OTHER_STRENGTHS)

    @property
    def planned(self) -> int:
        """Texts that are going to be generated."""
        config, methods = self.config, len(self.methods)
        if not self.searching:
            return config.generation.num_sentences * (1 + methods * len(self._steered_strengths()))
        tried = sum(len(self.strengths(name)) for name in self.methods) * len(self.places)
        reported = 1 if config.search.report == "best" else methods
        searched = config.search.num_sentences * tried + self._baseline_texts
        return searched + config.generation.num_sentences * (1 + reported)

    @property
    def _baseline_texts(self) -> int:
        """Unsteered texts of the search: every ratio is held against them, so there are as many as a place has."""
        return self.config.search.num_sentences * max(len(self.strengths(name)) for name in self.methods)

    def _steered_strengths(self) -> list[float]:
        return [strength for strength in self.config.strengths.all() if strength != 0]

    def fitted(self, name: str, place: Place) -> Fitted:
        """The method fitted at a place: at once at all places together, or sequentially for this one."""
        sequential = self.config.method.incremental == "incr"
        key = f"{name}-{config_hash(place.sites)[:8]}" if sequential else name
        sites = place.sites if sequential else tuple(dict.fromkeys(s for each in self.places for s in each.sites))
        folder = self.run.path(f"fits/{key}")
        with self.run.stage(f"fit-{key}", self.identity) as stage:
            if not stage.done or not folder.is_dir():
                self._fit(self.methods[name], sites, sequential, folder)
        return Fitted.from_pretrained(folder).select(place.sites)

    def _fit(self, method: Method, sites: Sequence[str], sequential: bool, folder: Path) -> None:
        settings = self.config.method
        skipped: Any = slice(settings.skip_tokens, None) if settings.skip_tokens else "all"
        with self.run.progress.follow(f"fitting {method.name}", len(sites)) as show:
            fitted = fit_texts(
                self.lm,
                method,
                self.task,
                sites,
                sequential=sequential,
                positions="last" if settings.position == "last" else skipped,
                batch_size=settings.batch_size,
                seed=self.run.seed,
                progress=show,
            )
        shutil.rmtree(folder, ignore_errors=True)
        fitted.save_pretrained(folder)

    def unsteered(self, use: str, advance: Advance) -> Texts:
        """The model's own texts for the prompts of the "search" or of the "report"."""
        count = self._baseline_texts if use == "search" else self.config.generation.num_sentences
        prompts = self.task.search_prompts if use == "search" else self.task.prompts
        return self.writer.unsteered(f"unsteered-{use}-{count}", self.writer.requests(prompts, [0.0], count), advance)

    def search(self, name: str, baseline: Texts, advance: Advance) -> list[Setting]:
        """Every place and strength of a method, on the prompts of the search."""
        found = []
        strengths = self.strengths(name)
        asked = self.writer.requests(self.task.search_prompts, strengths, self.config.search.num_sentences)
        for place in self.places:
            plan = self.fitted(name, place).plan()
            texts = self.writer.write(f"search-{name}-{config_hash(place.sites)[:8]}", asked, plan, advance)
            found.append(Setting(name, place, scores(texts, baseline, self.task.words)))
        return found

    def top(self, searched: Sequence[Setting]) -> tuple[Setting, Score]:
        """The setting that a search takes, and its score there."""
        limit = self.config.search.perplexity
        tops = [(strongest(setting.scores, limit), setting) for setting in searched]
        top = best_of([score for score, _ in tops], limit)
        return next(setting for score, setting in tops if score is top), top

    def outcomes(self, advance: Advance) -> tuple[Texts, Score | None, list[Outcome]]:
        """Everything: the model's own texts for the report, their score in the search, and what each method came to."""
        if not self.searching:
            baseline = self.unsteered("report", advance)
            return baseline, None, [self.outcome(name, [], baseline, advance) for name in self.methods]
        own = self.unsteered("search", advance)
        searched = {name: self.search(name, own, advance) for name in self.methods}
        baseline = self.unsteered("report", advance)
        reported = set(self.methods)
        if self.config.search.report == "best":
            reported = {self.top([setting for found in searched.values() for setting in found])[0].method}
        found = [
            self.outcome(name, tried, baseline, advance) if name in reported else self.searched_only(name, tried)
            for name, tried in searched.items()
        ]
        return baseline, scores(own, own, self.task.words)[0], found

    def searched_only(self, name: str, searched: list[Setting]) -> Outcome:
        """What a method came to on the prompts of the search, without texts of the report."""
        setting, top = self.top(searched)
        return Outcome(name, searched, setting.place, None, [top], top)

    def outcome(self, name: str, searched: list[Setting], baseline: Texts, advance: Advance) -> Outcome:
        """The texts and scores of the report for one method."""
        place, strengths = self.places[0], self._steered_strengths()
        if searched:
            setting, top = self.top(searched)
            place, strengths = setting.place, [top.strength]
        plan = self.fitted(name, place).plan()
        asked = self.writer.requests(self.task.prompts, strengths, self.config.generation.num_sentences)
        # The setting is part of the name: what a search takes is not told by the configuration alone.
        key = f"report-{name}-{config_hash(place.sites, strengths)[:8]}"
        texts = self.writer.write(key, asked, plan, advance)
        found = scores(texts, baseline, self.task.words)
        best = best_of(found, self.config.evaluation.perplexity_bar)
        return Outcome(name, searched, place, texts, found, best)


_DEFAULT_SITES = {
    "gpt2": (r".+ln_.+",),
    "gemma2": (r".*post_attention_layernorm", r".*post_feedforward_layernorm"),
    "gemma3_text": (r".*post_attention_layernorm", r".*post_feedforward_layernorm"),
}


def default_sites(lm: LanguageModel) -> tuple[str, ...]:
    """The sites AcT uses for a kind of model; the layer norms where it names none."""
    return _DEFAULT_SITES.get(str(lm.model.config.model_type), (r".*layernorm",))
