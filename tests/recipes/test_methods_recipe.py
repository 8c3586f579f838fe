"""The recipe on the bundled generator at a tiny size, its rule for strengths, and its rows as independent settings."""

import io
import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from pixel_judge import PixelJudge
from rich.console import Console
from tiny_infinity import tiny_pipeline

from pysteer import Plan, steer, zoo
from pysteer.capture import Recorder
from pysteer.capture.fitted import stack_fits
from pysteer.errors import InputError
from pysteer.methods import REGISTRY, create
from pysteer.metrics import Rate
from pysteer.recipes import methods as module
from pysteer.recipes.comparison.contenders import NOT_FITTED, find_contenders
from pysteer.recipes.comparison.places import find_place
from pysteer.recipes.comparison.trial import around, choose, kept
from pysteer.recipes.frame import execute
from pysteer.recipes.prototype.results import Measured

SMALL = ("search_prompts=4", "prompts=4", "fit_pairs=4", "batch_size=8", "controls=1", "sheet_images=3")
METHODS = "methods=prototype:clusters=3,mean_difference@text,affine_transport:rank=2@ca_block/late/sequential"


@pytest.fixture
def tiny(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(module, "load_model", lambda name: pipe)
    monkeypatch.setattr(module, "ShapesJudge", PixelJudge)
    return pipe


def start(tmp_path, *words, name="run"):
    out = io.StringIO()
    folder, summary = execute(
        "methods", [*SMALL, *words], out=tmp_path / "results", run_name=name, console=Console(file=out, width=200)
    )
    return folder, summary, out.getvalue()


def test_a_run_leaves_everything_and_continues(tmp_path, tiny, monkeypatch):
    words = (METHODS, "pairs=red->blue", "strengths=4,12")
    folder, summary, log = start(tmp_path, *words)
    keys = ["prototype-clusters-3", "mean-difference-text", "affine-transport-rank-2-ca-block-late-sequential"]
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    search = {row["setting"] for row in rows if row["part"] == "search"}
    for key in keys:  # the grid, and both sides of the best of it
        levels = {float(name.rpartition("@")[2]) for name in search if name.startswith(f"{key}@")}
        assert levels in ({4, 12, 2, 8}, {4, 12, 8, 16})
    assert len(search) == 2 + 4 * len(keys)
    fresh = {row["setting"] for row in rows if row["part"] == "fresh"}
    controls = {name for name in fresh if name.endswith(("-random", "-shuffled"))}
    assert fresh - controls == {"baseline", "swap", *keys}
    assert {name.rpartition("-")[2] for name in controls} == {"random", "shuffled"}
    prompts = {
        part: {(row["prompt"], row["seed"]) for row in rows if row["part"] == part} for part in ("search", "fresh")
    }
    assert not {seed for _, seed in prompts["search"]} & {seed for _, seed in prompts["fresh"]}
    assert {row["setting"] for row in summary.tables["methods"]} == set(keys)
    for row in summary.tables["methods"]:
        assert row["feature_distance"] > 0
    assert json.loads((folder / "summary.json").read_text())["best"]["pair"] == "red-to-blue"
    html = (folder / "report.html").read_text()
    assert "red to blue" in html
    assert "<script" not in html
    for name in ("methods", "strengths-1"):
        assert (folder / f"figures/red-to-blue-{name}.png").is_file()
    for key in keys:
        assert (folder / f"images/red-to-blue/sheet-{key}.png").is_file()
    assert "images for red to blue" in log

    called = []
    monkeypatch.setattr(type(tiny), "__call__", lambda *args, **kwargs: called.append(1))
    again, repeated, _ = start(tmp_path, *words)
    assert not called
    assert pq.read_table(again / "metrics.parquet").to_pylist() == rows
    assert repeated.best == summary.best
    assert repeated.headline["images"] == summary.headline["images"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=prototyp"], "method: got 'prototyp'.*did you mean prototype"),
        (["methods=prototype:cluster=3"], "cluster.*did you mean clusters"),
        (["methods=prototype:clusters=x"], "prototype:clusters.*whole number"),
        (["methods=prototype@nowhere"], "nowhere"),
        (["methods=prototype@ca/9"], "subset of steps"),
        (["methods=prototype,prototype"], "each once"),
        (["pairs=circle->blue"], "circle->blue"),
        (["pairs=red->blue,red->blue"], "each pair once"),
        (["prompts=1"], "prompts"),
    ],
)
def test_bad_words_are_one_line(tmp_path, tiny, words, message):
    with pytest.raises(InputError, match=message) as caught:
        start(tmp_path, *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results" / "run").exists()


def test_an_unknown_generator_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="infinity-shapes") as caught:
        start(tmp_path, "generator=infinity-shape")
    assert "\n" not in str(caught.value)


