"""The whole recipe on a small generator with random weights and a judge that reads pixels."""

import io
import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tiny_infinity import tiny_pipeline

from pysteer.errors import InputError
from pysteer.recipes import infinity_prototype as module
from pysteer.recipes.frame import execute
from pysteer.recipes.prototype.generator import Generator, load_generator, model_size, weights_mark
from pysteer.recipes.prototype.judge import Judgement
from pysteer.recipes.setup_file import ScaleSetup, Setup, write_setup

SMALL = (
    "prompts=12", "dose_prompts=6", "other_prompts=6", "fit_pairs=8", "clusters=3", "batch_size=8",
    "strengths=0,1,2", "sheet_images=4",
)  # fmt: skip


class PixelJudge:
    """Labels by the mean of a channel, features by coarse pixels."""

    def __call__(self, images):
        pixels = images.float()
        bright = pixels[..., 0].mean((1, 2)) > pixels[..., 1].mean((1, 2))
        shape = ["square" if bit else "circle" for bit in bright]
        colour = ["red" if bit else "blue" for bit in pixels[..., 2].mean((1, 2)) > 127]
        return Judgement({"shape": shape, "colour": colour, "background": ["none"] * len(shape)}, pixels.flatten(1))


@pytest.fixture
def generator(monkeypatch):
    pipe = tiny_pipeline()
    made = Generator(pipe, {}, {"model": "tiny"}, model_size(pipe))
    monkeypatch.setattr(module, "load_generator", lambda infinity, device: made)
    monkeypatch.setattr(module, "find_judge", lambda config, pair: PixelJudge())
    return made


def start(tmp_path, *words, name="run", **options):
    out = io.StringIO()
    console = Console(file=out, width=200)
    folder, summary = execute(
        "infinity-prototype", [*SMALL, *words], out=tmp_path / "results", run_name=name, console=console, **options
    )
    return folder, summary, out.getvalue()


def rows_of(folder):
    return pq.read_table(folder / "metrics.parquet").to_pylist()


def test_a_run_leaves_everything_and_continues(tmp_path, generator):
    before = {key: value.clone() for key, value in generator.pipe.transformer.state_dict().items()}
    folder, summary, log = start(tmp_path, "pairs=red->blue", "gate=false")
    settings = {"baseline", "swap", "text", "visual", "mean_ffn", "random_text", "shuffled_text", "random_visual",
                "shuffled_visual"}  # fmt: skip
    assert settings < {path.stem for path in (folder / "images" / "red-to-blue").glob("*.png")}
    assert (folder / "figures" / "red-to-blue-dose-response.png").is_file()
    assert summary.headline["red-to-blue"]["strength_0_identical"] == {"text": True, "visual": True}
    rows = rows_of(folder)
    assert {row["setting"] for row in rows if row["part"] == "headline"} == settings
    assert {row["strength"] for row in rows if row["part"] == "dose"} == {2.0}
    planned = int(re.search(r"(\d+) images for red", log)[1])
    assert summary.headline["images"]["generated"] == planned
    assert json.loads((folder / "summary.json").read_text())["best"]["pair"] == "red-to-blue"
    html = (folder / "report.html").read_text()
    assert "red to blue" in html
    assert "<script" not in html
    images = folder / "images" / "red-to-blue"
    assert (images / "visual.png").read_bytes() != (images / "baseline.png").read_bytes()
    after = generator.pipe.transformer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

    called = []
    generator.pipe.__class__.__call__, original = (
        lambda self, *args, **kwargs: called.append(1),
        generator.pipe.__class__.__call__,
    )
    try:
        again = start(tmp_path, "pairs=red->blue", "gate=false")
    finally:
        generator.pipe.__class__.__call__ = original
    assert not called
    assert rows_of(folder) == rows
    assert again[1].best == summary.best


