"""Patching activations: what is patched everywhere gives the target, what is patched nowhere gives the source."""

import pytest
import torch
from tiny_infinity import DEPTH, tiny_pipeline
from tiny_language import build

from pysteer.capture.generation import whole_run
from pysteer.capture.locate import Place, locate
from pysteer.capture.recovery import recovery
from pysteer.errors import InputError, PysteerError
from pysteer.models.language import LanguageModel
from pysteer.recipes import execute
from pysteer.zoo.shapes.captions import build_text_tokenizer

SOURCE = ["a red circle", "a small red star on a blue background", "a red cross"]
TARGET = ["a green circle", "a small green star on a blue background", "a green cross"]
SEEDS = [3, 4, 5]


def mean_of(out) -> torch.Tensor:
    """A score that tells any two pictures apart."""
    weights = torch.linspace(-1, 1, out.features[0].numel())
    return (out.features.flatten(1) * weights).sum(1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def run(pipe, places, **more):
    generate = lambda prompts, seeds: pipe(prompts, seeds=seeds, decode=False)  # noqa: E731
    return locate(pipe, SOURCE, TARGET, places, score=mean_of, seeds=SEEDS, generate=generate, **more)


def test_ends_are_the_plain_runs(pipe) -> None:
    found = run(pipe, [])
    torch.testing.assert_close(found.source, mean_of(pipe(SOURCE, seeds=SEEDS, decode=False)))
    torch.testing.assert_close(found.target, mean_of(pipe(TARGET, seeds=SEEDS, decode=False)))
    assert not torch.allclose(found.source, found.target)
    assert found.scores.shape == (0, 3)


def test_patching_all_there_is_gives_the_target(pipe) -> None:
    last = f"ca_block.{DEPTH - 1}"
    found = run(pipe, [Place((last, "pooled")), Place(("ca.0",), (0,)), Place((last,), ()), Place((last,), (0,))])
    torch.testing.assert_close(found.scores[0], found.target, rtol=1e-4, atol=1e-4)
    assert found.best() == found.scores.mean(1).argsort(descending=True).tolist()
    assert not torch.allclose(found.scores[3], found.source)


def test_places_share_batches_without_touching_each_other(pipe) -> None:
    places = [
        Place(("ca",)),
        Place(("ffn.0",), (1, 2)),
        Place(("text.output",)),
        Place(("pooled",)),
        Place(("sa",), (1,)),
    ]
    done = []
    together = run(pipe, places, progress=done.append)
    apart = run(pipe, places, batch_size=6, progress=done.append)
    # Batches of other sizes round otherwise, which may flip a bit of a picture.
    assert torch.isclose(together.scores, apart.scores, rtol=1e-3, atol=1e-3).float().mean() >= 0.8
    assert done == [5, 1, 1, 1, 1, 1]
    assert (together.scores - together.source).abs().sum(1).gt(0).sum() >= 4


def test_bad_input(pipe) -> None:
    with pytest.raises(InputError, match="unknown site: got 'cb'"):
        run(pipe, [Place(("cb",))])
    with pytest.raises(InputError, match="batch_size: got 5; allowed: at least 6"):
        run(pipe, [Place(("ca",))], batch_size=5)
    with pytest.raises(InputError, match="equal, above 0"):
        locate(pipe, SOURCE, TARGET[:2], [], score=mean_of, seeds=SEEDS)
    with pytest.raises(PysteerError, match="one number per prompt"):
        locate(pipe, SOURCE, TARGET, [], score=lambda out: torch.zeros(2), seeds=SEEDS)


def test_the_recipe_finds_where_colours_live(tmp_path) -> None:
    words = ["pairs=red->blue", "prompts=8", "sites=ca", "once=text.output", "batch_size=96"]
    folder, summary = execute("locate", words, out=tmp_path)
    assert summary.headline["red-to-blue"]["proposed"]["site"] == "ca"
    rows = {(row["site"], row["layers"], row["steps"]): row["value"] for row in summary.tables["places"]}
    assert rows["text.output", "-", "-"] >= 0.9
    assert rows["ca", "all", "all"] >= 0.9
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "figures/red-to-blue-step.png").is_file()


def language_model():
    return LanguageModel(build("llama"), build_text_tokenizer())


@pytest.mark.parametrize("other", ["red", "small red"], ids=["equal lengths", "padded"])
def test_patching_a_language_model(other: str) -> None:
    lm = language_model()
    source = [f"a {word} circle on a white background" for word in (other, "green")]
    target = [f"a {word} circle on a white background" for word in ("blue", "pink")]
    score = recovery(whole_run(lm), source, target, [0, 0])
    places = [Place(("embed",)), Place(("block",)), Place(("mlp.1",)), Place(("norm",))]
    found = locate(lm, source, target, places, score=score, seeds=[0, 0])
    torch.testing.assert_close(found.source, torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.target, torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.scores[3], torch.ones(2), atol=1e-4, rtol=0)  # behind the norm is only the head
    if other == "red":
        torch.testing.assert_close(found.scores[0], torch.ones(2), atol=1e-4, rtol=0)
    assert bool((found.scores[2].abs() > 1e-6).all())
    assert bool((found.scores[2] < 0.99).all())


def test_recovery_needs_pairs_that_differ(pipe) -> None:
    lm = language_model()
    with pytest.raises(InputError, match="different results"):
        recovery(whole_run(lm), ["a circle"], ["a circle"], [0])
    with pytest.raises(InputError, match="images or logits"):
        recovery(lambda prompts, seeds: torch.zeros(1), ["a"], ["b"], [0])
    score = recovery(whole_run(pipe), SOURCE, TARGET, SEEDS)
    torch.testing.assert_close(score(pipe(SOURCE, seeds=SEEDS)), torch.zeros(len(SOURCE)))
    torch.testing.assert_close(score(pipe(TARGET, seeds=SEEDS)), torch.ones(len(SOURCE)))


def test_the_recipe_on_a_language_model(tmp_path) -> None:
    lm = language_model()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "red.txt").write_text("a red circle\na small red square\n")
    (tmp_path / "blue.txt").write_text("a blue circle\na small blue square\n")
    files = [f"source={tmp_path / 'red.txt'}", f"target={tmp_path / 'blue.txt'}"]
    folder, summary = execute("locate", [f"model={tmp_path / 'model'}", *files], out=tmp_path)
    rows = {(row["site"], row["layers"], row["steps"]): row["value"] for row in summary.tables["places"]}
    assert rows["block", "2", "all"] == pytest.approx(1, abs=1e-3)
    assert set(summary.headline["source-to-target"]["proposed"]) >= {"site", "steps", "target_rate", "layer"}
    assert (folder / "figures/source-to-target-layer.png").is_file()
    with pytest.raises(InputError, match="line by line"):
        execute("locate", [f"model={tmp_path / 'model'}"], out=tmp_path / "other")
    with pytest.raises(InputError, match="both files"):
        execute("locate", [f"model={tmp_path / 'model'}", files[0]], out=tmp_path / "other")