def test_all_methods_take_part_and_places_are_found():
    pipe = tiny_pipeline()
    for attribute in ("shape", "colour"):
        names = {each.method.name for each in find_contenders(["all"], pipe, attribute)}
        assert names == set(REGISTRY) - set(NOT_FITTED)
    shape, colour = (find_place("visual", pipe, attribute) for attribute in ("shape", "colour"))
    assert (shape.sites, shape.steps, shape.sequential) == (("ca_block",), (1, 2), True)
    assert (colour.sites, colour.steps, colour.sequential) == (("ca",), None, False)
    assert find_place("ffn+sa.1/0+2", pipe, "shape").steps == (0, 2)


def measured(strength: float, target: float, lowest: float, distance: float) -> Measured:
    def rate(value: float) -> Rate:
        return Rate(value, value, value, 10)

    relative = {"size": rate(1.0), "colour": rate(lowest), "background": rate(math.nan)}
    return Measured("m", "m", "steered", "", strength, 10, target=rate(target), relative=relative, distance=distance)


def test_the_rule_that_chooses_a_strength():
    doses = [measured(1, 0.5, 1.0, 1), measured(2, 0.9, 0.95, 3), measured(3, 0.9, 0.96, 2), measured(4, 1.0, 0.94, 1)]
    assert kept(doses[1]) == 0.95
    assert choose(doses, 0.95).strength == 3  # the 4 keeps too little, the 2 is further away
    assert choose(doses, 0.9).strength == 4
    assert choose([*doses[3:], measured(5, 1.0, 0.2, 0)], 0.95).strength == 4  # none keeps enough


def test_the_search_goes_on_around_the_best_strength():
    grid = (0.5, 1.0, 2.0)
    assert around(1.0, grid) == (0.75, 1.5)
    assert around(0.5, grid) == (0.25, 0.75)
    assert around(2.0, grid) == (1.5, 2.5)
    assert around(1.5, (*grid, 0.75, 1.5)) == (1.25, 1.75)


SITES = ("ca_block.3", "ca_block.5", "ca.1", "ffn.4")
KINDS = (
    ("prototype", {"clusters": 4}), ("prototype", {"clusters": 4, "distance": "mahalanobis"}),
    ("mean_difference", {}), ("affine_transport", {"rank": 3}), ("affine_transport", {"rank": None}),
    ("gaussian_transport", {"pooled": False}), ("linear_act", {}),
    ("contrastive_direction", {"apply": "replace"}),
)  # fmt: skip


def row_plans(pipe) -> tuple[list[Plan], torch.Tensor]:
    """16 plans that differ in method, parameters, site, schedule and rows, and a strength for each."""
    source = [f"a {size} red circle on a white background" for size in ("small", "medium", "large")]
    target = [text.replace("red", "blue").replace("circle", "square") for text in source]
    with Recorder(pipe, SITES) as recorder:
        pipe(source + target, seeds=[1, 2, 3] * 2, decode=False)
    plans = []
    for row in range(16):
        name, options = KINDS[row % len(KINDS)]
        method, site = create(name, **options), SITES[(row // 2) % len(SITES)]
        steps = ((1, 3), (2, 3, 4), (4,))[row % 3]
        fits = {step: method.fit_site(*recorder.get(site, step).split(3), seed=row) for step in steps}
        parameters = stack_fits(site, method.op, fits)
        schedule = {step: (0.4 + 0.1 * step, -0.2 * (row % 2)) for step in steps}
        plans.append(Plan([parameters], {site: schedule}))
    return plans, 0.5 + 0.05 * torch.arange(16.0)


def test_sixteen_settings_in_one_batch_equal_sixteen_runs():
    pipe = zoo.load("infinity-shapes")
    prompts, seeds = ["a large red circle at the left on a white background"] * 16, [7] * 8 + [8] * 8
    plans, strength = row_plans(pipe)

    def run(rows: slice, steered: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits: list[torch.Tensor] = []
        arguments = {"seeds": seeds[rows], "decode": False, "on_scale": lambda scale, x: logits.append(x)}
        if not steered:
            return pipe(prompts[rows], **arguments).bits, logits
        with steer(pipe, plans[rows], strength=strength[rows]):
            return pipe(prompts[rows], **arguments).bits, logits

    bits, logits = run(slice(0, 16))
    _, plain = run(slice(0, 16), steered=False)
    for row in range(16):
        own, single = run(slice(row, row + 1))
        for together, alone in zip(bits, own, strict=True):
            assert torch.equal(together[row : row + 1], alone)
        for together, alone in zip(logits, single, strict=True):
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-4)
        assert any(not torch.equal(a[row], b[row]) for a, b in zip(logits, plain, strict=True))
    assert len(logits[-1].flatten(1).unique(dim=0)) == 16