def test_same_seed_same_images_and_another_seed_others(tmp_path, generator):
    words = ("pairs=red->blue", "controls=false", "steering_type=VISUAL", "gate=false")
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder, _, _ = start(tmp_path, *words, f"seed={seed}", name=name)
        files.append({path.name: path.read_bytes() for path in (folder / "images").rglob("*.png")})
    assert files[0] == files[1]
    assert files[0]["visual.png"] != files[2]["visual.png"]
    assert files[0]["visual.png"] != files[0]["baseline.png"]


def test_gate_leaves_closed_prompts_alone(tmp_path, generator, monkeypatch):
    class Closed:
        @classmethod
        def fit(cls, source, others, threshold):
            return lambda pooled: (torch.arange(len(pooled)) % 2).float()

    monkeypatch.setattr("pysteer.recipes.prototype.experiment.RowGate", Closed)
    folder, _, _ = start(tmp_path, "pairs=red->blue", "controls=false", "steering_type=VISUAL", "strength=3")
    from PIL import Image

    sheets = [Image.open(folder / "images" / "red-to-blue" / f"{key}.png") for key in ("baseline", "visual")]
    base, steered = (torch.tensor(list(sheet.tobytes())).view(4, 12, 4, 3).transpose(0, 1) for sheet in sheets)
    same = [bool(torch.equal(a, b)) for a, b in zip(base, steered, strict=True)]
    assert all(same[0::2])
    assert not all(same[1::2])


