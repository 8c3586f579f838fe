"""The task `texts`: a sweep of a tiny language model by a method that is fitted to the lines of two files."""

import sys
from pathlib import Path

import pytest
import torch
from test_prefix import Words

import pysteer
from pysteer.models.language import LanguageModel
from pysteer.recipes.config import build_config
from pysteer.sweep import Options, plan_sweep, run_sweep
from pysteer.sweep.parameters import Fitter
from pysteer.sweep.prefix import scaled, steering
from pysteer.sweep.query import query
from pysteer.sweep.runs import noise_seed
from pysteer.sweep.store import Store
from pysteer.sweep.tasks import texts as task

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny_language

AXES = ("model", "prompt", "seed", "method", "source", "target", "site", "strength", "step")


@pytest.fixture
def lm(monkeypatch):
    made = LanguageModel(tiny_language.build("llama"), Words())
    monkeypatch.setattr(task, "load_model", lambda name: made)
    return made


def test_rows_of_a_fitted_method_are_the_texts_that_steering_alone_writes(lm, tmp_path):
    for name, lines in (("source", "1 2 3\n2 3 4\n3 4 5\n1 3 5"), ("target", "9 8 7\n8 7 6\n7 6 5\n9 7 5")):
        (tmp_path / name).write_text(lines)
    (tmp_path / "prompts").write_text("1 2\n4 5 6")
    words = [
        f"prompts={tmp_path / 'prompts'}", f"source={tmp_path / 'source'}", f"target={tmp_path / 'target'}",
        "model=tiny", "method=mean_difference", "site=block.0,block.1", "strength=0,2,40", "step=all,write",
        "max_new_tokens=6", "perplexity=false",
    ]  # fmt: skip
    plan, out = plan_sweep("texts", words, Options()), tmp_path / "out"
    Store(out).create(plan.mark(words))
    outcome = run_sweep(plan, out)
    assert (outcome.ran, outcome.failed) == (len(plan), 0) == (24, 0)
    names, found, damaged = query("select * from cells", [out])
    rows = [dict(zip(names, row, strict=True)) for row in found]
    assert (len(rows), damaged) == (24, [])
    engine, unsteered = task.TextsEngine(task.TextSetting(model="tiny", max_new_tokens=6), out, lm), {}
    for row in rows:
        setting = build_config(task.TextSetting, {name: row[name] for name in AXES} | {"max_new_tokens": 6})
        fit = task.request_of(setting, lm)
        steered = task._at(scaled(Fitter(lm, out).parameters(fit).plan(), row["strength"]), task._STEPS[row["step"]])
        seeds = [noise_seed(row["prompt"], 0)]
        with steering(engine.runs, [steered]):
            alone = lm.begin([row["prompt"]], seeds=seeds, max_new_tokens=6, temperature=0.0).write().texts()
        assert [row["text"]] == alone
        if row["strength"] == 0:
            unsteered[row["prompt"]] = row["text"]
    changed = [row["strength"] for row in rows if row["text"] != unsteered[row["prompt"]]]
    assert 40.0 in changed
    assert 0.0 not in changed


def test_methods_of_a_batch_run_their_examples_once(lm, tmp_path, monkeypatch):
    for name, lines in (("source", "1 2 3\n2 3 4\n3 4 5\n1 3 5"), ("target", "9 8 7\n8 7 6\n7 6 5\n9 7 5")):
        (tmp_path / name).write_text(lines)
    read, ran = LanguageModel.read, []

    def counted(self, texts, **given):
        ran.extend(texts)
        return read(self, texts, **given)

    monkeypatch.setattr(LanguageModel, "read", counted)
    texts = {"source": str(tmp_path / "source"), "target": str(tmp_path / "target"), "site": "block.1"}
    settings = [
        task.TextSetting(
            model="tiny", prompt="1 2", method=method, strength=4.0, max_new_tokens=3, perplexity=False, **texts
        )
        for method in (
            "mean_difference:pooled=true",
            "linear_act:pooled=false",
            "gaussian_transport:pooled=false",
            "aura",
        )
    ]
    engine = task.TextsEngine(settings[0], tmp_path / "out", lm)
    engine.generate(settings)
    assert len(ran) == 16  # the pooled methods once, those of tokens once
    assert engine.fitter._examples is None
    engine.generate(settings)
    assert len(ran) == 16
    for setting in settings:
        request = task.request_of(setting, lm)
        kept = Fitter(lm, tmp_path / "out").parameters(request)
        alone = pysteer.fit(
            lm, request.method, request.source, request.target, seeds=request.seeds, **request.options
        )  # fmt: skip
        for a, b in zip(kept.parameters, alone.parameters, strict=True):
            # What is pooled from tokens that are kept is added up in another order than what is pooled at once.
            assert all(torch.allclose(a.tensors[name], b.tensors[name], atol=1e-4) for name in a.tensors)
    other = task.TextsEngine(settings[0], tmp_path / "other", lm)
    ran.clear()
    other.fitter.parameters(task.request_of(settings[1], lm))  # tokens
    other.fitter.parameters(task.request_of(settings[0], lm))  # their means
    assert len(ran) == 8
