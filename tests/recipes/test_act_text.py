"""The recipe act-text on a tiny model: its stages and files, going on after an interruption, and what it refuses."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tiny_text import save_tiny_model, sentences

import pysteer
from pysteer.data.tasks import Task
from pysteer.errors import InputError
from pysteer.methods import GaussianTransport, LinearAcT, MeanDifference, create
from pysteer.metrics import Rate
from pysteer.metrics.perplexity import continuation_likelihood
from pysteer.models.language import LanguageModel
from pysteer.recipes.config import build_config, read_values
from pysteer.recipes.frame import execute
from pysteer.recipes.transport import text_trial
from pysteer.recipes.transport.evaluations import answer_yes, load_classifier
from pysteer.recipes.transport.places import expand_sites
from pysteer.recipes.transport.settings import METHODS, ActTextConfig, StrengthSettings
from pysteer.recipes.transport.text_trial import best_of, fit_texts, takes_moments
from pysteer.recipes.transport.texts import Score, Writer

SMALL = (
    "generation.num_sentences=9",
    "generation.new_seq_len=6",
    "generation.rows=8",
    "generation.top_p=1",
    "model.dtype=float32",
    "model.sites=block.1",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    about = {"none": sentences(20, "", 1), "football": sentences(20, "football", 2)}
    (folder / "task.json").write_text(json.dumps(about))
    (folder / "report.txt").write_text("once w1\nthere w2 w3\nthe w5")
    (folder / "search.txt").write_text("w7 once\nthe w9 w3")
    return folder


def start(place, out, *words, name="run", **more):
    own = (f"model.name={place}", f"task.path={place}/task.json", "task.words=football,stadium")
    prompts = (f"task.prompts={place}/report.txt", f"task.search_prompts={place}/search.txt")
    text = io.StringIO()
    console = Console(file=text, width=200)
    folder, summary = execute(
        "act-text", [*own, *prompts, *SMALL, *words], out=out, run_name=name, console=console, **more
    )
    return folder, summary, text.getvalue()


def rows_of(folder):
    with (folder / "generate_with_hooks" / "text_generation.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_range_of_strengths(place, tmp_path) -> None:
    folder, summary, _ = start(place, tmp_path, "strengths.min=0", "strengths.max=2", "strengths.steps=3")
    rows = rows_of(folder)
    assert list(rows[0]) == ["strength", "prompt", "generation"]
    assert [float(row["strength"]) for row in rows] == [0.0] * 9 + [1.0, 2.0] * 9
    assert {row["prompt"] for row in rows} == {"once w1", "there w2 w3", "the w5"}
    texts = {s: [row["generation"] for row in rows if float(row["strength"]) == s] for s in (0.0, 1.0, 2.0)}
    assert texts[0.0] != texts[1.0] != texts[2.0]
    table = summary.tables["methods"]
    assert [row["strength"] for row in table] == [1.0, 2.0]
    assert all(row["perplexity_ratio_low"] < row["perplexity_ratio"] < row["perplexity_ratio_high"] for row in table)
    assert summary.headline["unsteered"]["perplexity_ratio"] == 1.0
    report = (folder / "report.html").read_text()
    assert "linear act" in report
    assert "<script" not in report
    assert json.loads((folder / "summary.json").read_text())["best"]["method"] == "linear_act"


def test_a_search_takes_the_best_readable_setting_for_other_prompts(place, tmp_path) -> None:
    options = "method.options={prototype: {clusters: 2}, affine_transport: {rank: 2}}"
    search = ("search.sites=block.0,block.1+block.2", "search.strengths=0.5,1", "search.num_sentences=6")
    names = f"method.names={','.join(METHODS)}"
    folder, summary, _ = start(place, tmp_path, names, options, *search)
    assert {row["method"] for row in summary.tables["methods"]} == set(METHODS)
    assert len(summary.tables["search"]) == len(METHODS) * 2 * 2
    for name in METHODS:
        tried = [row for row in summary.tables["search"] if row["method"] == name]
        taken = next(row for row in summary.tables["methods"] if row["method"] == name)
        tops = []
        for where in sorted({row["place"] for row in tried}):
            there = [row for row in tried if row["place"] == where]
            fine = [row for row in there if row["perplexity_ratio"] <= 1.4]
            if fine:
                tops.append(max(fine, key=lambda row: row["strength"]))
            else:
                tops.append(min(there, key=lambda row: row["perplexity_ratio"]))
        fine = [row for row in tops if row["perplexity_ratio"] <= 1.4]
        if fine:
            best = max(fine, key=lambda row: (row["concept_rate"]["value"], -row["perplexity_ratio"]))
        else:
            best = min(tops, key=lambda row: row["perplexity_ratio"])
        assert (taken["place"], taken["strength"]) == (best["place"], best["strength"])
    searched = pq.read_table(next((folder / "generations").glob("search-prototype-*.parquet"))).to_pydict()
    assert set(searched["prompt"]) == {"w7 once", "the w9 w3"}
    assert (folder / "generate_with_hooks" / "aura" / "text_generation.csv").is_file()


def test_texts_of_a_report_belong_to_their_setting(place, tmp_path, monkeypatch) -> None:
    words = ("search.sites=block.1", "search.strengths=1,3", "search.num_sentences=4", "search.perplexity=100")
    own = "method.names=mean_difference"
    folder, summary, _ = start(place, tmp_path, own, *words)
    assert summary.best["strength"] == 3
    # As if another version of the rule had been at work: nothing in the configuration tells.
    monkeypatch.setattr(text_trial, "strongest", lambda found, limit: min(found, key=lambda score: score.strength))
    folder, summary, _ = start(place, tmp_path, own, *words)
    assert summary.best["strength"] == 1
    assert {float(row["strength"]) for row in rows_of(folder)} == {0.0, 1.0}


def test_interrupted_runs_go_on_where_they_stopped(place, tmp_path, monkeypatch) -> None:
    words = ("method.names=mean_difference,linear_act", "strengths.values=1", "generation.num_sentences=10")
    monkeypatch.setattr("pysteer.recipes.transport.texts._PART", 4)
    whole, _, _ = start(place, tmp_path / "a", *words)
    made = Writer._made
    for allowed in (2, 3, 99):  # parts before it is interrupted
        left = [allowed]

        def counted(self, *args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return made(self, *args)

        monkeypatch.setattr(Writer, "_made", counted)
        if allowed < 99:
            with pytest.raises(KeyboardInterrupt):
                start(place, tmp_path / "b", *words)
    again, _, _ = start(place, tmp_path / "b", *words)
    assert 99 - left[0] == 9 - 5  # nine parts in all, five of which were finished
    for name in ("mean_difference", "linear_act"):
        file = f"generate_with_hooks/{name}/text_generation.csv"
        assert (whole / file).read_text() == (again / file).read_text()


def test_a_second_task_never_mixes_with_the_first(place, tmp_path) -> None:
    start(place, tmp_path, "strengths.values=1")
    with pytest.raises(InputError, match="belongs to another run"):
        start(place, tmp_path, "strengths.values=1", "task.source=football", "task.target=none")
    changed = place.parent / "changed.json"
    about = json.loads((place / "task.json").read_text())
    about["football"][0] = "w1 w2 stadium"
    original = (place / "task.json").read_text()
    changed.write_text(json.dumps(about))
    try:  # the same file name with other sentences: fitted and generated anew
        (place / "task.json").write_text(changed.read_text())
        _, _, log = start(place, tmp_path, "strengths.values=1")
    finally:
        (place / "task.json").write_text(original)
    assert "fit-linear_act: started" in log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.name=no/such-model"], "model"),
        (["model.sites=blok.1"], "sites: got 'blok.1'"),
        (["strengths.values=0,high"], "strengths.values"),
        (["strengths.step=3"], "unknown key: got 'strengths.step'"),
        (["method.names=linear"], "did you mean linear_act"),
        (["method.names=linear_act,linear_act"], "each once"),
        (["method.options={linear_act: {suport: all}}"], "did you mean support"),
        (["method.options={aura: {}}"], "method.options"),
        (["evaluation.names=mmlu"], "lm-eval is not installed"),
        (["evaluation.names=toxicity"], "toxicity prompts"),
        (["tracking.wandb=offline"], "tracker wandb"),
        (["generation.top_p=0"], "generation"),
        (["task.words= "], "words of a concept"),
        (["model.name=infinity-shapes"], "a language model"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(place, tmp_path, words, message, monkeypatch) -> None:
    monkeypatch.setattr("pysteer.recipes.transport.trackers.find_spec", lambda name: None)
    monkeypatch.setattr("pysteer.recipes.transport.evaluations.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        start(place, tmp_path, *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def score(strength: float, value: float, ratio: float) -> Score:
    return Score(strength, Rate(value, 0, 1, 10), ratio, ratio, ratio, 5.0)


def test_the_best_setting_is_readable() -> None:
    found = [score(1, 0.3, 1.1), score(2, 0.6, 1.3), score(3, 0.6, 1.2), score(4, 0.9, 2.0)]
    assert best_of(found, 1.4).strength == 3
    assert best_of(found, 1.05).strength == 1
    assert best_of(found, 5.0).strength == 4


def test_strengths_are_those_of_linspace() -> None:
    assert StrengthSettings().all() == tuple(round(0.1 * i, 6) for i in range(11))
    assert StrengthSettings(values=(2.0, 0.0, 1.0, 1.0)).all() == (0.0, 1.0, 2.0)
    assert StrengthSettings(steps=1, max=0.7).all() == (0.7,)


def test_moments_give_what_kept_activations_give(place) -> None:
    lm = LanguageModel.from_pretrained(place)
    about = json.loads((place / "task.json").read_text())
    task = Task("own", about["none"], about["football"])
    assert takes_moments(MeanDifference())
    assert takes_moments(GaussianTransport())
    assert not takes_moments(GaussianTransport(support="1-99"))
    assert not takes_moments(LinearAcT())
    for method in (MeanDifference(), GaussianTransport()):
        got = fit_texts(lm, method, task, ["block.0", "mlp.2"], batch_size=7)
        kept = pysteer.fit(
            lm, method, task.source, task.target, sites=["block.0", "mlp.2"], paired=False, positions=slice(1, None)
        )
        for mine, theirs in zip(got.parameters, kept.parameters, strict=True):
            assert (mine.site, mine.steps) == (theirs.site, theirs.steps)
            for name, tensor in mine.tensors.items():
                torch.testing.assert_close(tensor, theirs.tensors[name], rtol=1e-4, atol=1e-5)


def test_incremental_fits_see_the_earlier_sites(place, tmp_path) -> None:
    words = ("strengths.values=1", "model.sites=block.0,block.1", "method.names=mean_difference")
    folders = {
        mode: start(place, tmp_path, *words, f"method.incremental={mode}", name=mode)[0] for mode in ("atonce", "incr")
    }
    first, second = (
        pysteer.capture.fitted.Fitted.from_pretrained(next((folder / "fits").iterdir())).parameters
        for folder in folders.values()
    )
    torch.testing.assert_close(first[0].tensors["bias"], second[0].tensors["bias"], rtol=1e-4, atol=1e-5)
    assert (first[1].tensors["bias"] - second[1].tensors["bias"]).abs().max() > 1e-2


def test_perplexity_is_that_of_the_formula(place) -> None:
    lm = LanguageModel.from_pretrained(place)
    prompts, new = [[5, 6], [7, 8, 9], [4]], [[10, 11, 12], [13], []]
    found = continuation_likelihood(lm, prompts, new, batch_size=2)
    for i, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        logits = lm.model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        expected = -sum(float(logits[len(prompt) + j - 1, token]) for j, token in enumerate(tokens))
        assert found.nats[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.tokens.tolist() == [3, 1, 0]
    low, high = found.ratio_interval(found)
    assert low <= 1 <= high
    with pytest.raises(InputError):
        continuation_likelihood(lm, [[]], [[3]])


def test_sites_are_named_as_published(place) -> None:
    known = pysteer.families.base.find_family(lm := LanguageModel.from_pretrained(place)).sites(lm)
    assert expand_sites(known, [r".*layernorm"]) == [
        f"model.layers.{i}.{kind}_layernorm" for i in range(3) for kind in ("input", "post_attention")
    ]
    assert expand_sites(known, ["block"]) == ["block.0", "block.1", "block.2"]
    assert expand_sites(known, ["mlp.1", "model.layers.1.mlp:0"]) == ["mlp.1"]
    assert len(expand_sites(known, [r"model.layers.[0-1]:[0-1]"])) == 2
    with pytest.raises(InputError, match="regular expression"):
        expand_sites(known, ["*norm"])


def exclaims(texts):
    return [float("w1" in text) for text in texts]


def test_toxicity_with_a_function_of_ones_own(place, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": {"text": f"once w{i}", "toxicity": 0.1}}) for i in range(6)))
    words = (
        "evaluation.names=toxicity,zero_shot",
        f"evaluation.toxicity_prompts={prompts}",
        f"evaluation.toxicity_classifier={__name__}:exclaims",
        "strengths.values=1",
    )
    folder, summary, _ = start(place, tmp_path / "out", *words)
    assert [(row["evaluation"], row["strength"]) for row in summary.tables["further"]] == [
        ("toxic texts", 0.0),
        ("toxic texts", 1.0),
        ("zero-shot: about football", 0.0),
        ("zero-shot: about football", 1.0),
    ]
    full = pq.read_table(folder / "evaluate_toxicity" / "rtp_full.parquet").to_pydict()
    assert len(full["toxicity"]) == 12
    assert all(c == float("w1" in t) for c, t in zip(full["toxicity"], full["generation"], strict=True))
    with pytest.raises(InputError, match="toxicity classifier"):
        load_classifier("json:no_such_function")


def test_answers_compare_yes_with_no(place) -> None:
    lm = LanguageModel.from_pretrained(place)
    chances = answer_yes(lm, ["once w1", "the w2 w3"])
    assert len(chances) == 2
    assert all(0 <= chance <= 1 for chance in chances)


def test_tensorboard_where_it_is_installed(place, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    folder, _, _ = start(place, tmp_path, "strengths.values=1", "tracking.tensorboard=true")
    assert any((folder / "tensorboard").iterdir())


def test_every_method_has_strengths_to_search() -> None:
    for name in METHODS:
        create(name)
    assert set(text_trial._STRENGTHS) <= set(METHODS)


@pytest.mark.parametrize("file", ["concepts.yaml", "cut.yaml"])
def test_configurations_of_the_examples_are_valid(file) -> None:
    config = build_config(ActTextConfig, read_values(Path(__file__).parents[2] / "examples/act-text" / file))
    assert config.search.sites
    # A map from what comes before a word is one of last tokens.
    assert not config.task.cut or config.method.position == "last"
    assert config.task.cut == (file == "cut.yaml")