def test_without_a_judge_the_images_are_still_made(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(module, "find_judge", lambda config, pair: None)
    words = ("pairs=red->blue", "controls=false", "steering_type=TEXT", "gate=false", "strength=3")
    folder, summary, _ = start(tmp_path, *words)
    assert summary.best == {}
    assert "not measured" in (folder / "report.html").read_text()
    images = folder / "images" / "red-to-blue"
    assert (images / "text.png").read_bytes() != (images / "baseline.png").read_bytes()


@pytest.mark.parametrize("location", ["ffn", "ca", "ca_block", "sa", "pooled"])
def test_every_location_changes_the_images(tmp_path, generator, location):
    words = ("pairs=circle->square", "controls=false", "gate=false", "other_prompts=0", "steering_type=VISUAL")
    folder, summary, _ = start(tmp_path, *words, f"steering_location={location}", "strength=3", "distance=mahalanobis")
    assert summary.headline["circle-to-square"]["visual"]["feature_distance"] > 0
    kept = json.loads((folder / "fitted" / "circle-to-square" / "visual" / "config.json").read_text())
    assert {entry["site"].split(".")[0] for entry in kept["sites"]} == {location}


def experiment(tmp_path, setup):
    folder = tmp_path / "experiment"
    write_setup(folder / "setup" / "setup.json", setup)
    prompts = {"classes": ["circle", "square"], "prompts": {
        str(i): [f"a {colour} {shape}" for colour in ("red", "blue", "green", "cyan", "pink", "yellow")]
        for i, shape in enumerate(("circle", "square"))}}  # fmt: skip
    (folder / "prompts.json").write_text(json.dumps(prompts))
    lines = ["DATASET: shapes_colors", "DATASET_PATH: prompts.json", "STEERING_TYPE: BOTH", "STEERING_LOCATION: ffn",
             "VARIANT: 0", "BATCH_SIZE: 8", "CFG: 3", "DISTANCE: MAHALANOBIS", "STEERING_MODE: BOTH",
             f"EXPERIMENT_DIR: {folder}", "EXPERIMENT_SETUP: setup.json", "GRID_PATH: pairs.png",
             "CLASSIFIER_WEIGHTS:", "UNCHANGED_SAVED:", "FID: false"]  # fmt: skip
    (folder / "experiment_configuration.yml").write_text("\n".join(lines))
    return folder


def test_a_source_experiment_runs_as_it_is(tmp_path, generator):
    setup = Setup(
        {0: ScaleSetup((), 0.0, 0.0), 1: ScaleSetup(None, 3.0, 1.0), 2: ScaleSetup((0, 2), 2.0, 0.0)}, (0, 1), 2.0
    )
    folder = experiment(tmp_path, setup)
    run, summary, _ = start(tmp_path, "controls=false", config_file=folder / "experiment_configuration.yml")
    assert (folder / "results" / "pairs.png").read_bytes() == (run / "figures" / "pairs.png").read_bytes()
    assert (folder / "weights" / "unchanged.safetensors").is_file()
    result = summary.headline["square-to-circle"]
    assert result["both"]["change_outside"] != 0
    assert result["strength_0_identical"] == {"both": True}
    visual = json.loads((run / "fitted" / "square-to-circle" / "visual" / "config.json").read_text())
    assert [(e["site"], e["steps"]) for e in visual["sites"]] == [(f"ffn.{i}", [1, 2]) for i in range(3)]
    text = json.loads((run / "fitted" / "square-to-circle" / "text" / "config.json").read_text())
    assert [e["site"] for e in text["sites"]] == ["text.block.0", "text.block.1"]

    # Another experiment takes the saved baseline instead of generating it; other prompts are refused by name.
    path = folder / "experiment_configuration.yml"
    path.write_text(path.read_text().replace("UNCHANGED_SAVED:", "UNCHANGED_SAVED: unchanged.safetensors"))
    again, second, _ = start(tmp_path, "controls=false", config_file=path, name="second")
    assert second.headline["images"]["generated"] == summary.headline["images"]["generated"] - 12
    slug = "images/square-to-circle/baseline.png"
    assert (again / slug).read_bytes() == (run / slug).read_bytes()
    with pytest.raises(InputError, match="made from other seeds"):
        start(tmp_path, "controls=false", "seed=5", config_file=path, name="third")
    assert not (tmp_path / "results" / "third").exists()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (Setup({3: ScaleSetup(None, 1.0, 0.0)}, None, 1.0), "scale: got 3.*0 to 2"),
        (Setup({0: ScaleSetup((3,), 1.0, 0.0)}, None, 1.0), "layer at scale 0.*got 3.*0 to 2"),
        (Setup({0: ScaleSetup(None, 1.0, 0.0)}, (2,), 1.0), "layers_text.*got 2"),
        (Setup({0: ScaleSetup(None, 1.0, 0.0)}, None, 0.0), "strength_text"),
    ],
)
def test_setups_that_do_not_fit_leave_nothing(tmp_path, generator, setup, message):
    folder = experiment(tmp_path, setup)
    with pytest.raises(InputError, match=message):
        start(tmp_path, config_file=folder / "experiment_configuration.yml")
    assert not (tmp_path / "results" / "run").exists()
    assert not (folder / "weights").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pairs=circle->blue"], "circle->blue"),
        (["pairs=circle->square,circle->square"], "each pair once"),
        (["layers=7"], "subset of layers.*got '7'"),
        (["scales=2-5"], "subset of scales"),
        (["steering_mode=UNCONDITIONAL"], "STEERING_MODE with text"),
        (["dataset=dogs_cats"], "DATASET_PATH"),
        (["steering_location=text", "steering_type=VISUAL"], "steering_location text"),
    ],
)
def test_bad_words_are_one_line(tmp_path, generator, words, message):
    with pytest.raises(InputError, match=message) as caught:
        start(tmp_path, *words)
    assert "\n" not in str(caught.value)


def test_other_weights_are_another_generator(generator):
    mark = weights_mark(generator.pipe)
    assert weights_mark(tiny_pipeline()) == mark
    assert weights_mark(tiny_pipeline(seed=1)) != mark


def test_unknown_generators_are_named():
    with pytest.raises(InputError, match="infinity-shapes"):
        load_generator("infinity-shape")
    with pytest.raises(InputError, match=r"device.*'tpu'.*auto, cpu"):
        load_generator("infinity-shapes", "tpu")
