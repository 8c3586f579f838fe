"""The task `images` on the bundled generator, through the command line."""

import json
import re

import pytest

from pysteer.cli import run_command
from pysteer.sweep.query import query
from pysteer.sweep.store import Store

PAIR = ["pair=red->blue", "method=mean_difference", "site=text", "fit_pairs=8", "prompts=2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    words = [*PAIR, "strength=0,1,3"]
    assert run_command(["sweep", "images", *words, "--out", str(out), "--name", "blue"]) == 0
    return out


def test_results_status_and_query(swept, capsys):
    assert run_command(["status", "blue", "--out", str(swept)]) == 0
    assert re.search(r"\b(\d+)/\1 cells", capsys.readouterr().out)
    assert run_command(["results", "blue", "--out", str(swept), "--json", "--report"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["setting"]["strength"] for row in rows} == {0.0, 1.0, 3.0}
    still = next(row for row in rows if row["setting"]["strength"] == 0.0)
    assert still["measures"]["change"] == 0.0
    assert still["measures"]["kept"] == 1.0
    assert max(row["measures"]["distance"] for row in rows) > 0.01  # steering did something
    assert run_command(["query", "select count(*) n from blue", "--out", str(swept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 6}]


def test_the_same_command_does_nothing_and_a_longer_one_only_the_rest(swept, capsys):
    words = [*PAIR, "strength=0,1,3,5"]
    assert run_command(["sweep", "images", *words, "--out", str(swept), "--name", "blue"]) == 0
    assert "2 cells in" in capsys.readouterr().out
    keys = Store(swept / "blue").finished()
    assert len(keys) == 8


def test_a_row_is_what_its_seed_makes(swept):
    import numpy as np
    import torch
    from PIL import Image

    import pysteer

    _, rows, _ = query("select prompt, noise, image from cells where strength = 0 order by key", [swept / "blue"])
    pipe = pysteer.zoo.load("infinity-shapes")
    for prompt, noise, image in rows:
        alone = pipe([prompt], seeds=[noise]).images[0].int()
        stored = torch.from_numpy(np.array(Image.open(Store(swept / "blue").image_path(image)))).int()
        assert int((alone - stored).abs().max()) <= 1  # the decoder rounds with the size of its batch


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["method=prototipe", "pair=red->blue"], "prototype"), (["method=prototype"], "pair"),
        (["strength=1,2", "prompts=no-such-file"], "prompts"), (["model=nothing"], "model"),
        (["method=prototype", "pair=red->blue", "site=nowhere"], "nowhere"), (["prompts=0"], "prompts"),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused_before_a_folder_is_made(tmp_path, capsys, words, named):
    assert run_command(["sweep", "images", *words, "--out", str(tmp_path / "r")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
